"""The contrastive loss: torch and Triton (in its interpreter without a GPU) against fp64.

Both are made to take the questions in parts, as they do where the scores are too many to store.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contrasts import DEVICE, lower_room, pairs, results, some_groups
from exactness import LAST, excess
from rag2_kernels import info_nce, reference

pytestmark = pytest.mark.usefixtures("seed")

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("impl", ["torch", "triton"])
ways = pytest.mark.parametrize("symmetric", [False, True])


def plain(queries_BD, chunks_ND, positive_B, scale, **settings):
    """What a user writes: products in the dtype of the vectors, the rest at least in fp32."""
    raw_BN = queries_BD @ chunks_ND.T
    itself_NN = torch.eye(len(chunks_ND), dtype=raw_BN.dtype, device=DEVICE)
    return reference.info_nce(raw_BN, itself_NN, positive_B, scale, **settings)


CASES = [
    pytest.param(False, False, id="one way"),
    pytest.param(True, True, id="symmetric with groups"),
    pytest.param(True, False, id="symmetric", marks=pytest.mark.slow),
    pytest.param(False, True, id="one way with groups", marks=pytest.mark.slow),
]


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric, grouped", CASES)
@pytest.mark.parametrize("questions, count, width", [(63, 127, 41), (1, 1, 7), (33, 64, 9)])
def test_loss_and_gradients_are_as_exact_as_plain_torch(
    impl, dtype, symmetric, grouped, questions, count, width, monkeypatch
):
    lower_room(monkeypatch, questions * count // 2)
    given = pairs(questions, count, width, dtype)
    settings = {
        "groups": some_groups(questions, count) if grouped else None,
        "symmetric": symmetric,
    }
    wide = [x.double() if x.is_floating_point() else x for x in given]
    truth = results(reference.info_nce, wide, **settings)
    rounded = results(plain, given, **settings)
    got = results(info_nce, given, **settings, impl=impl)
    assert [x.dtype for x in got] == [given[3].dtype, dtype, dtype, given[3].dtype]
    # The loss is as exact as its sums, the rest as the gradient at the scores, which is rounded to
    # the inputs' dtype; of a single number the luckier rounding decides.
    lasts = [LAST[got[0].dtype], *[LAST[dtype]] * 3]
    for a, b, true, last, times in zip(got, rounded, truth, lasts, (5, 2, 2, 5), strict=True):
        assert excess(a, b, true, last, times) <= 1


@both
@ways
def test_parts_of_the_questions_give_what_all_at_once_do(impl, symmetric, monkeypatch):
    given, groups = pairs(50, 70, 12), some_groups(50, 70)
    settings = {"groups": groups, "symmetric": symmetric, "impl": impl}
    lower_room(monkeypatch, 50 * 70)
    whole = results(info_nce, given, **settings)
    lower_room(monkeypatch, 20 * 70)  # 20, 20 and 10 questions
    for a, b in zip(results(info_nce, given, **settings), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@both
@ways
def test_the_gradient_is_that_of_differences_of_the_value(impl, symmetric, monkeypatch):
    lower_room(monkeypatch, 8)
    queries_BD, chunks_ND, _, scale = pairs(4, 6, 3)
    positive_B = torch.tensor([0, 1, 1, 4], device=DEVICE)
    groups = some_groups(4, 6)
    assert torch.autograd.gradcheck(
        lambda q, c, s: info_nce(
            q, c, positive_B, s, groups=groups, symmetric=symmetric, impl=impl
        ),
        [x.requires_grad_() for x in (queries_BD, chunks_ND, scale / 5)],
        fast_mode=True,
    )


@both
def test_twice_is_equal_to_the_bit_and_backward_may_run_twice(impl, monkeypatch):
    lower_room(monkeypatch, 1000)
    given, groups = pairs(40, 70, 9, torch.float32), some_groups(40, 70)
    settings = {"groups": groups, "symmetric": True, "impl": impl}
    first, second = (results(info_nce, given, **settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    leaf_BD = given[0].requires_grad_()
    loss = info_nce(*given, **settings)
    once, again = (torch.autograd.grad(loss, leaf_BD, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again) and torch.equal(once, first[1])


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_question_that_is_nearly_right_keeps_the_little_it_has_to_learn(impl, dtype, monkeypatch):
    lower_room(monkeypatch, 1000)
    chunks_ND = torch.eye(64, device=DEVICE, dtype=dtype)
    given = (chunks_ND[:32], chunks_ND, torch.arange(32, device=DEVICE))
    got = results(info_nce, (*given, torch.tensor(12.0, device=DEVICE)), symmetric=True, impl=impl)
    wide = [x.double() if x.is_floating_point() else x for x in given]
    truth = results(reference.info_nce, (*wide, torch.tensor(12.0).double()), symmetric=True)
    assert 0 < truth[0] < 1e-3  # rounded to half precision, p is 1 here
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b.to(DEVICE), rtol=0.02, atol=2e-7)


@both
def test_two_questions_at_either_end_of_the_scale_may_share_a_positive(impl, monkeypatch):
    lower_room(monkeypatch, 100)
    queries_BD, chunks_ND, positive_B, _ = pairs(5, 30, 6, torch.float32)
    queries_BD[0], queries_BD[1], positive_B[:2] = chunks_ND[7], -chunks_ND[7], 7
    given = (queries_BD, chunks_ND, positive_B, torch.tensor(100.0, device=DEVICE))
    wide = [x.double() if x.is_floating_point() else x for x in given]
    truth = results(reference.info_nce, wide, symmetric=True)
    for a, b in zip(results(info_nce, given, symmetric=True, impl=impl), truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """The most floating-point numbers that an operation gave while this was on."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            # The interpreter copies a tensor's bytes to and fro.
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.seen = max(self.seen, tensor.numel())
        return out


@both
@ways
def test_the_scores_of_all_pairs_are_never_there(impl, symmetric, monkeypatch):
    lower_room(monkeypatch, 1500)
    queries_BD, chunks_ND, positive_B, scale = pairs(80, 100, 4, torch.float32)
    settings = {"groups": some_groups(80, 100), "symmetric": symmetric, "impl": impl}
    given = (queries_BD, chunks_ND, positive_B, scale)
    for leaf in (queries_BD, chunks_ND, scale):
        leaf.requires_grad_()
    with Largest() as largest:
        loss = info_nce(*given, **settings)
        torch.autograd.grad(loss, (queries_BD, chunks_ND, scale))
    assert 400 <= largest.seen <= 1500
    with Largest() as planted:
        reference.info_nce(*given)
    assert planted.seen == 8000


@both
def test_autocast_and_mixed_dtypes_change_no_product(impl, monkeypatch):
    lower_room(monkeypatch, 500)
    given = pairs(30, 40, 16, torch.float32)
    outside = results(info_nce, given, symmetric=True, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = results(info_nce, given, symmetric=True, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    narrow_ND = given[1].bfloat16()
    mixed = results(info_nce, (given[0], narrow_ND, *given[2:]), symmetric=True, impl=impl)
    widened = (given[0], narrow_ND.float(), *given[2:])
    truth = results(info_nce, widened, symmetric=True, impl=impl)
    assert [x.dtype for x in mixed[1:3]] == [torch.float32, torch.bfloat16]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(mixed, truth, strict=True))
