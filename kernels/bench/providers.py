"""Who computes the loss of B questions from the head's inputs, forward and backward, and how.

Each provider gets the same inputs and leaves gradients at hidden, weight and scores.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from rag2_kernels import rag_loss, reference

SKIPPED = 2.0**-12  # posteriors below weigh less than the rounding of bfloat16


@dataclass(frozen=True)
class Inputs:
    """Rows M = B K T in the order of their prompts; `kept` of the K chunks have a posterior."""

    hidden_MH: Tensor
    weight_VH: Tensor
    labels_M: Tensor
    pair_M: Tensor
    scores_BK: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where gradients arrive."""
        return self.hidden_MH, self.weight_VH, self.scores_BK


def made(
    questions: int, chunks: int, tokens: int, hidden: int, vocabulary: int, share: float, **where
) -> Inputs:
    """Random rows whose posterior lies on `share` of each question's chunks."""
    torch.manual_seed(0)
    rows = questions * chunks * tokens
    hidden_MH = torch.randn(rows, hidden, **where)
    weight_VH = torch.randn(vocabulary, hidden, **where) / hidden**0.5
    kept = max(1, round(share * chunks))
    scores_BK = torch.zeros(questions, chunks, device=where.get("device"))
    scores_BK[:, kept:] = -200.0  # far below what an answer's log-probabilities differ by
    pair_M = torch.arange(questions * chunks, device=where.get("device"))
    inputs = Inputs(
        hidden_MH,
        weight_VH,
        torch.randint(vocabulary, (rows,), device=where.get("device")),
        pair_M.repeat_interleave(tokens),
        scores_BK,
    )
    for leaf in inputs.leaves:
        leaf.requires_grad_()
    return inputs


def eager(given: Inputs) -> Tensor:
    """What a user writes: logits, log_softmax, gather, logsumexp."""
    questions, chunks = given.scores_BK.shape
    logits_MV = given.hidden_MH @ given.weight_VH.T
    logp_MV = log_softmax(logits_MV.float(), dim=-1)
    logp_M = logp_MV.gather(-1, given.labels_M[:, None])[:, 0]
    answer_BK = logp_M.view(questions, chunks, -1).sum(-1)
    prior_BK = given.scores_BK.log_softmax(-1)
    return -(prior_BK + answer_BK).logsumexp(-1).mean()


def fused(given: Inputs, skip_below: float = 0.0, impl: str = "auto") -> Tensor:
    """`rag_loss`."""
    return rag_loss(
        *(given.hidden_MH, given.weight_VH, given.labels_M, given.pair_M, given.scores_BK),
        loss=reference.marginal_nll,
        skip_below=skip_below,
        impl=impl,
    ).loss


def recomputed(given: Inputs) -> Tensor:
    """torch's own chunked cross-entropy, which computes the logits again (reduction none)."""
    options = torch.nn.LinearCrossEntropyOptions()
    nll_M = torch.nn.functional.linear_cross_entropy(
        given.hidden_MH, given.weight_VH, given.labels_M, reduction="none", options=options
    )
    answer_BK = -nll_M.view(*given.scores_BK.shape, -1).sum(-1)
    return -(given.scores_BK.log_softmax(-1) + answer_BK).logsumexp(-1).mean()


def providers() -> dict[str, Callable[[Inputs], Tensor]]:
    """Those that can run here, by name."""
    found: dict[str, Callable[[Inputs], Tensor]] = {
        "eager": eager,
        "rag2": fused,
        "rag2_skip": lambda given: fused(given, SKIPPED),
    }
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        found["torch_lce"] = recomputed
    return found


def versions() -> dict[str, str]:
    """Of what the providers are made of."""
    names = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
