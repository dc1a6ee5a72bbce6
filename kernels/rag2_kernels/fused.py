"""hidden + weight + labels + scores -> the loss of whole questions, with gradients, in one pass.

A loss of retrieval-augmented generation weighs every row by what it learns from all rows of the
question: the posterior of the row's chunk. A head that knows which rows are one question's can
close the loss inside a chunk of rows, while their logits are still there. It computes logits once,
where per-row weights from outside cost a second time (6 instead of 8 MHV operations forward and
backward), and prompts that weigh nothing are left out: 2 + 4 f, f the share of rows kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rag2_kernels.logprob import answer_logprob, check_rows, chunks
from rag2_kernels.reference import Loss, padded, promoted
from rag2_kernels.rows import Rows


class RagLoss(NamedTuple):
    """The mean over questions in nats, with gradient; the rest carries none."""

    loss: Tensor
    loss_B: Tensor
    posterior_BK: Tensor
    kept: Tensor  # the share f of prompts that went through the backward pass


def rag_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    pair_M: Tensor,
    scores_BK: Tensor,
    loss: Loss,
    prompts: int,
    skip_below: float,
    rows: type[Rows] = Rows,
) -> RagLoss:
    """As `reference.rag_loss`, its mean, with at most `rows.room` logits at once."""
    check_rows(hidden_MH, weight_VH, labels_M)
    if pair_M.shape != labels_M.shape or bool((pair_M.diff() < 0).any()):
        raise ValueError("pair [M] must name the prompt b S + s of each row, in order")
    if not 0 <= skip_below < 1:
        raise ValueError(f"skip_below={skip_below} must be at least 0 and below 1")
    if not len(scores_BK):
        raise ValueError("there are no questions")
    if len(pair_M) and int(pair_M[-1]) >= len(scores_BK) * prompts:
        raise ValueError(f"pair names prompt {int(pair_M[-1])} of {len(scores_BK) * prompts}")
    with torch.autocast(hidden_MH.device.type, enabled=False):
        given = (hidden_MH, weight_VH, labels_M, pair_M, scores_BK)
        learn = torch.is_grad_enabled()  # inside of a Function that cannot be seen
        return RagLoss(*_RagLoss.apply(*given, loss, prompts, skip_below, rows, learn))


class _RagLoss(torch.autograd.Function):
    """The gradients are ready when the loss is; backward scales them."""

    @staticmethod
    def forward(
        ctx,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        labels_M: Tensor,
        pair_M: Tensor,
        scores_BK: Tensor,
        loss: Loss,
        prompts: int,
        skip_below: float,
        rows: type[Rows],
        learn: bool,
    ) -> tuple[Tensor, ...]:
        wide = promoted(hidden_MH, weight_VH)
        for_hidden, for_weight = (needed and learn for needed in ctx.needs_input_grad[:2])
        dhidden_MH = torch.zeros_like(hidden_MH) if for_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=wide) if for_weight else None
        dscores_BK = torch.zeros_like(scores_BK)
        questions = len(scores_BK)
        ends_B = torch.bincount(pair_M // prompts, minlength=questions).cumsum(0).tolist()
        parts = _whole_questions(ends_B, rows.room // len(weight_VH))
        head = _Head(weight_VH, rows, max(end - start for _, _, start, end in parts))
        results, kept = [], 0
        for first, last, start, end in parts:
            some = slice(start, end)
            group = head(hidden_MH[some], labels_M[some])
            scores_bK = scores_BK[first:last].detach().requires_grad_()
            pair_C = pair_M[some] - first * prompts
            loss_b, posterior_bK, grad_C = _closed(group.logp_C, pair_C, scores_bK, loss, prompts)
            if scores_bK.grad is not None:
                dscores_BK[first:last] = scores_bK.grad / questions
            results.append((loss_b, posterior_bK))
            felt_R = _felt(grad_C, pair_C, (last - first) * prompts, skip_below)
            kept += int(felt_R.sum())
            into = None if dhidden_MH is None else dhidden_MH[some]
            if into is not None or dweight_VH is not None:
                group.backward(grad_C / questions, felt_R[pair_C], into, dweight_VH)
        loss_B, posterior_BK = (torch.cat(part) for part in zip(*results, strict=True))
        kept_share = loss_B.new_tensor(kept / max(1, len(pair_M.unique_consecutive())))
        if dweight_VH is not None:
            dweight_VH = dweight_VH.to(weight_VH.dtype)
        ctx.save_for_backward(dhidden_MH, dweight_VH, dscores_BK)
        ctx.mark_non_differentiable(loss_B, posterior_BK, kept_share)
        return loss_B.mean(), loss_B, posterior_BK, kept_share

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        made = ctx.saved_tensors
        if float(grad) != 1:  # as they are, autograd takes them over: no second [V, H]
            made = [None if d is None else d * grad for d in made]  # a factor beyond fp16 is none
        dhidden_MH, dweight_VH, dscores_BK = made
        return dhidden_MH, dweight_VH, None, None, dscores_BK, None, None, None, None, None


class _Head:
    """The output head, with space for the logits of at most so many rows at once."""

    def __init__(self, weight_VH: Tensor, rows: type[Rows], most: int) -> None:
        self.weight_VH, self.rows = weight_VH, rows
        self.chunk = max(1, rows.room // len(weight_VH))
        self.whole = max(self.chunk, rows.whole // len(weight_VH))
        held = most if most <= self.whole else self.chunk
        dtype = rows.held_dtype(weight_VH)
        # A GPU's allocator keeps its memory: there it would only be in the way.
        numbers = held * len(weight_VH) if weight_VH.device.type == "cpu" else 0
        self.space = weight_VH.new_empty(numbers, dtype=dtype)

    def __call__(self, hidden_CH: Tensor, labels_C: Tensor) -> "_Group":
        return _Group(self, hidden_CH, labels_C)

    def of(self, hidden_CH: Tensor, labels_C: Tensor) -> Rows:
        """The rows' logits, in place of those before."""
        return self.rows.of(hidden_CH, self.weight_VH, labels_C, self.space)


class _Group:
    """The rows of some whole questions, their logits held if there is room, else computed again."""

    def __init__(self, head: _Head, hidden_CH: Tensor, labels_C: Tensor) -> None:
        self.head, self.given = head, (hidden_CH, labels_C)
        self.rows = head.of(hidden_CH, labels_C) if len(labels_C) <= head.whole else None
        if self.rows is None:
            with torch.no_grad():
                self.logp_C = answer_logprob(
                    hidden_CH, head.weight_VH, labels_C, head.chunk, head.rows
                )
        else:
            self.logp_C = self.rows.logp_C

    def backward(
        self, grad_C: Tensor, felt_C: Tensor, into_CH: Tensor | None, dweight_VH: Tensor | None
    ) -> None:
        """Write the gradients of the rows that are felt; the others' stay as they are."""
        felt_R = felt_C.nonzero()[:, 0]
        for some in chunks(len(felt_R), self.head.whole if self.rows else self.head.chunk):
            picked = felt_R[some]
            if self.rows is None:
                rows = self.head.of(*(given[picked] for given in self.given))
            else:
                rows = self.rows if len(picked) == len(felt_C) else self.rows.take(picked)
            drows_RH = None if into_CH is None else torch.empty_like(rows.hidden_CH)
            rows.backward(grad_C[picked], drows_RH, dweight_VH)
            if into_CH is not None and drows_RH is not None:
                into_CH[picked] = drows_RH


def _closed(
    logp_C: Tensor, pair_C: Tensor, scores_bK: Tensor, loss: Loss, prompts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_b, posterior_bK, dloss/dlogp_C); the scores' gradient is left in their `.grad`."""
    with torch.enable_grad():
        logp_C = logp_C.detach().requires_grad_()
        logp_bST, mask_bST = padded(logp_C, pair_C, len(scores_bK), prompts)
        loss_b, posterior_bK = loss(scores_bK, logp_bST, mask_bST)
        if loss_b.requires_grad:
            loss_b.sum().backward()
    grad_C = logp_C.grad if logp_C.grad is not None else torch.zeros_like(logp_C)
    return loss_b.detach(), posterior_bK.detach(), grad_C


def _felt(grad_C: Tensor, pair_C: Tensor, prompts: int, skip_below: float) -> Tensor:
    """Whether a prompt weighs anything, and enough, in its question's loss: [prompts]."""
    weight_R = grad_C.new_zeros(prompts).scatter_reduce_(0, pair_C, grad_C.abs(), "amax")
    # NaN is felt: what is wrong in a question must show in its gradient.
    return ~((weight_R == 0) | (weight_R < skip_below))


def _whole_questions(ends_B: list[int], rows: int) -> list[tuple[int, int, int, int]]:
    """(first, last) questions and rows of each chunk: at most so many rows, or one question."""
    parts, first, start = [], 0, 0
    for question, end in enumerate(ends_B):
        if question > first and end - start > rows:
            parts.append((first, question, start, ends_B[question - 1]))
            first, start = question, ends_B[question - 1]
    return [*parts, (first, len(ends_B), start, ends_B[-1])]
