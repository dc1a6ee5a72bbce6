"""What the tests of training share: a small almanac on disk, random models for it, the recipes."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rag2 import config, pipeline
from rag2.generator.load import Generator, build_llama
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.worlds.almanac import Almanac

VOCABULARY = 400
SHAPE: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 48}


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
    torch.manual_seed(0)
    tokenizer = tokenizer_of(home)
    build_llama(tokenizer, **SHAPE, max_positions=512).save(home / "generator")
    DualEncoder.build(EncoderConfig(**SHAPE), tokenizer).save(home / "retriever")
    return home


def tokenizer_of(home: Path):
    """The tokenizer of a world's home."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(home / "data" / "tokenizer"))


@pytest.fixture
def tokenizer(home: Path):
    """The tokenizer of the small world."""
    return tokenizer_of(home)


@pytest.fixture
def generator(tokenizer) -> Generator:
    """A small Llama with random weights."""
    return build_llama(tokenizer, **SHAPE, max_positions=512)


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
