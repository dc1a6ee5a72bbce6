"""The supervised warm start: what a question is told apart from, and that it learns to."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from rag2.evaluation.questions import load_questions
from rag2.index.flat import Flat
from rag2.kb.lexical import BM25
from rag2.registry import UserError
from rag2.retrieval import gold_chunks
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import batches, checkpoint
from rag2.training.pairs import Questions
from rag2.training.watch import Watch
from rag2.types import Chunk, Question
from small_runs import Load, log, settings, start
from small_world import SHAPE

COLOURS = ("red", "blue", "green", "grey")


def corpus(towns: int) -> list[Chunk]:
    """Two chunks of each town's page tell its colour, one does not; ids are no row numbers."""
    pages = [
        [f"{town} is {colour}.", f"The gate of {town} is {colour}.", f"{town} has a gate."]
        for number in range(towns)
        for town, colour in [(f"town{number}", COLOURS[number % 4])]
    ]
    texts = [(f"page{n}", text) for n, page in enumerate(pages) for text in page]
    return [Chunk(3 * i + 5, document, text) for i, (document, text) in enumerate(texts)]


def asked(towns: int) -> list[Question]:
    """Two questions on every town."""
    return [
        Question(f"{words} {n}", f"{words} town{n}?", COLOURS, n % 4, evidence=(f"page{n}",))
        for n in range(towns)
        for words in ("Which colour has", "What paint covers the gate of")
    ]


def untrained(seed: int, tokenizer: PreTrainedTokenizerBase) -> DualEncoder:
    """The encoder that a warm start with this seed begins with."""
    checkpoint.seed_everything(seed)
    return DualEncoder.build(EncoderConfig(**SHAPE), tokenizer)


def test_the_first_loss_of_a_run_is_that_of_equation_two_by_hand(
    recipe: Load,
    home: Path,
    tmp_path: Path,
    chunks: list[Chunk],
    tokenizer: PreTrainedTokenizerBase,
):
    pairs = {"name": "questions", "negatives": 2}
    start(recipe, "retriever", home, tmp_path / "out", pairs=pairs, steps=1)
    questions = load_questions(home / "data" / "questions.jsonl")
    questions = [question for question in questions if question.split == "train"]
    size, seed = settings("retriever", home)["batch_size"], settings("retriever", home)["seed"]
    batch = [questions[row] for row in batches.sample(len(questions), size, seed, 0)]
    every, bm25 = gold_chunks(batch, chunks), BM25(chunks)
    assert all(len(every[question.id]) == 1 for question in batch)
    gold = [every[question.id][0] for question in batch]
    passages = gold.copy()
    for question, own in zip(batch, gold, strict=True):
        found = bm25.search([question.question], 9)[1][0].tolist()
        passages += [chunk for chunk in found if chunk != own][:2]
    assert len(passages) == 3 * size

    encoder = untrained(seed, tokenizer)
    text = {chunk.id: chunk.passage for chunk in chunks}
    losses = []
    for question, own in zip(batch, gold, strict=True):
        query_D = encoder.encode_questions([question.question])[0]
        wrong = [chunk for chunk in passages if chunk != own]
        chunks_ND = encoder.encode_chunks([text[chunk] for chunk in [own, *wrong]])
        scores = (encoder.scale * chunks_ND @ query_D).tolist()
        losses.append(-math.log(math.exp(scores[0]) / sum(map(math.exp, scores))))
    assert log(tmp_path / "out")[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_chunk_that_answers_a_question_is_never_a_negative_of_it():
    chunks, questions = corpus(12), asked(12)
    gold = gold_chunks(questions, chunks)
    assert {len(ids) for ids in gold.values()} == {2}
    by_text = {chunk.passage: chunk.id for chunk in chunks}
    by_question = {question.question: question.id for question in questions}
    bm25 = BM25(chunks)
    shared = 0
    draw = Questions(negatives=3).prepare(chunks, questions, 8, seed=1)
    for step in range(6):
        batch = draw(step)
        ids_N = [by_text[passage] for passage in batch.passages]
        assert len(batch.queries) == 8 and len(ids_N) == 8 * 4
        gold_BG, chunk_N = (ids.tolist() for ids in batch.groups)
        assert chunk_N == ids_N and not batch.symmetric
        for b, query in enumerate(batch.queries):
            own = gold[by_question[query]]
            assert ids_N[b] in own  # the positive
            # What counts as a negative is everything but the question's own gold chunks.
            assert gold_BG[b] == own
            shared += sum(chunk in own for chunk in ids_N) - 1
            hard = ids_N[8 + 3 * b : 8 + 3 * (b + 1)]
            found = bm25.search([query], 5)[1][0].tolist()
            assert hard == [chunk for chunk in found if chunk not in own][:3]
            assert set(found[:3]) & set(own)  # by words alone one would have been taken
    assert shared > 0


def test_a_batch_depends_on_seed_and_step_alone_and_every_gold_chunk_has_its_turn():
    chunks, questions = corpus(5), asked(5)
    draw = Questions().prepare(chunks, questions, 5, seed=4)
    again = Questions().prepare(chunks, questions, 5, seed=4)
    ahead = again(7)
    assert (draw(7).queries, draw(7).passages) == (ahead.queries, ahead.passages)
    other = Questions().prepare(chunks, questions, 5, seed=5)(7)
    assert (other.queries, other.passages) != (ahead.queries, ahead.passages)
    positives = {passage for step in range(20) for passage in draw(step).passages[:5]}
    assert positives == {chunk.passage for chunk in chunks if "has a gate" not in chunk.text}


def test_a_short_supervised_warm_start_finds_more_than_the_untrained_encoder(
    recipe: Load,
    home: Path,
    tmp_path: Path,
    chunks: list[Chunk],
    tokenizer: PreTrainedTokenizerBase,
):
    changes = {"pairs": "questions", "steps": 12, "batch_size": 32, "lr": 1e-3}
    trained = start(recipe, "retriever", home, tmp_path / "out", validate_every=12, **changes)
    watch = Watch(load_questions(home / "data" / "questions.jsonl"), chunks)
    recall_at_5 = recipe("train/retriever.py").recall_at_5
    before = recall_at_5(untrained(3, tokenizer), chunks, watch)
    assert trained["recall_at_5"] > before + 0.1
    best = DualEncoder.load(tmp_path / "out" / "final" / "retriever")
    assert recall_at_5(best, chunks, watch) == trained["recall_at_5"]


def test_validation_counts_the_same_where_faiss_is_not_installed(
    recipe: Load,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunks: list[Chunk],
    tokenizer: PreTrainedTokenizerBase,
):
    watch = Watch(load_questions(home / "data" / "questions.jsonl"), chunks)
    encoder = untrained(3, tokenizer)
    embeddings_ND = embed_corpus(encoder, [chunk.passage for chunk in chunks])
    index = Flat().build(embeddings_ND, np.array([chunk.id for chunk in chunks]))
    counted = watch.recall_at_5(encoder, lambda queries_BD, k: index.search(queries_BD, k)[1])
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    assert recipe("train/retriever.py").recall_at_5(encoder, chunks, watch) == counted > 0


def test_questions_without_evidence_are_left_out_and_counted(caplog: pytest.LogCaptureFixture):
    chunks, questions = corpus(4), asked(4)
    lost = [
        Question("a", "Who?", COLOURS, 0, "train"),
        Question("b", "Where?", COLOURS, 0, "train", evidence=("nowhere",)),
        Question("c", "When?", COLOURS, 0, "train", gold_chunk=4),  # of another corpus
    ]
    draw = Questions().prepare(chunks, questions + lost, 8, seed=0)
    assert "3 training questions name no evidence: left out" in caplog.text
    seen = {query for step in range(10) for query in draw(step).queries}
    assert seen == {question.question for question in questions}
    with pytest.raises(UserError, match="no training question names a gold_chunk or evidence"):
        Questions().prepare(chunks, lost, 8, seed=0)


def test_more_negatives_than_the_corpus_has_are_refused():
    chunks, questions = corpus(2), asked(2)
    batch = Questions(negatives=4).prepare(chunks, questions, 2, seed=0)(0)
    assert len(batch.passages) == 2 * 5
    with pytest.raises(UserError, match=r"pairs.negatives=5: the corpus has 6 chunks.* up to 2 of"):
        Questions(negatives=5).prepare(chunks, questions, 2, seed=0)
    alone = Questions(negatives=0).prepare(chunks, questions, 2, seed=0)(0)
    assert len(alone.passages) == 2


def test_the_first_chunk_of_the_corpus_is_a_negative_of_questions_with_fewer_gold_chunks():
    """Their ids are padded, and no chunk's id may be what they are padded with."""
    chunks = [Chunk(i, f"d{i}", f"text {i}") for i in range(4)]
    questions = [
        Question("one", "Which?", COLOURS, 0, "train", evidence=("d3",)),
        Question("two", "Who?", COLOURS, 0, "train", evidence=("d1", "d2")),
    ]
    draw = Questions(negatives=0).prepare(chunks, questions, 2, seed=0)
    gold_BG, _ = draw(0).groups
    assert sorted(sorted(set(ids) & set(range(4))) for ids in gold_BG.tolist()) == [[1, 2], [3]]
