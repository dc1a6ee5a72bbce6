"""hidden + weight + labels -> log-probabilities of the labels, without the logits of all rows."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rag2_kernels.reference import promoted
from rag2_kernels.rows import Rows


def answer_logprob(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    chunk: int | None = None,
    rows: type[Rows] = Rows,
) -> Tensor:
    """As `reference.answer_logprob`, for `chunk` rows at once (by default `rows.room` logits).

    No [M, V] tensor is stored unless it fits into one chunk; otherwise the backward pass computes
    the logits again.
    """
    check_rows(hidden_MH, weight_VH, labels_M)
    if chunk is None:
        chunk = max(1, rows.room // weight_VH.shape[0])
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be positive")
    keep = torch.is_grad_enabled() and len(labels_M) <= chunk
    # Autocast would round the fp32 products of the Function back to half precision.
    with torch.autocast(hidden_MH.device.type, enabled=False):
        return _AnswerLogprob.apply(hidden_MH, weight_VH, labels_M, chunk, rows, keep)


@torch.no_grad()
def greedy_logprob(
    hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, rows: type[Rows] = Rows
) -> tuple[Tensor, Tensor]:
    """As `reference.greedy_logprob`, for `rows.room` logits at once."""
    check_rows(hidden_MH, weight_VH, labels_M)
    logp_M = hidden_MH.new_empty(len(labels_M), dtype=promoted(hidden_MH, weight_VH))
    greedy_M = torch.empty_like(labels_M, dtype=torch.bool)
    with torch.autocast(hidden_MH.device.type, enabled=False):
        for some in chunks(len(labels_M), max(1, rows.room // weight_VH.shape[0])):
            logp_M[some], greedy_M[some] = rows.greedy(hidden_MH[some], weight_VH, labels_M[some])
    return logp_M, greedy_M


def check_rows(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor) -> None:
    """ValueError for shapes that do not belong together."""
    if hidden_MH.ndim != 2 or weight_VH.ndim != 2 or labels_M.shape != hidden_MH.shape[:1]:
        raise ValueError(
            "hidden [M, H], weight [V, H] and labels [M] are needed, not "
            f"{tuple(hidden_MH.shape)}, {tuple(weight_VH.shape)} and {tuple(labels_M.shape)}"
        )
    if hidden_MH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden has H={hidden_MH.shape[1]}, weight H={weight_VH.shape[1]}")
    if labels_M.device.type == "cpu" and len(labels_M):  # elsewhere a look at them would wait
        least, most, vocabulary = int(labels_M.min()), int(labels_M.max()), len(weight_VH)
        if least < 0 or most >= vocabulary:
            wrong = least if least < 0 else most
            raise ValueError(f"labels must name a token: {wrong} is none of V={vocabulary}")


class _AnswerLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        labels_M: Tensor,
        chunk: int,
        rows: type[Rows],
        keep: bool,
    ) -> Tensor:
        kept: tuple[Tensor | None, ...] = (None, None)
        if keep and any(ctx.needs_input_grad):
            held = rows.of(hidden_MH, weight_VH, labels_M)
            kept, logp_M = held.kept, held.logp_C
        else:
            logp_M = hidden_MH.new_empty(len(labels_M), dtype=promoted(hidden_MH, weight_VH))
            for some in chunks(len(labels_M), chunk):
                logp_M[some] = rows.logp(hidden_MH[some], weight_VH, labels_M[some])
        ctx.chunk, ctx.rows = chunk, rows
        ctx.save_for_backward(hidden_MH, weight_VH, labels_M, logp_M, *kept)
        return logp_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_MH, weight_VH, labels_M, logp_M, *kept = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        dhidden_MH = torch.zeros_like(hidden_MH) if for_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=grad_M.dtype) if for_weight else None
        with torch.autocast(hidden_MH.device.type, enabled=False):
            for some in chunks(len(labels_M), ctx.chunk):
                if kept[0] is None:
                    rows = ctx.rows.of(hidden_MH[some], weight_VH, labels_M[some])
                else:  # what autograd has saved may be asked for again
                    held_MV = kept[0].clone() if ctx.rows.spends else kept[0]
                    rows = ctx.rows(hidden_MH, weight_VH, labels_M, held_MV, kept[1], logp_M)
                into = None if dhidden_MH is None else dhidden_MH[some]
                rows.backward(grad_M[some], into, dweight_VH)
        if dweight_VH is not None:
            dweight_VH = dweight_VH.to(weight_VH.dtype)
        return dhidden_MH, dweight_VH, None, None, None, None


def chunks(rows: int, chunk: int) -> list[slice]:
    """Slices of at most `chunk` rows."""
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]
