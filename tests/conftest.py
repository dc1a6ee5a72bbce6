"""What tests share: seeds, tokenizers, a small almanac on disk, random models for it, recipes."""

import importlib.util
import os
import random
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

# Without a GPU, triton's kernels run in its interpreter, which they choose when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from joint_gradients import Batch
from rag2 import config, pipeline
from rag2.evaluation.questions import load_questions, split
from rag2.generator.load import Generator, build_llama
from rag2.generator.prompt import Prompt
from rag2.index.flat import Flat
from rag2.kb.chunk import TokenChunker
from rag2.kb.store import KnowledgeBase
from rag2.rag import RagModel
from rag2.reindex.store import Store
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.types import Chunk
from rag2.worlds.almanac import Almanac
from refreshes import Inline
from small_world import SHAPE, roughen, start_models, tokenizer_of
from texts import byte_level, word_pieces

VOCABULARY = 400


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--seed N` repeats a test that printed seed N."""
    parser.addoption("--seed", type=int, help="repeat the inputs of a test that printed this seed")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Fresh in every run, for torch and `random` too; printed, and repeated by `--seed`."""
    given = request.config.getoption("--seed")
    seed = secrets.randbits(31) if given is None else given
    print(f"seed {seed}")  # noqa: T201 (pytest shows it when the test fails)
    torch.manual_seed(seed)
    random.seed(seed)
    return seed


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Fresh random arrays."""
    return np.random.default_rng(seed)


@pytest.fixture
def dice(seed: int) -> random.Random:
    """Fresh random picks."""
    return random.Random(seed)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of byte-level BPE without and with trimmed offsets, and of WordPiece."""
    folders = []
    for number, tokenizer in enumerate([byte_level(False), byte_level(True), word_pieces()]):
        tokenizer.enable_truncation(16)  # as a file saved by a trainer may say
        tokenizer.enable_padding(length=16)
        folder = tmp_path_factory.mktemp(f"tokenizer{number}")
        tokenizer.save(str(folder / "tokenizer.json"))
        folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def chunker(tokenizers: list[Path]) -> TokenChunker:
    """Chunks of 16 byte-level tokens."""
    return TokenChunker(tokens=16, overlap=4, tokenizer=str(tokenizers[0]))


@pytest.fixture(scope="session")
def almanac() -> Almanac:
    """The smallest world there is."""
    sizes: dict[str, Any] = {"train": 16, "validation": 16, "test": 16}
    return Almanac(seed=0, **sizes, two_hop=8, paraphrases=1, pretrain_rows=150)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, almanac: Almanac) -> Path:
    """The world's files, knowledge base and tokenizer, and random models to start from."""
    home = tmp_path_factory.mktemp("home")
    inputs = pipeline.Inputs(world=almanac, home=str(home), vocabulary=VOCABULARY)
    pipeline.ensure(inputs, {"data"})
    start_models(home)
    return home


@pytest.fixture
def chunks(home: Path) -> list[Chunk]:
    """The corpus of the small world."""
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        return kb.chunks()


@pytest.fixture
def encoder(home: Path) -> DualEncoder:
    """The dual encoder that joint training on the small world begins with."""
    return DualEncoder.load(home / "retriever")


@pytest.fixture
def store(tmp_path: Path, chunks: list[Chunk], encoder: DualEncoder) -> Store:
    """Where the generations of a run in `tmp_path` are made and kept."""
    return Store(tmp_path, chunks, encoder, Flat(device="cpu"), kb_version=1, kb_hash="h")


@pytest.fixture
def tokenizer(home: Path):
    """The tokenizer of the small world."""
    return tokenizer_of(home)


@pytest.fixture
def generator(tokenizer) -> Generator:
    """A small Llama with random weights."""
    return build_llama(tokenizer, **SHAPE, max_positions=512)


@pytest.fixture
def rag(tokenizer) -> RagModel:
    """Two towers and a Llama, all random, with posteriors that differ from chunk to chunk."""
    # Room for four of the longest chunks and their question.
    generator = build_llama(tokenizer, **SHAPE, max_positions=1024)
    encoder = DualEncoder.build(EncoderConfig(towers="two", **SHAPE), tokenizer)
    for model in (encoder.towers, generator.model):
        roughen(model, 0.1)
    return RagModel(encoder, generator, Prompt()).train()


@pytest.fixture
def batch(home: Path, chunks: list[Chunk], seed: int) -> Batch:
    """Three questions with four chunks each; they share the first chunk."""
    questions = split(load_questions(home / "data" / "questions.jsonl"), "train")
    picked = torch.randperm(len(questions))[:3].tolist()
    rows = torch.randperm(len(chunks))[:10].tolist()
    groups = [[rows[0], *rows[1 + 3 * b : 4 + 3 * b]] for b in range(3)]
    return (
        [questions[i].question for i in picked],
        [questions[i].gold for i in picked],
        [[chunks[i] for i in group] for group in groups],
    )


@pytest.fixture(scope="session")
def recipe() -> Callable[[str], ModuleType]:
    """A recipe by its path, such as `train/joint.py`, as a module."""
    loaded: dict[str, ModuleType] = {}

    def load(path: str) -> ModuleType:
        if path not in loaded:
            name = "recipe_" + path.removesuffix(".py").replace("/", "_")
            spec = importlib.util.spec_from_file_location(name, config.recipe(path))
            assert spec and spec.loader
            loaded[path] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[path])
        return loaded[path]

    return load


@pytest.fixture(scope="session")
def towns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose system was trained to answer what it reads."""
    import reading
    from rag2.answering.rag import Rag
    from small_systems import served

    export = reading.export(tmp_path_factory.mktemp("towns"))
    with Rag.from_pretrained(export) as rag, served(rag) as server:
        yield server.address


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> type[Inline]:
    """Workers without processes; a class of its own for each test."""
    fresh = type("Fresh", (Inline,), {"launched": []})
    monkeypatch.setattr("rag2.reindex.store.Worker", fresh)
    return fresh


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A script of this folder by its name, as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
