"""answer_logprob (forward) and rag_loss (forward and backward): the output head and what follows.

M = B K T rows, H hidden, V vocabulary. A question's K prompts hold the same answer and nearly the
same states, so that the posterior lies evenly on the chunks that the scores leave: a share f.
"""

from dataclasses import replace
from typing import Any

import torch
from logps import exact_logp, peers, plain_logp, rows_of
from op import (
    FURTHER,
    HALF,
    Case,
    Inputs,
    Op,
    Outputs,
    Provider,
    compiled,
    generator,
    ours,
    swept,
)
from torch import Tensor

import rag2_kernels

SKIPPED = 2.0**-12  # posteriors below weigh less than the rounding of bfloat16
NATS = 2.0  # deviation of the logits


def kept_chunks(case: Case) -> int:
    """Of the K chunks, those with a posterior."""
    return max(1, round(case.f * case.sizes["K"]))


def make_rows(case: Case, device: torch.device) -> Inputs:
    """hidden_MH, weight_VH, labels_M; scores_BK and pair_M where the sizes name questions."""
    if "M" in case.sizes:
        questions, prompts, tokens = 1, 1, case.sizes["M"]
    else:
        questions, prompts, tokens = case.of("BKT")
    (hidden, vocabulary), dice = case.of("HV"), generator(device)
    where: dict[str, Any] = {"device": device, "dtype": case.dtype, "generator": dice}
    # A question's answers differ by about a nat: scores get a gradient, and all chunks a posterior.
    apart = 1 / (NATS * tokens**0.5)
    hidden_BKTH = torch.randn(questions, prompts, tokens, hidden, **where).mul_(apart)
    hidden_BKTH += torch.randn(questions, 1, tokens, hidden, **where)
    weight_VH = torch.randn(vocabulary, hidden, **where).mul_(NATS / hidden**0.5)
    labels_BKT = torch.randint(
        vocabulary, (questions, 1, tokens), generator=dice, device=device
    ).expand(-1, prompts, -1)
    given = {
        "hidden": hidden_BKTH.flatten(0, 2).requires_grad_(case.backward),
        "weight": weight_VH.requires_grad_(case.backward),
        "labels": labels_BKT.flatten(),
    }
    if "M" in case.sizes:
        upstream_M = torch.randn(tokens, generator=dice, device=device)
        return given | {"upstream": upstream_M}
    scores_BK = torch.randn(questions, prompts, generator=dice, device=device) / 2
    scores_BK[:, kept_chunks(case) :] = -200.0  # far below what answers' log-probabilities differ
    pair_M = torch.arange(questions * prompts, device=device).repeat_interleave(tokens)
    return given | {"scores": scores_BK.requires_grad_(case.backward), "pair": pair_M}


def marginal(given: Inputs, logp_M: Tensor) -> Tensor:
    """Mean over the questions of -log sum_k p(k) p(y|k), in nats."""
    scores_BK = given["scores"]
    answer_BK = logp_M.view(*scores_BK.shape, -1).sum(-1)
    return -(scores_BK.log_softmax(-1) + answer_BK).logsumexp(-1).mean()


def plain_answer(given: Inputs, case: Case) -> Outputs:
    """(logp_M,)"""
    return (plain_logp(*rows_of(given)),)


def plain_rag(given: Inputs, case: Case) -> Outputs:
    """(loss,)"""
    return (marginal(given, plain_logp(*rows_of(given))),)


def rag2_answer(impl: str) -> Provider:
    """`rag2_kernels.answer_logprob`."""

    def call(given: Inputs, case: Case) -> Outputs:
        return (rag2_kernels.answer_logprob(*rows_of(given), impl=impl),)

    return ours(call, "answer_logprob", impl)


def rag2_rag(impl: str) -> Provider:
    """`rag2_kernels.rag_loss`, prompts below SKIPPED left out."""

    def call(given: Inputs, case: Case) -> Outputs:
        rest = (given["pair"], given["scores"])
        done = rag2_kernels.rag_loss(*rows_of(given), *rest, skip_below=SKIPPED, impl=impl)
        return (done.loss,)

    return ours(call, "rag_loss", impl)


def rows_in(case: Case) -> int:
    """M."""
    if "M" in case.sizes:
        return case.sizes["M"]
    questions, prompts, tokens = case.of("BKT")
    return questions * prompts * tokens


def flops(case: Case) -> float:
    """2 M H V forward and 4 f M H V backward."""
    hidden, vocabulary = case.of("HV")
    return (2 + 4 * case.f * case.backward) * rows_in(case) * hidden * vocabulary


def moved(case: Case) -> float:
    """hidden, weight, labels and log-probabilities; backward, the gradients as well."""
    hidden, vocabulary = case.of("HV")
    matrices = (rows_in(case) + vocabulary) * hidden * case.bytes_each
    return matrices * (1 + case.backward) + rows_in(case) * (8 + 4)


def _answer(rows: int, hidden: int, vocabulary: int, **more) -> Case:
    return Case({"M": rows, "H": hidden, "V": vocabulary}, **{"dtype": HALF, **more})


def _pair(f: float, *sizes: int, **more) -> tuple[Case, Case]:
    """Of B, K, T, H, V: with all rows, and with the share f of them."""
    whole = Case(dict(zip("BKTHV", sizes, strict=True)), **{"dtype": HALF, "backward": True} | more)
    return whole, replace(whole, f=f)


_long = _pair(5 / 16, 16, 16, 32, 4096, 131_072)

ANSWER = Op(
    name="answer_logprob",
    suites={
        "gpu": (
            _answer(16_384, 4096, 131_072, target_ms=26.5),
            _answer(16_384, 1024, 151_936, target_ms=8.3),
            *swept(_answer(252, 123, 507), _answer(256, 128, 1000)),
        ),
        "cpu": (_answer(2048, 256, 32_000, dtype=torch.float32),),
        "tiny": (_answer(33, 24, 70), *swept(_answer(33, 24, 70))[-1:]),
    },
    make=make_rows,
    leaves=("hidden", "weight"),
    providers={
        "plain": Provider(plain_answer),
        "rag2_torch": rag2_answer("torch"),
        "rag2_triton": rag2_answer("triton"),
        "compiled": compiled(plain_answer),
        **peers(lambda given, logp_M: logp_M),
    },
    exact=lambda given, case: (exact_logp(given),),
    flops=flops,
    moved=moved,
)

RAG = Op(
    name="rag_loss",
    suites={
        "gpu": (
            replace(_long[0], target_ms=40.0),
            replace(_long[1], target_ms=23.0),
            *_pair(5 / 16, 32, 16, 32, 1024, 151_936, target_mib=1024.0),
            *(replace(case, target_ms=19.0 if case.f == 1 else None)
              for case in _pair(5 / 16, 8, 16, 32, 4096, 128_256)),
            *swept(*_pair(0.4, 3, 5, 7, 123, 507), *_pair(0.25, 4, 4, 8, 128, 1000)),
        ),
        "cpu": (
            *_pair(0.25, 8, 8, 32, 256, 32_000, dtype=torch.float32),
            _pair(0.625, 8, 8, 32, 256, 32_000, dtype=torch.float32)[1],  # the almanac's mean f
            *_pair(0.25, 8, 8, 32, 256, 151_936, dtype=torch.float32, turn=FURTHER),
        ),
        "tiny": _pair(0.5, 2, 4, 2, 16, 70, dtype=torch.float32),
    },
    make=make_rows,
    leaves=("hidden", "weight", "scores"),
    providers={
        "plain": Provider(plain_rag),
        "rag2_torch": rag2_rag("torch"),
        "rag2_triton": rag2_rag("triton"),
        "compiled": compiled(plain_rag),
        **peers(marginal),
    },
    exact=lambda given, case: (marginal(given, exact_logp(given)),),
    flops=flops,
    moved=moved,
)  # fmt: skip
