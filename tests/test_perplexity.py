"""Perplexity: each token counted once, from the context that the definition gives it."""

import numpy as np
import pytest
import torch

from rag2.evaluation.perplexity import Perplexity, difference, perplexity, sliding
from rag2.generator.load import Generator
from rag2.registry import UserError
from small_world import roughen

TEXTS = ["The river spills over in January.", "A mule is carved above the gates, and a goat. " * 6]


@pytest.fixture
def rough(generator: Generator) -> Generator:
    """A random model whose tokens differ in how likely they are."""
    roughen(generator.model, 0.2)
    return generator


def naive(generator: Generator, text: str, window: int, stride: int) -> list[float]:
    """-log p of each token, one forward a token on the context that its window leaves it."""
    tokenizer = generator.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    nats = []
    for place in range(1, len(ids)):
        begin = 0
        while begin + window < place:  # the first window that reaches the token
            begin += stride
        with torch.no_grad():
            logits_V = generator.model(torch.tensor([ids[begin:place]])).logits[0, -1]
        nats.append(-float(logits_V.log_softmax(-1)[ids[place]]))
    return nats


@pytest.mark.parametrize(("window", "stride"), [(512, 256), (16, 8), (16, 16), (16, 1), (7, 3)])
def test_it_is_what_one_forward_a_token_gives(rough: Generator, window: int, stride: int):
    expected = [naive(rough, text, window, stride) for text in TEXTS]
    found = perplexity(rough, TEXTS, window, stride)
    assert found.tokens_Q.tolist() == [len(nats) for nats in expected]
    np.testing.assert_allclose(found.nats_Q, [sum(nats) for nats in expected], rtol=1e-5)
    assert found.words_Q.tolist() == [6, 60]


def test_batches_change_nothing(rough: Generator):
    one, many = (perplexity(rough, TEXTS * 3, 16, 8, batch_tokens=size) for size in (1, 4096))
    np.testing.assert_allclose(one.nats_Q, many.nats_Q, rtol=1e-5)


def test_windows_count_every_token_once_and_leave_each_its_context(dice):
    for _ in range(200):
        window = dice.randint(1, 9)
        stride = dice.randint(1, window)
        ids = list(range(dice.randint(1, 40)))
        pairs = sliding(ids, window, stride)
        assert [token for _, counted in pairs for token in counted] == ids[1:]
        for context, counted in pairs:
            assert [*context, *counted] == list(range(context[0], counted[-1] + 1))
            assert len(context) + len(counted) - 1 <= window
            assert context[0] == 0 or len(context) >= window - stride + 1


def test_long_texts_weigh_more_and_a_single_one_has_no_interval():
    found = Perplexity(np.array([10.0, 90.0]), np.array([10.0, 30.0]), np.array([5.0, 20.0]))
    assert (found.per_token, found.per_word) == (2.5, 4.0)
    assert found.perplexity == pytest.approx(np.exp(2.5))
    bounds = found.intervals()["per_token"]
    assert bounds == (1.0, 3.0)  # either text alone
    alone = Perplexity(found.nats_Q[:1], found.tokens_Q[:1], found.words_Q[:1])
    assert alone.intervals() == {"per_token": None, "per_word": None}


def test_a_difference_is_paired_and_needs_the_same_tokens():
    rng = np.random.default_rng(0)
    tokens_Q = np.full(50, 20.0)
    before = Perplexity(rng.uniform(20, 200, 50), tokens_Q, tokens_Q)
    after = Perplexity(before.nats_Q + 2.0, tokens_Q, tokens_Q)
    row = difference(after, before)
    # The texts differ much more than the two generators on one of them.
    assert row and row["difference"] == pytest.approx(0.1)
    assert row["ci95"] == pytest.approx((0.1, 0.1))
    assert difference(Perplexity(after.nats_Q, tokens_Q + 1, tokens_Q), before) is None


def test_what_cannot_be_measured_is_refused(rough: Generator):
    with pytest.raises(UserError, match="^window=513; allowed: 1 to the 512 positions"):
        perplexity(rough, TEXTS, window=513)
    with pytest.raises(UserError, match="^stride=9; allowed: 1 to window=8"):
        perplexity(rough, TEXTS, window=8, stride=9)
    with pytest.raises(UserError, match="^text 2 of 2 is empty"):
        perplexity(rough, ["A text.", " "])
