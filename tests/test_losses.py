"""Losses against their equations."""

import pytest
import torch

from rag2.losses.contrastive import info_nce, same_group
from rag2.losses.marginal import Marginal

pytestmark = pytest.mark.usefixtures("seed")


def answers(questions=3, chunks=5, tokens=4):
    scores = torch.randn(questions, chunks, requires_grad=True)
    logp = -torch.rand(questions, chunks, tokens) * 3
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (questions, 1, 1))
    return scores, logp.requires_grad_(), mask.expand(questions, chunks, tokens)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_with_one_chunk_the_marginal_is_the_cross_entropy_of_the_answer(level):
    scores, logp, mask = answers(chunks=1)
    loss, posterior = Marginal(level=level)(scores, logp, mask)
    torch.testing.assert_close(loss, -(logp * mask).sum(2)[:, 0])
    torch.testing.assert_close(posterior, torch.ones(3, 1))


def test_the_sequence_marginal_is_minus_log_of_the_summed_probability():
    scores, logp, mask = answers()
    loss, posterior = Marginal()(scores, logp, mask)
    prior = scores.softmax(1)
    joint = prior * (logp * mask).sum(2).exp()
    torch.testing.assert_close(loss, -joint.sum(1).log())
    torch.testing.assert_close(posterior, joint / joint.sum(1, keepdim=True))
    loss.sum().backward()
    torch.testing.assert_close(scores.grad, prior - posterior)
    torch.testing.assert_close(logp.grad, -posterior[:, :, None] * mask)


def test_both_levels_agree_on_answers_of_one_token():
    scores, logp, mask = answers(tokens=1)
    a, b = (Marginal(level=level)(scores, logp, mask)[0] for level in ("sequence", "token"))
    torch.testing.assert_close(a, b)


def test_info_nce_is_the_negative_log_softmax_at_the_positive():
    queries, chunks = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6)
    positive = torch.tensor([3, 0, 8, 3])
    loss = info_nce(queries, chunks, positive, 7.0)
    scores = 7.0 * queries @ chunks.T
    torch.testing.assert_close(loss, -scores.log_softmax(1)[range(4), positive].mean())
    loss.backward()
    onehot = torch.nn.functional.one_hot(positive, 9)
    torch.testing.assert_close(queries.grad, 7.0 / 4 * (scores.softmax(1) - onehot) @ chunks)


def test_info_nce_with_a_single_chunk_is_zero_and_its_scale_is_learnable():
    scale = torch.tensor(3.0, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.long)
    assert info_nce(torch.randn(2, 4), torch.randn(1, 4), zero, scale).abs() < 1e-6
    info_nce(torch.randn(2, 4), torch.randn(2, 4), torch.arange(2), scale).backward()
    assert scale.grad is not None and scale.grad.abs() > 0


def test_false_negatives_change_neither_the_loss_nor_the_gradient():
    queries, chunks = torch.randn(3, 6), torch.randn(7, 6, requires_grad=True)
    positive = torch.tensor([0, 1, 2])
    mask = same_group(torch.tensor([10, 20, 30]), torch.tensor([10, 20, 30, 10, 40, 10, 20]))
    loss = info_nce(queries, chunks, positive, 2.0, mask)
    kept = [[0, 1, 2, 4, 6], [1, 0, 2, 3, 4, 5], [2, 0, 1, 3, 4, 5, 6]]
    expected = [
        -(2.0 * queries[b] @ chunks[rows].T).log_softmax(0)[rows.index(int(positive[b]))]
        for b, rows in enumerate(kept)
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    assert chunks.grad is not None and chunks.grad.isfinite().all()


def test_the_symmetric_loss_is_the_mean_of_both_directions():
    queries, chunks = torch.randn(5, 6), torch.randn(5, 6)
    diagonal = torch.arange(5)
    both = info_nce(queries, chunks, diagonal, 4.0, symmetric=True)
    there = info_nce(queries, chunks, diagonal, 4.0)
    back = info_nce(chunks, queries, diagonal, 4.0)
    torch.testing.assert_close(both, (there + back) / 2)


def test_questions_with_the_same_positive_are_not_negatives_of_each_other():
    queries, chunks = torch.randn(2, 6), torch.randn(1, 6)
    positive = torch.zeros(2, dtype=torch.long)
    assert info_nce(queries, chunks, positive, 5.0, symmetric=True).abs() < 1e-6
