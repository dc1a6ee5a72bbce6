"""Queries and chunks -> the in-batch contrastive loss, without the scores of all pairs.

B questions, N chunks, D embedding, G groups a question; b stands for some of the questions. Forward
keeps a few numbers a question, backward computes the scores again, some questions at a time:
    ds_bn = exp(s_bn - row_b) [+ exp(s_bn + spread_n) if symmetric],   0 where n does not count
    ds at the positive = exp(own_b - row_b) - 1 [+ exp(own_b - column_b) - 1]
own is the positive's score, row and column the log-sum-exps of the two directions, and spread_n =
LSE(-column) over the questions whose positive is n.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rag2_kernels import reference
from rag2_kernels.logprob import chunks
from rag2_kernels.reference import promoted
from rag2_kernels.rows import add_product, product


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of B questions with N chunks, some rows at a time."""

    room: ClassVar[int] = 1 << 24  # scores held at once: 64 MiB in fp32

    queries_BD: Tensor
    chunks_ND: Tensor
    positive_B: Tensor
    scale: Tensor
    question_BG: Tensor
    chunk_N: Tensor
    symmetric: bool

    @property
    def parts(self) -> list[slice]:
        """The questions, as many at once as there is room for."""
        return chunks(len(self.queries_BD), max(1, self.room // len(self.chunks_ND)))

    def sums(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """own_B, row_B and, if symmetric, others_N: LSE over the questions a chunk is no answer to.

        others_N is -inf for a chunk without such a question.
        """
        wide = promoted(self.queries_BD)
        own_B, row_B = self.queries_BD.new_empty(2, len(self.queries_BD), dtype=wide)
        others_N = self.chunks_ND.new_full((len(self.chunks_ND),), -torch.inf, dtype=wide)
        for some in self.parts:
            scores_bN, place_b1 = self._of(some), self.positive_B[some, None]
            own_B[some] = scores_bN.gather(1, place_b1)[:, 0]
            row_B[some] = scores_bN.logsumexp(1)
            if self.symmetric:
                scores_bN.scatter_(1, place_b1, -torch.inf)
                others_N = others_N.logaddexp(scores_bN.logsumexp(0))
        return own_B, row_B, others_N if self.symmetric else None

    def gradient(
        self, some: slice, row_B: Tensor, pull_B: Tensor, spread_N: Tensor | None
    ) -> Tensor:
        """ds_bN of some questions in the inputs' dtype; `pull_B` is that of their positives."""
        scores_bN = self._of(some)
        ds_bN = (scores_bN - row_B[some, None]).exp_()
        if spread_N is not None:
            ds_bN += scores_bN.add_(spread_N).exp_()
        ds_bN.scatter_(1, self.positive_B[some, None], pull_B[some, None])
        return ds_bN.to(self.queries_BD.dtype)

    def _of(self, some: slice) -> Tensor:
        """Scores of some questions, -inf where a chunk does not count."""
        scores_bN = product(self.queries_BD[some], self.chunks_ND.T).mul_(self.scale)
        place_b1 = self.positive_B[some, None]
        own_b1 = scores_bN.gather(1, place_b1)
        for group_b in self.question_BG[some].unbind(1):
            scores_bN.masked_fill_(group_b[:, None] == self.chunk_N, -torch.inf)
        return scores_bN.scatter_(1, place_b1, own_b1)


def info_nce(
    queries_BD: Tensor,
    chunks_ND: Tensor,
    positive_B: Tensor,
    scale: Tensor | float,
    groups: tuple[Tensor, Tensor] | None,
    symmetric: bool,
    scores: type[Scores] = Scores,
) -> Tensor:
    """As `reference.info_nce`, with at most `scores.room` scores at once."""
    _check(queries_BD, chunks_ND, positive_B, scale, groups)
    with torch.autocast(queries_BD.device.type, enabled=False):
        if scores is Scores and len(queries_BD) * len(chunks_ND) <= scores.room:
            # One chunk of scores may be kept: the definition does, and computes them once.
            return reference.info_nce(queries_BD, chunks_ND, positive_B, scale, groups, symmetric)
        wide = promoted(queries_BD, chunks_ND)
        if queries_BD.dtype != chunks_ND.dtype:
            queries_BD, chunks_ND = queries_BD.to(wide), chunks_ND.to(wide)
        if isinstance(scale, Tensor):
            scale = scale.to(queries_BD.device, wide)
        else:
            scale = queries_BD.new_full((), scale, dtype=wide)  # no copy from the host to wait for
        if groups is None:
            groups = positive_B.new_empty(len(queries_BD), 0), positive_B.new_empty(len(chunks_ND))
        vectors = (queries_BD.contiguous(), chunks_ND.contiguous())
        ids = (x.contiguous() for x in (positive_B, *groups))
        return _InfoNCE.apply(*vectors, scale, *ids, symmetric, scores)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries_BD: Tensor,
        chunks_ND: Tensor,
        scale: Tensor,
        positive_B: Tensor,
        question_BG: Tensor,
        chunk_N: Tensor,
        symmetric: bool,
        scores: type[Scores],
    ) -> Tensor:
        given = (queries_BD, chunks_ND, positive_B, scale, question_BG, chunk_N)
        own_B, row_B, others_N = scores(*given, symmetric).sums()
        column_B = None if others_N is None else others_N[positive_B].logaddexp(own_B)
        ctx.save_for_backward(*given, own_B, row_B, column_B)
        ctx.scores = scores
        loss = (row_B - own_B).mean()
        return loss if column_B is None else (loss + (column_B - own_B).mean()) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *given, own_B, row_B, column_B = ctx.saved_tensors
        queries_BD, chunks_ND, positive_B, scale = given[:4]
        for_queries, for_chunks, for_scale = ctx.needs_input_grad[:3]
        pull_B, spread_N = (own_B - row_B).expm1(), None
        if column_B is not None:
            pull_B = pull_B + (own_B - column_B).expm1()
            spread_N = _spread(column_B, positive_B, len(chunks_ND))
        dqueries_BD = torch.empty_like(queries_BD) if for_queries else None
        dchunks_ND = torch.zeros_like(chunks_ND, dtype=own_B.dtype) if for_chunks else None
        dscale = torch.zeros_like(scale)
        by_question = for_queries or not for_chunks  # <ds, q c^T> = <ds c, q> = <ds^T q, c>
        share = grad / (len(positive_B) * (1 if column_B is None else 2))
        with torch.autocast(queries_BD.device.type, enabled=False):
            scores = ctx.scores(*given, column_B is not None)
            for some in scores.parts:
                ds_bN = scores.gradient(some, row_B, pull_B, spread_N)
                if dchunks_ND is not None:
                    add_product(dchunks_ND, ds_bN.T, queries_BD[some])
                if by_question:
                    pulled_bD = product(ds_bN, chunks_ND)
                    dscale += (pulled_bD * queries_BD[some]).sum()
                    if dqueries_BD is not None:
                        dqueries_BD[some] = pulled_bD * (share * scale)
            if dchunks_ND is not None:
                if not by_question:
                    dscale += (dchunks_ND * chunks_ND).sum()
                dchunks_ND = (dchunks_ND * (share * scale)).to(chunks_ND.dtype)
        dscale = share * dscale if for_scale else None
        return dqueries_BD, dchunks_ND, dscale, None, None, None, None, None


def _spread(column_B: Tensor, positive_B: Tensor, count: int) -> Tensor:
    """LSE of -column over the questions of each of N positives; -inf for any other chunk."""
    most_N = column_B.new_full((count,), -torch.inf)
    most_N = most_N.scatter_reduce(0, positive_B, -column_B, "amax")
    total_N = torch.zeros_like(most_N)
    # Unlike index_add, this sorts on a GPU: equal positives are summed in the same order each time.
    total_N.index_put_((positive_B,), (-column_B - most_N[positive_B]).exp(), accumulate=True)
    return most_N + total_N.log()


def _check(
    queries_BD: Tensor,
    chunks_ND: Tensor,
    positive_B: Tensor,
    scale: Tensor | float,
    groups: tuple[Tensor, Tensor] | None,
) -> None:
    """ValueError for what does not belong together."""
    fits = queries_BD.ndim == chunks_ND.ndim == 2 and queries_BD.shape[1] == chunks_ND.shape[1]
    if not fits or positive_B.shape != queries_BD.shape[:1]:
        raise ValueError(
            "queries [B, D], chunks [N, D] and positive [B] are needed, not "
            f"{tuple(queries_BD.shape)}, {tuple(chunks_ND.shape)} and {tuple(positive_B.shape)}"
        )
    if not len(positive_B):
        raise ValueError("there are no questions")
    on_cpu = positive_B.device.type == "cpu"  # elsewhere a look at the ids would wait for them
    if on_cpu and not 0 <= positive_B.min() <= positive_B.max() < len(chunks_ND):
        raise ValueError(f"positive names a chunk that is none of the {len(chunks_ND)}")
    if isinstance(scale, Tensor):
        if scale.ndim:
            raise ValueError(f"scale must be a number, not {tuple(scale.shape)}")
    elif not scale > 0:
        raise ValueError(f"scale={scale} must be positive")
    if groups is None:
        return
    question_BG, chunk_N = groups
    of_questions = question_BG.ndim == 2 and len(question_BG) == len(positive_B)
    if not of_questions or chunk_N.shape != chunks_ND.shape[:1]:
        raise ValueError(
            f"groups [B, G] and [N] of {len(positive_B)} questions and {len(chunks_ND)} chunks are "
            f"needed, not {tuple(question_BG.shape)} and {tuple(chunk_N.shape)}"
        )
