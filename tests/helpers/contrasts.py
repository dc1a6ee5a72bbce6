"""Inputs of the contrastive loss, and what it makes of them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rag2_kernels import contrast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Given = tuple[Tensor, Tensor, Tensor, Tensor]
Groups = tuple[Tensor, Tensor]


def lower_room(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """Let both implementations hold at most so many scores at once."""
    from rag2_kernels.gpu import contrast as kernels

    monkeypatch.setattr(contrast.Scores, "room", scores)
    monkeypatch.setattr(kernels.Scores, "room", scores)


def pairs(questions: int, count: int, width: int, dtype: torch.dtype = torch.float64) -> Given:
    """Queries and chunks of length 1, positives of which some are shared, and a scale."""
    vectors = torch.randn(questions + count, width, dtype=torch.float64, device=DEVICE)
    vectors = torch.nn.functional.normalize(vectors, dim=1).to(dtype)
    positive_B = torch.randint(count, (questions,), device=DEVICE)
    positive_B[: questions // 4] = positive_B[-1]
    scale = torch.tensor(20.0, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    return vectors[:questions].clone(), vectors[questions:].clone(), positive_B, scale


def some_groups(questions: int, count: int) -> Groups:
    """Up to two ids a question, and a chunk in nine or so with each."""
    question_BG = torch.randint(-1, 9, (questions, 2), device=DEVICE)
    return question_BG, torch.randint(9, (count,), device=DEVICE)


def results(
    function: Callable[..., Tensor], given: Sequence[Tensor], **settings: Any
) -> tuple[Tensor, ...]:
    """The loss and its gradients at queries, chunks and scale."""
    queries_BD, chunks_ND, positive_B, scale = given
    leaves = [x.detach().clone().requires_grad_() for x in (queries_BD, chunks_ND, scale)]
    loss = function(*leaves[:2], positive_B, leaves[2], **settings)
    return loss.detach(), *torch.autograd.grad(loss, leaves)
