"""What a step is made of: batches, candidates, sequences, objectives."""

from collections import Counter

import numpy as np
import pytest
import torch

from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.lexical import BM25
from rag2.registry import UserError
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import batches
from rag2.training.candidates import NULL, Candidates, Proposals, rerank
from rag2.training.lessons import Given
from rag2.training.objectives import Supervised, Unsupervised
from rag2.training.sequences import blocks, collate, reading, weigh
from rag2.types import Chunk, Question
from small_world import SHAPE, asked, roughen

pytestmark = pytest.mark.usefixtures("seed")


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
        another = Proposals(candidates, chunks, questions, seed + 1)
        assert ids(another(rows, dense, step=3)) != found


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


def test_the_source_of_a_question_is_never_proposed(chunks: list[Chunk], seed: int):
    documents = list(dict.fromkeys(chunk.document for chunk in chunks))
    questions = [
        Question(
            f"q{number}", chunk.text[:60], (chunk.title, "b"), 0, metadata={"source": document}
        )
        for number, document in enumerate(documents[:12])
        for chunk in [next(chunk for chunk in chunks if chunk.document == document)]
    ]
    dense = BM25(chunks).search([q.question for q in questions], 12)[1]  # the source comes first
    document_of = {chunk.id: chunk.document for chunk in chunks}
    for remove in (False, True):
        cfg = Candidates(dense=3, bm25=2, random=2, remove_source=remove)
        propose = Proposals(cfg, chunks, questions, seed)
        longest = max(Counter(chunk.document for chunk in chunks)[d] for d in documents[:12])
        assert propose.depth == (3 + longest if remove else 3)
        found = ids(propose(np.arange(12), dense[:, : propose.depth], 0))
        assert all(len(set(row)) == 7 for row in found)
        hits = [
            question.metadata["source"] in {document_of[i] for i in row}
            for question, row in zip(questions, found, strict=True)
        ]
        assert not any(hits) if remove else all(hits)
    only = [chunk for chunk in chunks if chunk.document == documents[0]] + chunks[-2:]
    with pytest.raises(UserError, match="without a source there are fewer"):
        Proposals(Candidates(dense=3, bm25=0, random=0, remove_source=True), only, questions, 0)


def test_the_null_chunk_comes_last_and_says_nothing(chunks: list[Chunk]):
    cfg = Candidates(dense=2, bm25=0, random=1, null=True)
    dense = np.array([[chunks[5].id, chunks[3].id]])
    (row,) = Proposals(cfg, chunks, asked(chunks, 1), 0)(np.array([0]), dense, 0)
    assert len(row) == cfg.k == 4 and row[-1] == NULL and NULL.passage == ""


def test_what_the_index_found_is_ordered_anew_by_todays_encoder(
    chunks: list[Chunk], tokenizer, seed: int
):
    encoder = DualEncoder.build(EncoderConfig(**SHAPE), tokenizer)
    roughen(encoder.towers, 0.2)
    some = chunks[:30]
    queries = embed_corpus(encoder, ["a ship", "the mill", "who?"], side="question")
    scores = queries @ embed_corpus(encoder, [chunk.passage for chunk in some]).T
    found = np.random.default_rng(seed).permuted(np.tile(np.arange(30), (3, 1)), axis=1)[:, :12]
    stale = np.array([[some[place].id for place in row] for row in found])
    fresh = rerank(encoder, queries, stale, {chunk.id: chunk for chunk in some})
    for row in range(3):
        places = sorted(found[row], key=lambda place: (-scores[row, place], some[place].id))
        assert fresh[row].tolist() == [some[place].id for place in places]
    assert not np.array_equal(fresh, stale)
    with pytest.raises(ValueError, match=r"over=3 with dense=4; dense is 1 to over"):
        Candidates(over=3)


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
    (sequence,) = weigh([(text, answers)], tokenizer, 0.1)
    heavy = [int(i) for i, w in zip(sequence.ids_L, sequence.weights_L, strict=True) if w == 1.0]
    assert tokenizer.decode(heavy) == " wax a b"
    assert sequence.ids_L[0] == tokenizer.bos_token_id
    assert sequence.ids_L[-1] == tokenizer.eos_token_id
    assert set(sequence.weights_L.tolist()) == {1.0, float(np.float32(0.1))}


def test_a_passage_that_the_budget_has_no_room_for_is_refused_not_left_out(tokenizer):
    row = {"title": "Lasur", "text": "wax " * 30, "qa": [["Sells?", "wax"]]}
    with pytest.raises(UserError, match="prompt.budget=20: the passage 'Lasur' does not fit"):
        reading(row, Prompt(budget=20), tokenizer)


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
    given = Given(chunks=[Chunk(1, "d", text)])
    lessons = Unsupervised(block=500).prepare(given, generator, 0)
    loss = lessons.nll([0])
    ids_L = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *ids_L, tokenizer.eos_token_id]])
    torch.testing.assert_close(loss, generator.model(input_ids=ids, labels=ids).loss)
    assert lessons.tokens_N.tolist() == [ids.shape[1] - 1]

    question = Question("q", "Who sells wax?", ("Lasur Haven", "b"), 0)
    lessons = Supervised().prepare(Given([question]), generator, 0)
    loss = lessons.nll([0])
    context = tokenizer("Question: Who sells wax?\nAnswer:")["input_ids"]
    ids = torch.tensor([tokenizer("Question: Who sells wax?\nAnswer: Lasur Haven")["input_ids"]])
    labels = ids.clone()
    labels[:, : len(context)] = -100
    torch.testing.assert_close(loss, generator.model(input_ids=ids, labels=labels).loss)
    assert lessons.tokens_N.tolist() == [ids.shape[1] - len(context)]
