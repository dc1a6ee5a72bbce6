"""What the contrastive loss is, whichever way it is computed: values by hand, and what keeps it."""

import math

import pytest
import torch

from contrasts import DEVICE, lower_room, pairs, results, some_groups
from rag2_kernels import info_nce

pytestmark = pytest.mark.usefixtures("seed")

both = pytest.mark.parametrize("impl", ["torch", "triton"])
ways = pytest.mark.parametrize("symmetric", [False, True])


@both
@ways
@pytest.mark.parametrize("scores", [1, 1 << 24])
def test_it_is_the_cross_entropy_of_the_positive_in_one_direction_or_in_two(
    impl, symmetric, scores, monkeypatch
):
    lower_room(monkeypatch, scores)
    queries_BD, chunks_ND, _, scale = pairs(6, 6, 5)
    diagonal_B = torch.arange(6, device=DEVICE)
    got = info_nce(queries_BD, chunks_ND, diagonal_B, 20.0, symmetric=symmetric, impl=impl)
    scores_BN = scale * queries_BD @ chunks_ND.T
    expected = -scores_BN.log_softmax(1).diag().mean()
    if symmetric:
        expected = (expected - scores_BN.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(got, expected)


@both
@pytest.mark.parametrize("scores", [1, 1 << 24])
def test_a_chunk_of_a_question_s_group_is_no_negative_of_it_alone(impl, scores, monkeypatch):
    lower_room(monkeypatch, scores)
    queries_BD, chunks_ND, _, _ = pairs(3, 7, 6)
    positive_B = torch.tensor([0, 1, 2], device=DEVICE)
    question_BG = torch.tensor([[10, -1], [20, -1], [30, 40]], device=DEVICE)
    chunk_N = torch.tensor([10, 20, 30, 10, 40, 10, 20], device=DEVICE)
    kept = [[0, 1, 2, 4, 6], [1, 0, 2, 3, 4, 5], [2, 0, 1, 3, 5, 6]]
    scores_BN = 2.0 * queries_BD @ chunks_ND.T
    rows = [scores_BN[b, chunks].logsumexp(0) - scores_BN[b, b] for b, chunks in enumerate(kept)]
    given, groups = (queries_BD, chunks_ND, positive_B, 2.0), (question_BG, chunk_N)
    got = info_nce(*given, groups=groups, impl=impl)
    torch.testing.assert_close(got, torch.stack(rows).mean())
    # No question's positive is of another's group: in the other direction all three are rivals.
    columns = scores_BN[:, :3].logsumexp(0) - scores_BN.diag()
    got = info_nce(*given, groups=groups, symmetric=True, impl=impl)
    torch.testing.assert_close(got, (torch.stack(rows).mean() + columns.mean()) / 2)
    # Now the second question knows the first one's positive.
    question_BG[1, 1] = 10
    rows[1] = scores_BN[1, [1, 2, 4]].logsumexp(0) - scores_BN[1, 1]
    columns[0] = scores_BN[[0, 2], 0].logsumexp(0) - scores_BN[0, 0]
    got = info_nce(*given, groups=groups, symmetric=True, impl=impl)
    torch.testing.assert_close(got, (torch.stack(rows).mean() + columns.mean()) / 2)


@both
@ways
def test_one_chunk_costs_nothing_and_questions_with_one_positive_are_no_rivals(
    impl, symmetric, monkeypatch
):
    lower_room(monkeypatch, 1)
    given = (*pairs(5, 1, 4, torch.float32)[:3], torch.tensor(3.0, device=DEVICE))
    got = results(info_nce, given, symmetric=symmetric, impl=impl)
    assert all(float(x.abs().max()) == 0 for x in got)


@both
@ways
def test_a_question_whose_other_chunks_are_all_of_its_group_learns_nothing(
    impl, symmetric, monkeypatch
):
    lower_room(monkeypatch, 40)
    given = pairs(5, 20, 8, torch.float32)
    chunk_N = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    question_BG = torch.tensor([[0, -1], [-1, -1], [3, 0], [-1, 1], [0, 0]], device=DEVICE)
    settings = {"groups": (question_BG, chunk_N), "symmetric": symmetric, "impl": impl}
    _, dqueries_BD, dchunks_ND, dscale = results(info_nce, given, **settings)
    silent_B = torch.tensor([True, False, True, False, True], device=DEVICE)
    assert dchunks_ND.isfinite().all() and dscale.isfinite()
    assert (dqueries_BD[~silent_B].abs().sum(1) > 0).all()
    if not symmetric:  # in the other direction its positive still has other questions
        assert not dqueries_BD[silent_B].any()
    settings["groups"] = (torch.zeros_like(question_BG), chunk_N)
    assert all(float(x.abs().max()) == 0 for x in results(info_nce, given, **settings))


@both
@ways
def test_neither_the_order_of_the_chunks_nor_one_that_counts_for_nobody_matters(
    impl, symmetric, monkeypatch
):
    lower_room(monkeypatch, 200)
    queries_BD, chunks_ND, positive_B, scale = pairs(9, 40, 6)
    settings = {"symmetric": symmetric, "impl": impl}
    loss = info_nce(queries_BD, chunks_ND, positive_B, scale, **settings)
    order_N = torch.randperm(40, device=DEVICE)
    permuted = (queries_BD, chunks_ND[order_N], order_N.argsort()[positive_B], scale)
    torch.testing.assert_close(info_nce(*permuted, **settings), loss)

    longer_ND = torch.cat([chunks_ND, chunks_ND[:3]]).requires_grad_()
    ids_N = torch.arange(43, device=DEVICE).clamp_max(40)
    groups = torch.full((9, 1), 40, device=DEVICE), ids_N
    again = info_nce(queries_BD, longer_ND, positive_B, scale, groups=groups, **settings)
    torch.testing.assert_close(again, loss)
    assert not torch.autograd.grad(again, longer_ND)[0][40:].any()


@both
def test_all_chunks_said_twice_cost_log_two(impl, monkeypatch):
    lower_room(monkeypatch, 200)
    queries_BD, chunks_ND, positive_B, scale = pairs(9, 40, 6)
    once = info_nce(queries_BD, chunks_ND, positive_B, scale, impl=impl)
    twice = info_nce(queries_BD, chunks_ND.repeat(2, 1), positive_B, scale, impl=impl)
    torch.testing.assert_close(twice, once + math.log(2))


@both
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(impl, trained, monkeypatch):
    lower_room(monkeypatch, 300)
    given, groups = pairs(20, 30, 6), some_groups(20, 30)
    settings = {"groups": groups, "symmetric": True, "impl": impl}
    every = results(info_nce, given, **settings)[1:]
    queries_BD, chunks_ND, positive_B, scale = given
    for i in trained:
        (queries_BD, chunks_ND, scale)[i].requires_grad_()
    info_nce(queries_BD, chunks_ND, positive_B, scale, **settings).backward()
    for i, leaf in enumerate((queries_BD, chunks_ND, scale)):
        assert (leaf.grad is not None) == (i in trained)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, every[i], rtol=0, atol=1e-13)


def refused(
    message: str,
    queries: tuple[int, ...] = (2, 3),
    chunks: tuple[int, ...] = (4, 3),
    positive: tuple[int, ...] = (0, 1),
    scale: float | torch.Tensor = 1.0,
    groups: tuple[tuple[int, ...], int] | None = None,
) -> bool:
    """The loss of ones of these shapes is a ValueError with the message."""
    given = (torch.ones(queries), torch.ones(chunks), torch.tensor(positive), scale)
    ids = groups and (torch.zeros(groups[0]).long(), torch.zeros(groups[1]).long())
    with pytest.raises(ValueError, match=message):
        info_nce(*given, groups=ids)
    return True


def test_what_does_not_fit_together_is_refused_with_its_shapes():
    assert refused(r"\(2, 3\), \(4, 2\) and \(2,\)", chunks=(4, 2))
    assert refused(r"\(2, 3\), \(4, 3\) and \(1,\)", positive=(0,))
    assert refused(r"\(3,\), \(4, 3\) and \(2,\)", queries=(3,))
    assert refused("no questions", queries=(0, 3), positive=())
    assert refused("none of the 4", positive=(0, 4))
    assert refused("none of the 4", positive=(-1, 2))
    assert refused("scale=0.0 must be positive", scale=0.0)
    assert refused(r"scale must be a number, not \(1,\)", scale=torch.ones(1))
    assert refused(r"\[N\] of 2 questions and 4 chunks .* \(2,\) and \(4,\)", groups=((2,), 4))
    assert refused(r"not \(2, 1\) and \(3,\)", groups=((2, 1), 3))
