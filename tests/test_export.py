"""What is exported is the system that was trained, here and in other libraries."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

import small_runs
from exports import by_hand, exported, parts
from rag2 import artifact
from rag2.answering import reading, schemas
from rag2.answering.exported import Exported
from rag2.export import folders, foreign
from rag2.export.source import of_run
from rag2.export.write import write
from rag2.generator.load import Generator
from rag2.kb.chunk import TokenChunker
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError, lookup
from rag2.retrieval import Dense
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.types import Document
from small_models import CONFIGS, SPECIAL, build, small_tokenizer
from small_world import SHAPE

pytestmark = pytest.mark.filterwarnings("ignore")  # of sentence-transformers about itself
QUESTIONS = [
    "Where does Karin live?",
    "  who keeps the harbour in Dun Loch? ",
    "why",
    "naïve 日本語",
]
PROMPTS = ("prefix", "prompt", "p_tuning")
ENCODERS: dict[str, dict[str, Any]] = {
    "one tower": {},
    "cls and prefixes": {
        "pooling": "cls",
        "normalize": False,
        "question_prefix": "query: ",
        "chunk_prefix": "passage: ",
    },
    "two towers": {"towers": "two", "question_prefix": "q: "},
    "two towers, cls": {"towers": "two", "pooling": "cls", "normalize": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, home: Path, recipe: Callable[[str], ModuleType]):
    """A joint run of two steps, as a demo holds it."""
    out = tmp_path_factory.mktemp("demo") / "joint"
    small_runs.start(recipe, "joint", home, out, steps=2)
    return out


@pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS)
def test_the_retriever_embeds_alike_in_sentence_transformers(
    tmp_path: Path, home: Path, seed: int, settings: dict[str, Any], chunks: Any
):
    source = parts(home, tmp_path, **settings)
    trained = DualEncoder.load(source.retriever).eval()
    write(source, tmp_path / "export", index="torch")
    loaded = SentenceTransformer(str(tmp_path / "export" / "retriever"), device="cpu")
    passages = [chunk.passage for chunk in chunks[:40]]
    for side, texts, encode in (
        ("question", QUESTIONS, loaded.encode_query),
        ("chunk", passages, loaded.encode_document),
    ):
        ours = embed_corpus(trained, texts, side=side)  # pyright: ignore[reportArgumentType]
        assert np.abs(ours - encode(texts)).max() <= 1e-5
    other = embed_corpus(trained, QUESTIONS, side="chunk")
    if settings:  # the sides differ, so that a mix-up would show
        assert np.abs(other - loaded.encode_query(QUESTIONS)).max() > 1e-3


def test_the_generator_is_a_plain_folder_for_transformers(tmp_path: Path, home: Path, seed: int):
    source = parts(home, tmp_path)
    write(source, tmp_path / "export", index="torch")
    folder = tmp_path / "export" / "generator"
    trained = Generator.load(source.generator)
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = trained.tokenizer.encode("Karin lives near the old mill.")
    assert tokenizer.encode("Karin lives near the old mill.") == ids
    assert torch.equal(by_hand(plain, ids), by_hand(trained.model, ids))
    assert Exported.open(tmp_path / "export").generator().fingerprint() == trained.fingerprint()


@pytest.mark.parametrize("family", [*CONFIGS, *SPECIAL])
def test_a_family_of_models_loses_nothing_by_the_closed_config(
    tmp_path: Path, seed: int, family: str
):
    model = build(family, tmp_path, small_tokenizer())
    folders.write_generator(tmp_path / family, tmp_path / "export", "merge")
    config = reading.read_json(tmp_path / "export" / "config.json")
    sizes = reading.check_safetensors(tmp_path / "export" / "model.safetensors")
    schemas.model(config, True, sizes)
    ids = list(range(3, 40))
    assert torch.equal(by_hand(Generator.load(tmp_path / "export").model, ids), by_hand(model, ids))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby", *PROMPTS])
@pytest.mark.parametrize("adapters", ["merge", "keep"])
def test_adapters_are_merged_or_kept_and_compute_the_same(
    tmp_path: Path, home: Path, seed: int, method: str, adapters: Any
):
    source = parts(home, tmp_path)
    base = source.generator.rename(tmp_path / "base")
    tuned = Generator.load(base).tuned(lookup("tuning", method)())
    for weight in tuned.model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    tuned.save(source.generator)
    out = tmp_path / "export"
    if adapters == "merge" and method in ("houlsby", *PROMPTS):
        with pytest.raises(UserError, match="cannot be merged .*--adapters keep"):
            write(source, out, index="torch", adapters=adapters)
        assert not out.exists()
        return
    write(source, out, index="torch", adapters=adapters)
    ids = tuned.tokenizer.encode("Karin lives near the old mill.")
    expected = by_hand(tuned.model.eval(), ids)
    shutil.rmtree(base)
    out = out.rename(tmp_path / "moved")  # the base lies inside, wherever that is
    found = by_hand(Exported.open(out).generator().model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if adapters == "merge":
        plain = AutoModelForCausalLM.from_pretrained(out / "generator").eval()
        torch.testing.assert_close(by_hand(plain, ids), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_without_its_base_is_refused(tmp_path: Path, home: Path):
    source = parts(home, tmp_path)
    base = source.generator.rename(tmp_path / "base")
    Generator.load(base).tuned(lookup("tuning", "lora")()).save(source.generator)
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"base of adapter .*does not exist"):
        write(source, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_run_comes_back_as_it_was_committed(tmp_path: Path, run: Path, home: Path):
    write(of_run(run), tmp_path / "export")
    system = Exported.open(tmp_path / "export")
    final = run / "final"
    assert system.retriever().fingerprint() == DualEncoder.load(final / "retriever").fingerprint()
    assert system.generator().fingerprint() == Generator.load(final / "generator").fingerprint()
    assert system.meta["parents"] == {"system": artifact.seal(artifact.verify(final))}
    assert system.id == artifact.seal(artifact.verify(tmp_path / "export"))
    assert system.settings.k == 8  # what training used, since nothing was chosen
    generation = system.generation()
    assert generation.step == 2
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        live = kb.chunks()
    assert [generation.chunk(int(i)) for i in generation.ids_N] == live
    # The index is of the weights at the end, though the run's own was not refreshed since step 0.
    encoder = system.retriever()
    fresh = Dense.over(encoder, live)
    queries = embed_corpus(encoder, QUESTIONS, side="question")
    assert np.array_equal(
        generation.index.search(queries, 5)[1], fresh.generation.index.search(queries, 5)[1]
    )


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, run: Path, home: Path):
    for name in ("a", "b"):
        write(of_run(run), tmp_path / name, index="torch")
    assert Exported.open(tmp_path / "a").id == Exported.open(tmp_path / "b").id
    there = [p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()]
    here = [str(path).encode() for path in (tmp_path, run.parent, home)]
    assert not [data for data in there if any(path in data for path in here)]  # no path of ours


def test_what_validation_chose_is_how_it_answers(tmp_path: Path, run: Path):
    assert not of_run(run).chosen
    results = {
        "format": "rag2.results/1",
        "task": "almanac | <b>x</b>",
        "n": 600,
        "seed": 0,
        "interval": "wilson",
        "arms": {
            "base": {"accuracy": 0.25, "ci95": [0.2, 0.3], "k": 0},
            "joint": {"accuracy": 0.875, "ci95": [0.85, 0.9], "k": 3, "recall_at_1": 0.5},
        },
        "paired": [
            {"a": "joint", "b": "base", "difference": 0.625, "ci95": [0.6, 0.65], "mcnemar_p": 0.0}
        ],
        "k_selection": {
            "chosen": {"joint": 3},
            "reading": {"joint": "concat"},
            "temperature": {"joint": 0.5},
        },
        "environment": {},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    source = of_run(run, tmp_path)
    settings = source.settings
    assert (settings.k, settings.temperature, settings.reading) == (3, 0.5, "concat")
    write(source, tmp_path / "export", index="torch")
    assert Exported.open(tmp_path / "export").settings == settings
    text = (tmp_path / "export" / "README.md").read_text()
    card: Any = ModelCard(text)
    (result,) = card.data.eval_results
    assert result.metric_value == 0.875 and card.data.library_name == "rag2"
    assert "| **`joint`** (this one) | 0.875 | 0.850 - 0.900 | 3 | 0.500 |" in text
    assert "<b>" not in text and "chosen on validation questions" in text
    results["arms"].pop("joint")
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="has no arm 'joint'; there are: base"):
        of_run(run, tmp_path / "results.json")


def test_documents_can_be_added_beside_an_export_and_removed_text_is_not_in_it(
    tmp_path: Path, home: Path
):
    shutil.copytree(home / "data", tmp_path / "data")
    kb_path = tmp_path / "data" / "kb.sqlite"
    with KnowledgeBase(kb_path) as kb:
        chunker = kb.chunker(tmp_path / "data" / "tokenizer")
        assert chunker is not None
        kb.put([Document("secret", "the xylophone of Quuxville")], chunker)
        kb.remove(["secret"])
    source = parts(home, tmp_path / "parts")
    write(
        type(source)(source.generator, source.retriever, kb_path, source.settings),
        tmp_path / "export",
        index="torch",
    )
    system = Exported.open(tmp_path / "export")
    assert b"xylophone" in kb_path.read_bytes() or list(kb_path.parent.glob("kb.sqlite-*"))
    for path in (tmp_path / "export").rglob("*"):
        assert not path.is_file() or b"ylophone" not in path.read_bytes(), path
    state = tmp_path / "state"
    state.mkdir()
    assert system.tokenizer is not None
    shutil.copytree(system.tokenizer, state / "tokenizer")
    shutil.copy(system.kb, state / "kb.sqlite")
    with KnowledgeBase(state / "kb.sqlite") as kb:
        chunker = kb.chunker(state / "tokenizer")
        assert isinstance(chunker, TokenChunker) and chunker.tokenizer == str(state / "tokenizer")
        kb.add([Document("new", "a new document")], chunker)
    assert Exported.open(tmp_path / "export").id == system.id


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_encoder_of_sentence_transformers_is_read_as_it_says_itself(
    tmp_path: Path, home: Path, seed: int, pooling: Any, normalize: bool
):
    given = {"pooling": pooling, "normalize": normalize, "question_prefix": "q: "}
    source = parts(home, tmp_path, **given, max_question_tokens=80, max_chunk_tokens=80)
    write(source, tmp_path / "a", index="torch")
    theirs = tmp_path / "theirs"
    SentenceTransformer(str(tmp_path / "a" / "retriever")).save(str(theirs))  # in today's format
    assert not (theirs / "rag2_encoder.json").exists()
    found, encoder = foreign.of_parts(theirs, source.generator, source.kb)
    assert encoder is not None and encoder.max_chunk_tokens == 80
    assert encoder.model_dump(include=set(given)) == given
    write(found, tmp_path / "b", index="torch", encoder=encoder)
    ours = embed_corpus(Exported.open(tmp_path / "b").retriever(), QUESTIONS, side="question")
    assert np.abs(ours - SentenceTransformer(str(theirs)).encode_query(QUESTIONS)).max() <= 1e-5


def test_an_encoder_that_rag2_cannot_compute_is_refused(tmp_path: Path, home: Path):
    source = parts(home, tmp_path)
    write(source, tmp_path / "a", index="torch")
    folder = tmp_path / "a" / "retriever"
    (folder / "rag2_encoder.json").unlink()
    modules = json.loads((folder / "modules.json").read_text())
    for change, reason in (
        ({"type": "sentence_transformers.models.Dense"}, "it is Transformer, Dense"),
        ({"type": "evil.Pooling"}, "code that is not sentence-transformers'"),
    ):
        changed = [modules[0], modules[1] | change, *modules[2:]]
        (folder / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=reason):
            foreign.read_encoder(folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(UserError, match="it pools by max"):
        foreign.read_encoder(folder)


def test_an_approximate_index_says_so(tmp_path: Path, home: Path):
    pytest.importorskip("faiss")
    write(parts(home, tmp_path), tmp_path / "export", index="hnsw")
    assert len(Exported.open(tmp_path / "export").generation()) > 0
    assert re.search(r"hnsw.*approximate", (tmp_path / "export" / "README.md").read_text())


def test_a_two_tower_encoder_comes_back(tmp_path: Path, home: Path):
    config = EncoderConfig(**SHAPE, towers="two")
    source = parts(home, tmp_path, **config.model_dump(include={"towers"}))
    write(source, tmp_path / "export", index="torch")
    system = Exported.open(tmp_path / "export")
    assert system.retriever().fingerprint() == DualEncoder.load(source.retriever).fingerprint()
    assert exported(home, tmp_path / "other").id != system.id
