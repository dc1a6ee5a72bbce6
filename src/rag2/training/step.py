"""Two equal paths for one joint step: everything in one graph, or a posterior first.

Both leave the same gradients (a test holds them to it at `skip_below=0`); they differ in cost. With
f = share of prompts kept, one pass costs 3 forwards of all B*S prompts and holds all their
activations; two passes cost 1 + 3f and hold one micro-batch. (S = K for a loss that reads each
chunk alone.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from rag2.config import Config
from rag2.losses.base import JointLoss, Subset
from rag2.rag import Pair, RagModel
from rag2.training import distributed, sharding
from rag2.types import Chunk
from rag2_kernels import rag_loss, reference

Batch = tuple[Sequence[str], Sequence[str], Sequence[Sequence[Chunk]]]  # questions, answers, chunks


@dataclass(frozen=True, slots=True)
class StepResult:
    """Detached figures of a step: loss_B in nats, posterior_BK, share of prompts kept."""

    loss_B: Tensor
    posterior_BK: Tensor
    kept: float


class OnePass(Config):
    """One graph over all prompts; the loss is closed inside the output head (`rag_loss`).

    `skip_below`: rows of prompts that weigh less in their question's loss have no gradient at the
    head, which then costs 2 + 4 f operations instead of 6; the layers below take no notice. A head
    that is more than a matrix gives log-probabilities to the loss instead, and skips nothing.
    """

    name: Literal["one_pass"] = "one_pass"
    skip_below: float = Field(default=0.0, ge=0.0, lt=1.0)

    def __call__(
        self,
        rag: RagModel,
        loss: JointLoss,
        questions: Sequence[str],
        answers: Sequence[str],
        chunks_BK: Sequence[Sequence[Chunk]],
        in_batch: bool = False,
    ) -> StepResult:
        """Accumulate the gradient of the mean loss into the parameters.

        `in_batch` adds the crowding of `RagModel.scores` to each question's loss, as often as the
        loss holds p(z|x).
        """
        head = self._plain if rag.head_weight() is None else self._fused
        batch, subsets = (questions, answers, chunks_BK), loss.subsets(len(chunks_BK[0]))
        mean, result, crowding_B, mask_BST = head(rag, loss, batch, subsets)
        if in_batch:
            crowding_B = loss.priors(mask_BST) * crowding_B
            mean = mean + crowding_B.mean()
            result = replace(result, loss_B=result.loss_B + crowding_B.detach())
        if mean.requires_grad:
            mean.backward()
        return result

    def _fused(
        self, rag: RagModel, loss: JointLoss, batch: Batch, subsets: Sequence[Subset]
    ) -> tuple[Tensor, StepResult, Tensor, Tensor]:
        """Mean loss with gradient, figures, crowding_B and mask_BST."""
        questions, answers, chunks_BK = batch
        scores_BK, crowding_B = rag.scores(questions, chunks_BK)
        rows = rag.head_rows(rag.pairs(questions, answers, chunks_BK, subsets))
        factors = (rows.hidden_MH, rows.weight_VH)
        if not loss.teaches_generator():  # a gradient of zero would let its weights decay
            factors = (rows.hidden_MH.detach(), rows.weight_VH.detach())
        mean, loss_B, posterior_BK, kept = rag_loss(
            *factors,
            rows.labels_M,
            rows.pair_M,
            scores_BK,
            loss=loss,
            prompts=len(subsets),
            skip_below=self.skip_below,
        )
        shape = (len(questions), len(subsets))
        _, mask_BST = reference.padded(rows.labels_M, rows.pair_M, *shape)
        share = float(kept) if any(factor.requires_grad for factor in factors) else 1.0
        return mean, StepResult(loss_B, posterior_BK, share), crowding_B, mask_BST

    def _plain(
        self, rag: RagModel, loss: JointLoss, batch: Batch, subsets: Sequence[Subset]
    ) -> tuple[Tensor, StepResult, Tensor, Tensor]:
        """As `_fused`, from the model's own log-probabilities."""
        scores_BK, crowding_B, logp_BST, mask_BST = rag(*batch, subsets)
        loss_B, posterior_BK = loss(scores_BK, logp_BST, mask_BST)
        result = StepResult(loss_B.detach(), posterior_BK.detach(), 1.0)
        return loss_B.mean(), result, crowding_B, mask_BST


class TwoPass(Config):
    """A posterior without gradients, then backward only through prompts that the loss feels.

    The log-probabilities of the first pass become leaves of the loss; the gradient that arrives at
    them is what the second pass sends back through the generator, micro-batch by micro-batch (the
    gradient-caching idea of Gao et al. 2021). `skip_below`: prompts whose tokens weigh less in
    their question's loss (of the sequence marginal: whose posterior is smaller) are left out of the
    second pass; their share of the gradient is that small too. Those that weigh nothing always are.
    """

    name: Literal["two_pass"] = "two_pass"
    skip_below: float = Field(default=0.0, ge=0.0, lt=1.0)
    micro_batch: int = Field(default=64, ge=1)

    def __call__(
        self,
        rag: RagModel,
        loss: JointLoss,
        questions: Sequence[str],
        answers: Sequence[str],
        chunks_BK: Sequence[Sequence[Chunk]],
        in_batch: bool = False,
    ) -> StepResult:
        """Accumulate the gradient of the mean loss into the parameters.

        `in_batch` adds the crowding of `RagModel.scores` to each question's loss, as often as the
        loss holds p(z|x).
        """
        subsets = loss.subsets(len(chunks_BK[0]))
        pairs = rag.pairs(questions, answers, chunks_BK, subsets)
        order = sorted(range(len(pairs)), key=lambda r: len(pairs[r][0]) + len(pairs[r][1]))
        pieces = [order[i : i + self.micro_batch] for i in range(0, len(order), self.micro_batch)]
        logp_RT, mask_RT, states = self._first_pass(rag, pairs, pieces)

        scores_BK, crowding_B = rag.scores(questions, chunks_BK)
        logp_RT.requires_grad_(True)  # a loss may not use it: pdist without a reader
        mask_BST = rearrange(mask_RT, "(b s) t -> b s t", s=len(subsets))
        logp_BST = rearrange(logp_RT, "(b s) t -> b s t", s=len(subsets))
        loss_B, posterior_BK = loss(scores_BK, logp_BST, mask_BST)
        if in_batch:
            loss_B = loss_B + loss.priors(mask_BST) * crowding_B
        if loss_B.requires_grad:
            loss_B.mean().backward()
        grad_RT = logp_RT.grad
        kept = 1.0
        if grad_RT is not None and any(p.requires_grad for p in rag.generator.parameters()):
            # Of the marginal, what arrives at a token is its prompt's posterior, a B-th of it.
            weight_R = len(questions) * grad_RT.abs().amax(1)
            felt_R = (weight_R > 0) & (weight_R >= self.skip_below)
            kept = float(felt_R.float().mean())
            self._second_pass(rag, pairs, pieces, states, grad_RT, felt_R)
        return StepResult(loss_B.detach(), posterior_BK.detach(), kept)

    def _first_pass(
        self, rag: RagModel, pairs: list[Pair], pieces: list[list[int]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logp_RT and mask_RT of every prompt; RNG states before each piece and at the end."""
        width = max(len(answer) for _, answer in pairs)
        weight = next(rag.generator.parameters())
        device, wide = weight.device, torch.promote_types(weight.dtype, torch.float32)
        logp_RT = torch.zeros(len(pairs), width, dtype=wide, device=device)
        mask_RT = torch.zeros(len(pairs), width, dtype=torch.bool, device=device)
        states = []
        with torch.no_grad():
            for piece in pieces:
                states.append(_rng_state(device))
                logp, mask = rag.logp([pairs[r] for r in piece])
                logp_RT[piece, : logp.shape[1]] = logp
                mask_RT[piece, : mask.shape[1]] = mask
        states.append(_rng_state(device))
        return logp_RT, mask_RT, states

    def _second_pass(
        self,
        rag: RagModel,
        pairs: list[Pair],
        pieces: list[list[int]],
        states: list[Tensor],
        grad_RT: Tensor,
        felt_R: Tensor,
    ) -> None:
        """Send grad_RT back through the generator for the prompts that are felt.

        With dropout the masks of the first pass must come back, so a generator that drew random
        numbers keeps its micro-batches whole and only zero gradients are left out. (Looking for
        dropout modules would miss the models whose attention takes its rate from the config.)
        """
        dropout = not torch.equal(states[0], states[-1])
        device = grad_RT.device
        after = _rng_state(device)
        if not dropout:
            rows = [r for piece in pieces for r in piece if felt_R[r]]
            pieces = [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
            if sharding.is_sharded(rag.generator):
                pieces += _idle(felt_R, distributed.largest(len(pieces)) - len(pieces))
        grad_RT = torch.where(rearrange(felt_R, "r -> r 1"), grad_RT, 0.0)
        for number, piece in enumerate(pieces):
            if dropout:
                _set_rng_state(device, states[number])
            logp, _ = rag.logp([pairs[r] for r in piece])
            logp.backward(grad_RT[piece, : logp.shape[1]].to(logp.dtype))
        _set_rng_state(device, after)


def _idle(felt_R: Tensor, number: int) -> list[list[int]]:
    """So many passes of a prompt that is not felt, for company: other processes have more to do."""
    return [(~felt_R).nonzero()[0].tolist() for _ in range(number)]


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
