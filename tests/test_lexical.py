"""BM25: the scores of its definition, in a fixed order."""

import random
from collections import Counter

import numpy as np
import pytest

from rag2.kb.lexical import BM25, words
from rag2.registry import UserError
from rag2.types import Chunk
from texts import WORDS


def bm25_by_definition(chunks: list[Chunk], question: str) -> dict[int, float]:
    """Lucene's BM25 in double precision: sum of idf * tf / (tf + k1 (1 - b + b l / mean l))."""
    bags = {chunk.id: Counter(words(chunk.passage)) for chunk in chunks}
    mean = sum(bag.total() for bag in bags.values()) / len(bags)
    scores = dict.fromkeys(bags, 0.0)
    for word in words(question):
        df = sum(word in bag for bag in bags.values())
        idf = np.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
        for id, bag in bags.items():
            length = 1 - 0.75 + 0.75 * bag.total() / mean
            scores[id] += idf * bag[word] / (bag[word] + 1.5 * length)
    return scores


def random_chunks(dice: random.Random, count: int) -> list[Chunk]:
    ids = dice.sample(range(10 * count), count)
    return [
        Chunk(
            id, "d", " ".join(dice.choices(WORDS, k=dice.randrange(1, 12))), dice.choice(["", "t"])
        )
        for id in ids
    ]


def test_bm25_scores_are_those_of_the_definition_with_ties_by_chunk_id(dice):
    chunks = random_chunks(dice, 60)
    questions = [" ".join(dice.choices([*WORDS, "unknown"], k=4)) for _ in range(30)]
    for k in (1, 7, 60):
        scores_QK, ids_QK = BM25(chunks).search([*questions, "nothing here fits", ""], k)
        assert scores_QK.dtype == np.float32 and ids_QK.dtype == np.int64
        for question, scores, ids in zip(questions, scores_QK, ids_QK, strict=False):
            truth = bm25_by_definition(chunks, question)
            best = sorted(truth.values(), reverse=True)[:k]
            np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose([truth[id] for id in ids], scores, rtol=1e-5, atol=1e-6)
            order = list(zip(-scores, ids, strict=True))
            assert order == sorted(order) and len(set(ids.tolist())) == k
        lowest = sorted(chunk.id for chunk in chunks)[:k]
        assert ids_QK[-1].tolist() == ids_QK[-2].tolist() == lowest and not scores_QK[-2:].any()


def test_equal_chunks_come_in_the_order_of_their_ids_across_the_cut(dice):
    chunks = [Chunk(id, "d", WORDS[id % 2]) for id in dice.sample(range(1000), 300)]
    odd = sorted(chunk.id for chunk in chunks if chunk.id % 2)
    for k in (1, 20, len(odd)):
        assert BM25(chunks).search([WORDS[1]], k)[1].tolist() == [odd[:k]]


def test_bm25_does_not_depend_on_the_order_of_chunks_and_says_what_it_holds(dice):
    chunks = random_chunks(dice, 40)
    shuffled = dice.sample(chunks, 40)
    one, two = BM25(chunks), BM25(shuffled)
    assert one.digest == two.digest
    for left, right in zip(one.search(WORDS, 9), two.search(WORDS, 9), strict=True):
        np.testing.assert_array_equal(left, right)
    first = chunks[0]
    for other in (Chunk(10**6, "d", first.text, first.title), Chunk(first.id, "d", "else")):
        assert BM25([other, *chunks[1:]]).digest != one.digest


def test_bm25_refuses_more_chunks_than_there_are_and_a_corpus_without_words():
    bm25 = BM25([Chunk(3, "d", "rye"), Chunk(1, "d", "...")])
    assert bm25.search(["rye"], 2)[1].tolist() == [[3, 1]]
    assert bm25.search([], 2)[1].shape == (0, 2)
    for k in (0, 3):
        with pytest.raises(UserError, match="allowed: 1 to 2"):
            bm25.search(["rye"], k)
    for chunks in ([], [Chunk(1, "d", "?!")]):
        with pytest.raises(UserError, match="has a word"):
            BM25(chunks)


def test_words_are_lower_case_without_stop_words_and_without_stemming():
    assert words("When does The FERRY_2 leave?") == ["when", "does", "ferry_2", "leave"]
    assert words("cafe\u0301") == words("caf\u00e9") and words("to be or not to be")
