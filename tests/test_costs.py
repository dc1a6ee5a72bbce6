"""What arms cost: training by run, bytes by file, times by what is done."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from made import exactly, make_arm
from rag2 import config
from rag2.artifact import committing
from rag2.evaluation import intake, latency, report, shipping, trial
from rag2.evaluation.arms import Arm, Reader, arm, members
from rag2.evaluation.outcome import WARM, pool
from rag2.evaluation.questions import load_questions, split
from rag2.evaluation.trial import QuestionSets, Rules
from rag2.generator.load import Generator, build_llama
from rag2.generator.prompt import Prompt
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Dense, Gold, Lexical, Random
from rag2.retriever.encoder import DualEncoder
from rag2.systems import Parts, Systems
from rag2.training.log import RunLog, train_tokens
from rag2.tuning.lora import LoRA
from rag2.types import Chunk, Question
from small_world import SHAPE, roughen, tokenizer_of

# --- training ------------------------------------------------------------------------------------

# name of the run -> weights of the retriever, of the generator, seconds of each of two steps
RUNS = {"warm": (1, 0, 100.0), "ft": (0, 10, 200.0), "sft": (0, 20, 400.0), "joint": (5, 50, 800.0)}
RUNS |= {"staged": (0, 30, 1600.0), "logged": (0, 0, 3200.0)}


def run(folder: Path, name: str) -> Path:
    """What a training run leaves: its log, and which weights learned."""
    retriever, generator, seconds = RUNS[name]
    log = RunLog(folder / name)
    for step in range(2):
        log.write(step=step, seconds=seconds)
    log.close()
    meta = {"trained": {"retriever": retriever, "generator": generator}}
    with committing(folder / name / "final", kind="system", meta=meta) as staging:
        (staging / "weights").write_text("")
    return folder / name / "final"


@pytest.fixture
def systems(tmp_path: Path) -> Systems:
    """Parts of four runs, and a base that none of them made."""
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True):
        pass
    final = {name: run(tmp_path, name) for name in RUNS}
    generators = {name: str(final[name] / "generator") for name in ("ft", "sft", "joint", "staged")}
    log = tmp_path / "logged" / "final" / "questions.jsonl"
    (tmp_path / "staged" / "config.yaml").write_text(f"questions: {log}\n")
    parts = Parts(
        tmp_path / "kb.sqlite",
        {"base": str(tmp_path / "base"), **generators},
        {name: str(final[name] / "retriever") for name in ("warm", "joint")},
    )
    return Systems(parts, 0, Prompt(), [], {}, "float32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "weights", "seconds"),
    [
        ("base", 0, 0),
        ("bm25_rag", 0, 0),
        ("ft", 10, 400),
        ("frozen_rag", 1, 200),
        ("hybrid_rag", 1, 200),
        ("ft_rag", 10 + 1, 400 + 200),
        ("staged", 30 + 1, 3200 + 6400 + 200),  # the log that it learned from took time, too
        ("ensemble", 10 + 1, 400 + 200),  # its two members
        ("router", 1, 200),
        ("sft_rag", 20 + 1, 800 + 200),
        ("joint", 50 + 5, 1600 + 200),  # both halves are of one run, which took its time once
        ("warm_joint", 50 + 1, 1600 + 200),  # of a joint run only the half that the arm has
        ("joint_sft", 20 + 5, 800 + 1600 + 200),
    ],
)
def test_an_arm_costs_the_weights_of_its_own_halves_and_every_run_behind_them_once(
    systems: Systems, name: str, weights: int, seconds: int
):
    cost = systems.cost(*members(name).values())
    assert (cost["trained_parameters"], cost["train_seconds"]) == (weights, seconds)


def test_a_run_that_does_not_say_what_it_trained_is_named_in_one_line(
    systems: Systems, tmp_path: Path
):
    with committing(tmp_path / "old" / "final", kind="system", meta={}) as staging:
        (staging / "weights").write_text("")
    generators = {**systems.parts.generators, "ft": str(tmp_path / "old" / "final" / "generator")}
    systems.parts = replace(systems.parts, generators=generators)
    with pytest.raises(UserError, match="old was made by an earlier version of rag2"):
        systems.cost(arm("ft"))


def test_tokens_of_training_are_the_last_count_of_its_log_or_unknown(tmp_path: Path):
    for name, counts in (("counted", (100, 230)), ("old", (None, None)), ("half", (None, 230))):
        log = RunLog(tmp_path / name)
        for step, count in enumerate(counts):
            log.write(step=step, seconds=1.0, **({"tokens": count} if count else {}))
        log.close()
    assert train_tokens(tmp_path / "counted") == 230
    assert train_tokens(tmp_path / "old") is train_tokens(tmp_path / "half") is None
    assert train_tokens(tmp_path / "none") is None


def test_tokens_of_an_arm_are_those_of_all_its_runs_or_unknown(systems: Systems, tmp_path: Path):
    for name in ("warm", "ft"):
        log = RunLog(tmp_path / name, start=1)
        log.write(step=1, seconds=RUNS[name][2], tokens=7 if name == "ft" else 5)
        log.close()
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / name / "log.jsonl").write_text(lines[-1])
    assert systems.cost(arm("ft_rag"))["train_tokens"] == 12
    assert systems.cost(arm("joint"))["train_tokens"] is None
    assert systems.cost(arm("base"))["train_tokens"] == 0


# --- delivery ------------------------------------------------------------------------------------


def test_a_generator_ships_its_weights_an_adapter_its_own_and_the_base_nothing(
    tmp_path: Path, generator: Generator
):
    base, tuned, adapter = (str(tmp_path / name) for name in ("base", "ft", "lora"))
    generator.save(base)
    generator.save(tuned)
    adapted: Any = LoRA(rank=2).apply(Generator.load(base).model)
    Generator(adapted, generator.tokenizer).save(adapter)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    whole = (tmp_path / "ft" / "model.safetensors").stat().st_size
    assert shipping.generator_bytes(base, base) == 0
    assert shipping.generator_bytes(f"{base}/../base", base) == 0
    assert shipping.generator_bytes(tuned, base) == whole
    own = shipping.generator_bytes(adapter, base)
    assert own and 4 * trained <= own < 4 * trained + 20_000 < whole
    assert shipping.generator_bytes(adapter, tuned) == own + whole  # its base is not the base
    assert shipping.generator_bytes("hub/model", base) is None


def test_a_retriever_ships_its_weights_and_every_chunks_vector_and_text(
    encoder: DualEncoder, chunks: list[Chunk]
):
    def size(some: list[Chunk]) -> int:
        found = shipping.retriever_bytes(Dense.over(encoder, some), some)
        assert found
        return found

    weights = 4 * sum(p.numel() for p in encoder.parameters())
    text = sum(len(c.text.encode()) + len(c.title.encode()) for c in chunks)
    vectors = len(chunks) * (4 * encoder.dimension + 8)
    rest = size(chunks) - weights - vectors - text
    assert 0 < rest < 120 * len(chunks)  # ids, places and names of documents
    added = size(chunks) - size(chunks[:-1])
    assert added > 4 * encoder.dimension + 8 + len(chunks[-1].text.encode())
    bm25 = shipping.retriever_bytes(Lexical(BM25(chunks)), chunks)
    assert bm25 == sum(len(chunk.passage.encode()) for chunk in chunks)
    assert shipping.retriever_bytes(Gold({}), chunks) is None


# --- a new document ------------------------------------------------------------------------------


def test_chunks_added_to_an_index_are_found_as_if_they_had_been_there(
    encoder: DualEncoder, chunks: list[Chunk]
):
    roughen(encoder.towers, 0.3)
    encoder.eval()
    known, new = chunks[:-3], chunks[-3:]
    asked = [Question("q", chunk.text) for chunk in (*new, *known[:3])]
    before = (Dense.over(encoder, known), Lexical(BM25(known)))
    whole = (Dense.over(encoder, chunks), Lexical(BM25(chunks)))
    for old, expected in zip(before, whole, strict=True):
        grown = intake.with_chunks(old, known, new)
        for got, want in zip(grown.search(asked, 5), expected.search(asked, 5), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)
        everything = {chunk.id for chunk in known}
        assert set(old.search(asked, len(known))[1].flat) == everything
        everything |= {chunk.id for chunk in new}
        assert set(grown.search(asked, len(chunks))[1].flat) == everything
    assert len(intake.with_chunks(before[0], known, new).generation) == len(chunks)  # pyright: ignore


def test_a_new_document_is_timed_on_a_copy_that_really_takes_it_in(
    home: Path, encoder: DualEncoder, chunks: list[Chunk], monkeypatch: pytest.MonkeyPatch
):
    path = home / "data" / "kb.sqlite"
    before, taken = path.read_bytes(), []
    true = intake.with_chunks
    monkeypatch.setattr(intake, "with_chunks", lambda *a: taken.append(true(*a)) or taken[-1])
    seconds = intake.document_seconds(path, Dense.over(encoder, chunks))
    assert seconds and 0 < seconds < 60 and path.read_bytes() == before
    sizes = [len(dense.generation) for dense in taken]
    assert len(chunks) < sizes[0] < sizes[1] and len(sizes) == intake.ROUNDS + 1
    assert intake.document_seconds(path, Lexical(BM25(chunks)))
    assert intake.document_seconds(path, Random([1], 0)) is None
    assert intake.document_seconds(path, Gold({})) is None


def test_a_knowledge_base_finds_the_tokenizer_that_cut_it_where_it_was_moved_to(
    home: Path, tmp_path: Path
):
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        kb.copy(tmp_path / "kb.sqlite")
        document = next(iter(kb.documents()))
        spans = [(chunk.start, chunk.end) for chunk in kb.chunks_of(document.id)]
        assert spans == [(c.start, c.end) for c in kb.chunks() if c.document == document.id]
        assert kb.chunks_of("nowhere") == []
        chunker = kb.chunker(home / "data" / "tokenizer")
        assert chunker and chunker(document) == spans
        lost = kb.chunker(tmp_path / "tokenizer")
        assert lost is None or lost(document) == spans
    with KnowledgeBase(tmp_path / "kb.sqlite") as kb:
        assert [chunk.id for chunk in kb.chunks_of(document.id)]
    with KnowledgeBase(tmp_path / "empty.sqlite", create=True) as kb:
        assert kb.chunker(home / "data" / "tokenizer") is None


@pytest.mark.parametrize(
    ("name", "k", "seconds"),
    [
        ("ft", 0, 400.0),  # its whole run again
        ("base", 0, None),  # nothing trains it
        ("bm25_rag", 0, None),  # read no chunk: the base alone
        ("ft_rag", 0, 400.0),
        ("bm25_rag", 3, 0.5),
        ("ft_rag", 3, 0.5),  # by the index, and not by training
    ],
)
def test_a_document_gets_in_by_the_index_or_else_by_a_whole_run_of_training(
    systems: Systems,
    monkeypatch: pytest.MonkeyPatch,
    chunks: list[Chunk],
    name: str,
    k: int,
    seconds: float | None,
):
    monkeypatch.setattr(intake, "document_seconds", lambda *_: 0.5)
    systems._retrievers = {"warm": Lexical(BM25(chunks)), "bm25": Lexical(BM25(chunks))}
    systems.chunks = chunks
    asked = arm(name)
    result = make_arm(name, exactly(1, 3), k=k, inference_flops=10.0)
    (Path(systems.parts.generators["ft"])).mkdir(exist_ok=True)
    weights = Path(systems.parts.generators["ft"]) / "model.safetensors"
    weights.write_bytes(b"x" * 11)
    found = systems.serving([asked], result)
    assert found["document_seconds"] == seconds
    text = sum(len(chunk.passage.encode()) for chunk in chunks) if k else 0
    assert found["ship_bytes"] == text + 11 * (asked.generator == "ft")


# --- latency -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(home: Path) -> list[Question]:
    return split(load_questions(home / "data" / "questions.jsonl"), "test")[:8]


@pytest.mark.parametrize(("reading", "k"), [("marginal", 3), ("concat", 3), ("marginal", 0)])
def test_asked_one_at_a_time_an_arm_picks_what_it_picked_among_all(
    home: Path,
    encoder: DualEncoder,
    chunks: list[Chunk],
    asked: list[Question],
    seed: int,
    reading: Any,
    k: int,
):
    generator = build_llama(tokenizer_of(home), **SHAPE, max_positions=512)
    roughen(generator.model, 0.1)
    reader = Reader(generator, Prompt(), {chunk.id: chunk for chunk in chunks})
    dense, sets = Dense.over(encoder.eval(), chunks), QuestionSets([], asked, asked, [], [])
    found = trial.search(Arm("base", "warm"), dense, sets, Rules([3]))
    rules = Rules([k], [reading])
    result = trial.run("x", Arm("base", "warm"), sets, found, reader, rules, {}).result
    assert result.choice and result.k == k and result.inference_flops
    picks, read = [], []
    for question in asked:
        picks.append(latency.pick(question, dense, reader, result.choice))
        read.append(len(reader.known))
    assert picks == result.predictions.tolist()
    assert set(read) == {3 if (reading, k) == ("marginal", 3) else 1}  # nothing but what counts
    flops = sum(reader.flops.values())
    assert flops > 0 and not set(reader.flops) - set(reader.known)


def test_a_comparison_times_as_many_questions_as_asked_and_tells_every_cost(
    recipe: Callable[[str], ModuleType], home: Path, tmp_path: Path
):
    module, threads = recipe("eval/compare.py"), torch.get_num_threads()
    settings = [f"kb={home / 'data' / 'kb.sqlite'}", f"retrievers.warm={home / 'retriever'}"]
    settings += [f"questions={home / 'data' / 'questions.jsonl'}", "ks=[2]", "limit=6"]
    settings += [f"generators.base={home / 'generator'}", "arms=[base,frozen_rag]"]
    settings += ["latency=4", f"out={tmp_path / 'out'}"]
    found = module.main(config.load(module.CompareConfig, None, settings))
    torch.set_num_threads(threads)
    base, rag = (found["arms"][name] for name in ("base", "frozen_rag"))
    for told in (base, rag):
        assert (told["latency_ms"]["n"], told["latency_ms"]["warmup"]) == (4, WARM)
        assert 0 < told["latency_ms"]["p50"] <= told["latency_ms"]["p95"]
    stripped = report.strip_times(found)["arms"]["frozen_rag"]
    assert stripped.keys() >= {"ship_bytes", "inference_flops", "train_tokens"}
    assert not stripped.keys() & {"latency_ms", "document_seconds"}
    assert (base["ship_bytes"], base["document_seconds"]) == (0, None)
    assert rag["ship_bytes"] > 10_000 and rag["document_seconds"] > 0
    assert rag["inference_flops"] > 2 * base["inference_flops"] > 0
    costs = (tmp_path / "out" / "report.md").read_text().split("## Cost")[1]
    for title in ("bytes to ship", "FLOPs a question", "ms a question", "s for a new document"):
        assert title in costs and title in (tmp_path / "out" / "report.html").read_text()
        assert title in (tmp_path / "out" / "report.tex").read_text()


def test_costs_of_seeds_are_their_means_and_their_latencies_are_put_together():
    keys = ("train_tokens", "ship_bytes", "inference_flops", "document_seconds")
    values: Sequence[float] = (10.0, 30.0)
    runs = [
        make_arm("ft", exactly(1, 3), latency_ms=(value, 2 * value), **dict.fromkeys(keys, value))
        for value in values
    ]
    pooled = pool(runs)
    assert [getattr(pooled, key) for key in keys] == [20.0] * 4
    assert pooled.latency and pooled.latency["n"] == 4 and pooled.latency["p50"] == 25.0
    unknown = pool([runs[0], make_arm("ft", exactly(1, 3))])
    assert [getattr(unknown, key) for key in keys] == [None] * 4
