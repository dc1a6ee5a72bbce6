"""What training searches: the live index, and the gold and random controls."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.registry import UserError
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import NoRefresh, SyncRefresh
from rag2.reindex.store import Store
from rag2.retrieval import Dense, Gold, Random, gold_chunks, recall
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk, Question
from small_world import asked

pytestmark = pytest.mark.usefixtures("seed")


# --- the live index -------------------------------------------------------------------------------


def store(out: Path, chunks: list[Chunk], encoder: DualEncoder) -> Store:
    return Store(out, chunks, encoder, Flat(), kb_version=1, kb_hash="h")


def found(generation: Generation, queries_BD: np.ndarray, k: int = 9) -> list[np.ndarray]:
    return list(generation.index.search(queries_BD, k))


def test_a_reindex_with_unchanged_weights_changes_nothing(
    tmp_path: Path, chunks: list[Chunk], encoder: DualEncoder
):
    made = store(tmp_path, chunks, encoder.train())
    first, second = made.build(0, 0), made.build(1, 5)
    queries_BD = torch.randn(6, encoder.dimension).numpy()
    for a, b, c in zip(*(found(g, queries_BD) for g in (first, second, made.load(1))), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(b, c)
    assert first.encoder_fingerprint == second.encoder_fingerprint == encoder.fingerprint()
    assert (first.step, second.step) == (0, 5)
    with torch.no_grad():
        next(encoder.towers.parameters()).add_(0.5)
    third = made.build(2, 6)
    assert third.encoder_fingerprint != first.encoder_fingerprint
    assert not np.array_equal(found(third, queries_BD)[0], found(first, queries_BD)[0])


def test_generations_are_numbered_pointed_at_and_pruned(
    tmp_path: Path, chunks: list[Chunk], encoder: DualEncoder
):
    made = store(tmp_path, chunks[:5], encoder)
    folder = tmp_path / "generations"
    for number in range(4):
        made.build(number, 10 * number)
        made.publish(number)
    names = [f"{number:06d}" for number in range(4)]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "current"]
    assert (folder / "current").read_text().strip() == "000003"
    made.prune([2, 3])
    assert sorted(p.name for p in folder.iterdir()) == ["000002", "000003", "current"]
    assert made.load(2).step == 20  # a run goes on from its checkpoint's generation
    made.build(3, 9)
    assert made.load(3).step == 9


def test_the_live_index_swaps_in_poll_and_ages_in_between(
    chunks: list[Chunk], encoder: DualEncoder, tmp_path: Path
):
    live = LiveIndex(store(tmp_path, chunks, encoder), SyncRefresh(every=3))
    queries_BD = torch.randn(2, encoder.dimension).numpy()
    expected = live.search(queries_BD, 4)
    swapped_at, ages = [], []
    for step in range(7):
        np.testing.assert_array_equal(live.search(queries_BD, 4), expected)  # weights do not move
        ages.append(live.age(step)[0])
        before = live.generation
        live.refresh(step)
        assert live.generation is before
        if live.poll(step):
            assert live.generation is not before
            swapped_at.append((step, live.number, live.generation.step))
            assert live.stalled() > 0
        assert not live.poll(step)
    assert swapped_at == [(2, 1, 3), (5, 2, 6)]
    assert ages == [0, 1, 2, 0, 1, 2, 0]
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


def test_an_answer_inside_another_word_is_no_evidence():
    chunks = [Chunk(1, "d", "It is not so."), Chunk(2, "d", "The answer: no.")]
    asked = Question("q", "Is it so?", ("yes", "no"), 1, evidence=("d",))
    assert gold_chunks([asked], chunks) == {"q": [2]}


def test_what_dense_retrieval_scores_are_the_logits_of_training(
    tmp_path: Path, chunks: list[Chunk], encoder: DualEncoder
):
    with torch.no_grad():
        encoder.log_scale.fill_(2.5)
    made = store(tmp_path, chunks, encoder).build(0, 0)
    question = asked(chunks)[4]
    scores_QK, ids_QK = Dense(encoder, made).search([question], 5)
    found = [made.chunk(i).passage for i in ids_QK[0].tolist()]
    query_D = embed_corpus(encoder, [question.question], side="question")[0]
    cosines_K = embed_corpus(encoder, found) @ query_D
    np.testing.assert_allclose(scores_QK[0], np.exp(2.5) * cosines_K, rtol=1e-4)


def test_random_chunks_are_different_and_the_same_for_the_same_seed(chunks: list[Chunk], seed: int):
    questions = asked(chunks)
    source = Random([chunk.id for chunk in chunks], seed)
    scores_QK, ids_QK = source.search(questions, 8)
    assert all(len(set(row)) == 8 for row in ids_QK.tolist()) and not scores_QK.any()
    np.testing.assert_array_equal(ids_QK, source.search(questions, 8)[1])
    assert not np.array_equal(
        ids_QK, Random(source.chunk_ids.tolist(), seed + 1).search(questions, 8)[1]
    )


def test_every_question_gets_random_chunks_of_its_own_and_any_chunk_may_be_among_them(seed: int):
    source = Random(range(20), seed)
    _, ids_QK = source.search([Question(f"q{i}", "?") for i in range(200)], 3)
    counts = np.bincount(ids_QK.flatten(), minlength=20)
    assert len(set(map(tuple, ids_QK.tolist()))) > 150  # of 6,840 draws that there are
    assert counts.min() > 0 and counts.max() < 90, "each chunk is expected 30 times"
