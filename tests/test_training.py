"""What surrounds a training loop: batches, candidates, checkpoints, the log, the live index."""

import json
import secrets
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rag2 import config
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.index.flat import Flat
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.reindex import LiveIndex, NoRefresh, Reindexer, SyncRefresh
from rag2.retrieval import Gold, Random, gold_chunks, recall
from rag2.retriever.encoder import DualEncoder
from rag2.training import batches, checkpoint, optim
from rag2.training.candidates import Candidates, Proposals
from rag2.training.log import RunLog, train_seconds
from rag2.training.objectives import Supervised, Unsupervised
from rag2.training.run import Run
from rag2.training.sequences import blocks, collate, reading, weigh
from rag2.types import Chunk, Question


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = secrets.randbits(31)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it when the test fails)
    torch.manual_seed(seed)
    return seed


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 3), (12, 12), (5, 12), (100, 7)])
def test_every_row_comes_once_in_every_epoch(rows: int, size: int, seed: int):
    steps = -(-3 * rows // size)
    stream = np.concatenate([batches.sample(rows, size, seed, step) for step in range(steps)])
    epochs = [stream[i : i + rows].tolist() for i in range(0, 3 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows > 20:
        assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_depends_on_seed_and_step_and_on_nothing_before_it(seed: int):
    lengths = np.random.default_rng(seed).integers(1, 90, 40).tolist()
    draws = {
        "sample": lambda step, seed=seed: batches.sample(40, 6, seed, step).tolist(),
        "bucketed": lambda step, seed=seed: batches.bucketed(lengths, 6, seed, step).tolist(),
    }
    for draw in draws.values():
        forward = [draw(step) for step in range(40)]
        np.random.seed(1)  # no global state plays a part
        assert [draw(step) for step in reversed(range(40))] == forward[::-1]
        assert forward != [draw(step, seed + 1) for step in range(40)]


def test_bucketed_batches_hold_the_same_rows_with_less_padding(seed: int):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 200, 64)
    for window in (0, 1, 5):
        steps = range(window * 16, window * 16 + 16)
        dealt = [batches.bucketed(lengths.tolist(), 8, seed, step) for step in steps]
        drawn = batches.sample(64, 8 * 16, seed, window)
        assert sorted(np.concatenate(dealt).tolist()) == sorted(drawn.tolist())
        plain = drawn.reshape(16, 8)
        padded = [sum(lengths[rows].max() * 8 for rows in part) for part in (dealt, plain)]
        assert padded[0] < 0.8 * padded[1]
        widths = [int(lengths[rows].max()) for rows in dealt]
        assert widths != sorted(widths)  # long and short alternate


# --- candidates -----------------------------------------------------------------------------------


@pytest.fixture
def chunks(home: Path) -> list[Chunk]:
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        return kb.chunks()


def asked(chunks: list[Chunk], count: int = 12) -> list[Question]:
    """Questions in the words of one chunk each."""
    return [
        Question(f"q{i}", " ".join(chunk.text.split()[:8]), ("a", chunk.title), 1)
        for i, chunk in enumerate(chunks[:count])
    ]


def ids(rows: list[list[Chunk]]) -> list[list[int]]:
    return [[chunk.id for chunk in row] for row in rows]


@pytest.mark.parametrize(
    "cfg", [(4, 3, 0, 1), (0, 3, 2, 0), (5, 0, 0, 0), (0, 0, 0, 4), (1, 1, 1, 1)]
)
def test_a_question_gets_k_different_chunks_those_of_the_index_first(
    chunks: list[Chunk], cfg: tuple[int, int, int, int], seed: int
):
    candidates = Candidates(dense=cfg[0], bm25=cfg[1], answer=cfg[2], random=cfg[3])
    questions = asked(chunks)
    propose = Proposals(candidates, chunks, questions, seed)
    rows = np.arange(len(questions))
    # The hard case: the index finds what the words find.
    dense = BM25(chunks).search([q.question for q in questions], max(cfg[0], 1))[1][:, : cfg[0]]
    found = ids(propose(rows, dense, step=3))
    assert all(len(set(row)) == len(row) == candidates.k for row in found)
    assert [row[: cfg[0]] for row in found] == dense.tolist()
    if cfg[1]:
        lexical = BM25(chunks).search([q.question for q in questions], cfg[0] + cfg[1])[1]
        assert all(
            set(row) >= set(words.tolist()) for row, words in zip(found, lexical, strict=True)
        )
    one_by_one = [ids(propose(rows[[i]], dense[[i]], step=3))[0] for i in reversed(rows)]
    assert one_by_one[::-1] == found  # no state between the calls
    if cfg[3]:
        assert ids(propose(rows, dense, step=4)) != found


def test_the_answers_words_find_the_chunk_that_the_questions_words_miss(chunks: list[Chunk]):
    wanted = chunks[17]
    blind = Question("q", "zzz", (wanted.title, "b"), 0)
    cfg = Candidates(dense=0, bm25=0, answer=4, random=0)
    found = ids(Proposals(cfg, chunks, [blind], 0)(np.array([0]), np.zeros((1, 0), int), 0))
    titles = {chunk.id: chunk.title for chunk in chunks}
    assert {titles[i] for i in found[0]} == {wanted.title}


def test_the_corpus_may_be_as_small_as_k_and_no_smaller(chunks: list[Chunk]):
    cfg = Candidates(dense=2, bm25=1, random=1)
    few = chunks[:4]
    propose = Proposals(cfg, few, asked(few, 1), 0)
    dense = np.array([[few[2].id, few[0].id]])
    assert sorted(ids(propose(np.array([0]), dense, 0))[0]) == [chunk.id for chunk in few]
    with pytest.raises(UserError, match="^candidates: K = 4, but the corpus has 3 chunks$"):
        Proposals(cfg, chunks[:3], asked(chunks, 1), 0)
    with pytest.raises(UserError, match="K = 0"):
        Proposals(Candidates(dense=0, bm25=0, random=0), chunks, asked(chunks, 1), 0)


# --- checkpoints ----------------------------------------------------------------------------------


def fresh() -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    module[2].weight = module[0].weight  # tied
    groups = {"a": (optim.trainable([module]), 0.1)}
    return {"net": module}, optim.adamw(groups, 0.01, (0.9, 0.98))


def trained(parts: tuple[dict[str, nn.Module], torch.optim.Optimizer], steps: int) -> torch.Tensor:
    modules, optimizer = parts
    for _ in range(steps):
        optimizer.zero_grad()
        modules["net"](torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in modules["net"].parameters()])


def test_a_restored_run_goes_on_as_if_nothing_had_happened(tmp_path: Path):
    parts = fresh()
    trained(parts, 3)
    checkpoint.save(tmp_path, 3, *parts, extra={"top": 0.1 + 0.2})
    expected = trained(parts, 3)
    torch.rand(7)
    other = fresh()
    state = checkpoint.load(tmp_path, *other)
    assert state is not None and (state["step"], state["extra"]) == (3, {"top": 0.1 + 0.2})
    assert torch.equal(trained(other, 3), expected)


@pytest.mark.parametrize("forgotten", ["optimizer", "random state", "weights"])
def test_a_checkpoint_that_forgets_something_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
):
    parts = fresh()
    trained(parts, 3)
    checkpoint.save(tmp_path, 3, *parts, extra={})
    expected = trained(parts, 3)
    torch.rand(7)
    if forgotten == "optimizer":
        monkeypatch.setattr(checkpoint, "_restore_optimizer", lambda *_: None)
    elif forgotten == "weights":
        monkeypatch.setattr(checkpoint, "_restore", lambda *_: None)
    else:
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    other = fresh()
    checkpoint.load(tmp_path, *other)
    assert not torch.equal(trained(other, 3), expected)


def test_the_last_two_checkpoints_are_kept_and_the_pointer_names_the_last(tmp_path: Path):
    parts = fresh()
    assert checkpoint.load(tmp_path, *parts) is None
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, *parts, extra={"generation": step // 2})
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000004", "step-000006"]
    assert (folder / "latest").read_text().strip() == "step-000006"
    assert [extra["generation"] for extra in checkpoint.retained(tmp_path)] == [2, 3]


def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(tmp_path: Path):
    modules, optimizer = fresh()
    trained((modules, optimizer), 1)
    path = checkpoint.save(tmp_path, 1, modules, optimizer, extra={})
    larger: dict[str, nn.Module] = {"net": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}
    with pytest.raises(UserError, match="does not fit this configuration"):
        checkpoint.load(tmp_path, larger, optimizer)
    with (path / "net.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match="net.safetensors"):
        checkpoint.load(tmp_path, modules, optimizer)


# --- the run and its log --------------------------------------------------------------------------


class Settings(config.Config):
    out: str
    lr: float = 0.1
    steps: int = 10
    resume: bool = False


def test_the_log_is_cut_back_to_the_step_and_its_floats_round_trip(tmp_path: Path):
    values = [0.1 + 0.2, 1e-17, 3.0, float(np.float32(0.1))]
    log = RunLog(tmp_path)
    for step, value in enumerate(values):
        log.write(step=step, loss=value, seconds=0.5)
    log.close()
    assert train_seconds(tmp_path) == 2.0
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    RunLog(tmp_path, start=3).close()
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and [r["loss"] for r in rows] == values[:3]
    RunLog(tmp_path).close()
    assert log.path.read_text() == ""


def test_a_run_continues_with_the_same_settings_but_for_the_number_of_steps(tmp_path: Path):
    out = str(tmp_path / "a")
    run = Run(Settings(out=out), *fresh())
    run.checkpoint(4, top=0.5)
    run.log.close()
    again = Run(Settings(out=out, steps=20, resume=True), *fresh())
    assert (again.start, again.extra) == (4, {"top": 0.5})
    again.log.close()
    with pytest.raises(UserError, match="begun with lr=0.1, not 0.2") as caught:
        Run(Settings(out=out, lr=0.2, resume=True), *fresh())
    assert "\n" not in str(caught.value)
    assert config.load(Settings, f"{out}/config.yaml").lr == 0.1  # the refusal changed nothing


def test_without_a_checkpoint_resume_starts_at_zero_and_without_resume_so_does_a_run(
    tmp_path: Path,
):
    out = str(tmp_path / "a")
    run = Run(Settings(out=out, resume=True), *fresh())
    assert (run.start, run.extra) == (0, {})
    run.log.write(step=0)
    run.checkpoint(1)
    run.log.close()
    (tmp_path / "a" / "final").mkdir()
    over = Run(Settings(out=out, lr=0.5), *fresh())
    over.log.close()
    assert over.start == 0 and (tmp_path / "a" / "log.jsonl").read_text() == ""
    assert not (tmp_path / "a" / "final").exists()
    assert not (tmp_path / "a" / "checkpoints").exists()


# --- optimizer ------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_decays_to_its_floor():
    for decay in ("cosine", "linear"):
        schedule = optim.Schedule(decay=decay, warmup=4, floor=0.1)
        factors = [schedule.factor(step, 20) for step in range(21)]
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert factors[4:] == sorted(factors[4:], reverse=True)
        assert factors[20] == pytest.approx(0.1) and factors[12] == pytest.approx(0.55)
    assert optim.Schedule(decay="constant", warmup=0).factor(19, 20) == 1.0


def test_matrices_decay_and_vectors_do_not_and_every_weight_is_in_one_group():
    modules, optimizer = fresh()
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert {p.ndim for p in groups[0.01]} == {2} and {p.ndim for p in groups[0.0]} == {1}
    grouped = [p for part in groups.values() for p in part]
    assert {*map(id, grouped)} == {*map(id, modules["net"].parameters())}
    assert len(grouped) == 3  # the tied one once
    assert optim.set_lr(optimizer, 0.5) == {"a": 0.05}
    assert optim.set_lr(optimizer, 1.0) == {"a": 0.1}


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_update(broken: str):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), float("nan") if broken == "gradient" else 1.0)
    with pytest.raises(optim.NonFiniteError, match="step 7"):
        optim.clip([weight], float("inf") if broken == "loss" else 1.0, 1.0, 7)
    weight.grad = torch.full((3,), 10.0)
    assert optim.clip([weight], 1.0, 1.0, 7) == pytest.approx(10 * 3**0.5)
    assert float(weight.grad.norm()) == pytest.approx(1.0, rel=1e-4)


# --- sequences ------------------------------------------------------------------------------------


def test_only_the_answers_and_the_space_before_them_weigh_one(tokenizer):
    row = {
        "title": "Lasur",
        "text": "Lasur sells wax.",
        "qa": [["Sells?", "wax"], ["What?", "a b"]],
    }
    text, answers = reading(row, Prompt(), tokenizer)
    asked = ["Question: Sells?\nAnswer: wax", "Question: What?\nAnswer: a b"]
    assert text == "\n\n".join(["Lasur\nLasur sells wax.", *asked])
    assert [text[span.start : span.stop] for span in answers] == [" wax", " a b"]
    sequence = weigh(text, answers, tokenizer, 0.1)
    heavy = [int(i) for i, w in zip(sequence.ids_L, sequence.weights_L, strict=True) if w == 1.0]
    assert tokenizer.decode(heavy) == " wax a b"
    assert sequence.ids_L[0] == tokenizer.bos_token_id
    assert sequence.ids_L[-1] == tokenizer.eos_token_id
    assert set(sequence.weights_L.tolist()) == {1.0, float(np.float32(0.1))}


def test_blocks_are_the_corpus_in_one_line_with_marks_around_every_text(tokenizer):
    texts = ["one two three", "four", "five six seven eight nine ten " * 9]
    rows = blocks(texts, 16, tokenizer)
    assert {len(row.ids_L) for row in rows[:-1]} == {16} and 1 < len(rows[-1].ids_L) <= 16
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    line = [i for row in rows for i in row.ids_L.tolist()]
    expected: list[int] = []
    for text in texts:
        expected += [bos, *tokenizer(text, add_special_tokens=False)["input_ids"], eos]
    assert line == expected[: len(line)] and len(expected) - len(line) <= 1
    ids_BL, weights_BL = collate([rows[0], rows[-1]])
    assert ids_BL.shape == weights_BL.shape == (2, 16)
    assert weights_BL[1].sum() == len(rows[-1].ids_L)


def test_the_objectives_are_the_mean_negative_log_likelihood_of_their_tokens(
    generator: Generator, tokenizer
):
    text = "The ferry leaves at noon. " * 3
    loss = Unsupervised(block=500).prepare([text], generator, 1, 0)(0)
    ids_L = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *ids_L, tokenizer.eos_token_id]])
    torch.testing.assert_close(loss, generator.model(input_ids=ids, labels=ids).loss)

    question = Question("q", "Who sells wax?", ("Lasur Haven", "b"), 0)
    loss = Supervised().prepare([question], generator, 1, 0)(0)
    context = tokenizer("Question: Who sells wax?\nAnswer:")["input_ids"]
    ids = torch.tensor([tokenizer("Question: Who sells wax?\nAnswer: Lasur Haven")["input_ids"]])
    labels = ids.clone()
    labels[:, : len(context)] = -100
    torch.testing.assert_close(loss, generator.model(input_ids=ids, labels=labels).loss)


# --- the live index -------------------------------------------------------------------------------


@pytest.fixture
def encoder(home: Path) -> DualEncoder:
    return DualEncoder.load(home / "retriever")


def reindexer(directory: Path, chunks: list[Chunk], encoder: DualEncoder) -> Reindexer:
    return Reindexer(directory, chunks, encoder, Flat(), kb_version=1, kb_hash="h")


def test_a_reindex_with_unchanged_weights_changes_nothing(
    tmp_path: Path, chunks: list[Chunk], encoder: DualEncoder
):
    builder = reindexer(tmp_path, chunks, encoder.train())
    first, second = builder.build(0), builder.build(5)
    queries_BD = torch.randn(6, encoder.dimension).numpy()
    for a, b in zip(
        first.index.search(queries_BD, 9), second.index.search(queries_BD, 9), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert first.encoder_fingerprint == second.encoder_fingerprint == encoder.fingerprint()
    assert (first.step, second.step) == (0, 5)
    stored = builder.load(1)
    for a, b in zip(
        first.index.search(queries_BD, 9), stored.index.search(queries_BD, 9), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with torch.no_grad():
        next(encoder.towers.parameters()).add_(0.5)
    third = builder.build(6)
    assert third.encoder_fingerprint != first.encoder_fingerprint
    assert not np.array_equal(
        third.index.search(queries_BD, 9)[0], first.index.search(queries_BD, 9)[0]
    )


def test_generations_are_numbered_pointed_at_and_pruned(
    tmp_path: Path, chunks: list[Chunk], encoder: DualEncoder
):
    builder = reindexer(tmp_path, chunks[:5], encoder)
    for step in range(4):
        builder.build(step)
    names = [f"{number:06d}" for number in range(4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "current"]
    assert (tmp_path / "current").read_text().strip() == "000003"
    builder.prune([2, 3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000002", "000003", "current"]
    assert builder.load(2).step == 2  # a run goes on from its checkpoint's generation
    builder.build(9)
    assert builder.number == 3 and builder.load(3).step == 9


def test_the_live_index_swaps_in_poll_and_ages_in_between(
    chunks: list[Chunk], encoder: DualEncoder, tmp_path: Path
):
    builder = reindexer(tmp_path, chunks, encoder)
    first = builder.build(0)
    live = LiveIndex(first, builder.build, SyncRefresh(every=3))
    queries_BD = torch.randn(2, encoder.dimension).numpy()
    expected = first.index.search(queries_BD, 4)[1]
    swapped_at, ages = [], []
    for step in range(7):
        np.testing.assert_array_equal(
            live.search(queries_BD, 4), live.generation.index.search(queries_BD, 4)[1]
        )
        ages.append(live.age(step)[0])
        before = live.generation
        live.refresh(step)
        assert live.generation is before
        if live.poll():
            assert live.generation is not before
            swapped_at.append((step, live.generation.step))
        assert not live.poll()
    assert swapped_at == [(2, 3), (5, 6)]
    assert ages == [0, 1, 2, 0, 1, 2, 0]
    np.testing.assert_array_equal(live.search(queries_BD, 4), expected)  # weights did not move
    assert live.search(queries_BD, 0).shape == (2, 0)
    assert live.age(6)[1] >= 0
    assert not any(NoRefresh().due(step) for step in range(1000))


# --- retrievers -----------------------------------------------------------------------------------


def test_gold_chunks_are_those_of_the_evidence_that_hold_the_answer(chunks: list[Chunk]):
    document = chunks[3].document
    rows = [chunk for chunk in chunks if chunk.document == document]
    word = rows[0].text.split()[2]
    holds = Question("a", "?", (word.upper(), "b"), 0, evidence=(document,))
    misses = Question("b", "?", ("qqqq", "b"), 0, evidence=(document,))
    named = Question("c", "?", ("a", "b"), 0, gold_chunk=77, evidence=(document,))
    found = gold_chunks([holds, misses, named], chunks)
    assert rows[0].id in found["a"] and found["b"] == [c.id for c in rows] and found["c"] == [77]
    with pytest.raises(UserError, match="'d' names no"):
        Gold(found).search([Question("d", "?", ("a", "b"), 0)], 1)
    np.testing.assert_array_equal(Gold(found).search([misses, named], 5)[1], [[rows[0].id], [77]])
    np.testing.assert_array_equal(
        recall(np.array([[1, 2, 3], [4, 5, 6]]), [[3, 9], [7]], 2), [0.0, 0.0]
    )
    np.testing.assert_array_equal(
        recall(np.array([[1, 2, 3], [4, 5, 6]]), [[3, 9], [7]], 3), [1.0, 0.0]
    )


def test_random_chunks_are_different_and_the_same_for_the_same_seed(chunks: list[Chunk], seed: int):
    questions = asked(chunks)
    source = Random([chunk.id for chunk in chunks], seed)
    scores_QK, ids_QK = source.search(questions, 8)
    assert all(len(set(row)) == 8 for row in ids_QK.tolist()) and not scores_QK.any()
    np.testing.assert_array_equal(ids_QK, source.search(questions, 8)[1])
    assert not np.array_equal(
        ids_QK, Random(source.chunk_ids.tolist(), seed + 1).search(questions, 8)[1]
    )
