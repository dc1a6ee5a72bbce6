"""Exact top-k without the scores of all rows, and pooling: torch and Triton against fp64."""

import pytest
import torch

from rag2_kernels import masked_mean_pool, mips_topk, reference, topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("seed")


def whole_numbers(rows, width):
    """Inner products of these are exact in any order, and many are equal."""
    return torch.randint(-2, 3, (rows, width), device=DEVICE).float()


def differing(dice, cases, impl, most):
    """The random cases in which rows or scores are not those of a full sort."""
    found = []
    for case in range(cases):
        queries, rows, width = dice.randint(1, 9), dice.randint(1, most), dice.randint(1, 40)
        k = dice.randint(1, 70)
        queries_BD, corpus_ND = whole_numbers(queries, width), whole_numbers(rows, width)
        if dice.random() < 0.3:
            corpus_ND[dice.randrange(rows) :] = corpus_ND[
                0
            ].clone()  # as many equal ones as there may be
        scores_BK, rows_BK = mips_topk(queries_BD, corpus_ND, k, impl=impl)
        wanted_BK, wanted = reference.mips_topk(queries_BD.double(), corpus_ND.double(), k)
        if not (torch.equal(rows_BK, wanted) and torch.equal(scores_BK.double(), wanted_BK)):
            found.append(f"case {case}: {queries} x {rows} x {width}, k={k}")
    return found


@pytest.mark.parametrize("scores", [1, 500, 1 << 24])
def test_torch_finds_the_same_rows_as_a_full_sort_ties_included(dice, scores, monkeypatch):
    monkeypatch.setattr(topk, "SCORES", scores)
    assert not differing(dice, 150, "torch", 300)


def test_triton_finds_the_same_rows_as_a_full_sort_ties_included(dice):
    assert not differing(dice, 25, "triton", 500)


@pytest.mark.slow
def test_triton_finds_the_same_rows_in_four_hundred_cases(dice):
    assert not differing(dice, 400, "triton", 700)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_ties_at_the_boundary_are_searched_in_full(impl):
    corpus_ND = torch.ones(600, 4, device=DEVICE)
    corpus_ND[::2] = 0  # 300 equal best rows in every group
    _, rows_BK = mips_topk(torch.ones(2, 4, device=DEVICE), corpus_ND, 5, impl=impl)
    assert rows_BK.tolist() == [[1, 3, 5, 7, 9]] * 2


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_rows_and_nothing_better_is_left_out(impl, dtype):
    queries_BD = torch.randn(6, 48, device=DEVICE).to(dtype)
    corpus_ND = torch.randn(400, 48, device=DEVICE).to(dtype)
    scores_BK, rows_BK = mips_topk(queries_BD, corpus_ND, 10, impl=impl)
    exact_BN = queries_BD.double() @ corpus_ND.double().T
    assert scores_BK.dtype == torch.float32
    torch.testing.assert_close(scores_BK.double(), exact_BN.gather(1, rows_BK), rtol=0, atol=1e-4)
    left_BN = exact_BN.scatter(1, rows_BK, -torch.inf)
    assert (left_BN.amax(1) <= scores_BK[:, -1] + 1e-4).all()
    assert (scores_BK.diff() <= 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_gradient_goes_to_the_chosen_rows_and_their_queries(impl):
    queries_BD = torch.randn(3, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    corpus_ND = torch.randn(50, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight_BK = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    got, wanted = (
        torch.autograd.grad((weight_BK * search[0]).sum(), (queries_BD, corpus_ND))
        for search in (
            mips_topk(queries_BD, corpus_ND, 4, impl=impl),
            reference.mips_topk(queries_BD, corpus_ND, 4),
        )
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_searches_that_make_no_sense_are_refused_and_short_corpora_give_fewer_columns():
    queries_BD, corpus_ND = torch.ones(2, 3), torch.ones(4, 3)
    assert mips_topk(queries_BD, corpus_ND, 9)[1].tolist() == [[0, 1, 2, 3]] * 2
    assert mips_topk(queries_BD[:0], corpus_ND, 2)[0].shape == (0, 2)
    with pytest.raises(ValueError, match="k=0"):
        mips_topk(queries_BD, corpus_ND, 0)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(4, 2\)"):
        mips_topk(queries_BD, corpus_ND[:, :2], 1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("texts, tokens, width", [(3, 33, 20), (2, 1, 1)])
def test_pooling_is_the_definition_in_value_and_gradient(impl, normalize, texts, tokens, width):
    hidden_BLH = torch.randn(texts, tokens, width, dtype=torch.float64, device=DEVICE)
    mask_BL = torch.rand(texts, tokens, device=DEVICE) < 0.7
    mask_BL[0], mask_BL[1, 0] = False, True  # a text without tokens
    weight_BH = torch.randn(texts, width, dtype=torch.float64, device=DEVICE)
    results = []
    for function in (
        lambda h: masked_mean_pool(h, mask_BL, normalize=normalize, impl=impl),
        lambda h: reference.masked_mean_pool(h, mask_BL, normalize),
    ):
        leaf_BLH = hidden_BLH.clone().requires_grad_()
        out_BH = function(leaf_BLH)
        results.append((out_BH, *torch.autograd.grad((weight_BH * out_BH).sum(), leaf_BLH)))
    for a, b in zip(*results, strict=True):
        # A text without tokens has no direction, and its gradient is no one's business.
        torch.testing.assert_close(a[1:], b[1:], rtol=0, atol=1e-12)
    assert not results[0][0][0].any() and not results[0][1][0].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_pooling_ignores_poisoned_padding_and_passes_gradcheck(impl):
    hidden_BLH = torch.randn(2, 5, 3, dtype=torch.float64, device=DEVICE)
    mask_BL = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], device=DEVICE)
    poisoned_BLH = hidden_BLH.masked_fill(mask_BL[..., None] == 0, torch.nan)
    clean = masked_mean_pool(hidden_BLH, mask_BL, impl=impl)
    assert torch.equal(masked_mean_pool(poisoned_BLH, mask_BL, impl=impl), clean)
    assert torch.autograd.gradcheck(
        lambda h: masked_mean_pool(h, mask_BL, impl=impl),
        hidden_BLH.requires_grad_(),
        fast_mode=True,
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_queries_keep_their_precision_over_a_corpus_in_half(impl):
    queries_BD = torch.randn(20, 48, device=DEVICE)
    corpus_ND = torch.randn(400, 48, device=DEVICE).bfloat16()
    scores_BK, _ = mips_topk(queries_BD, corpus_ND, 3, impl=impl)
    wanted_BK, _ = reference.mips_topk(queries_BD.double(), corpus_ND.double(), 3)
    torch.testing.assert_close(scores_BK.double(), wanted_BK, rtol=1e-6, atol=1e-5)
