"""marginal_nll (forward; in the sweep also backward): B questions, K chunks, T answer tokens."""

import torch
from op import Case, Inputs, Op, Outputs, Provider, compiled, generator, ours, swept
from torch import Tensor

import rag2_kernels


def make(case: Case, device: torch.device) -> Inputs:
    """scores_BK, logp_BKT in nats, mask_BKT with answers of different lengths."""
    questions, chunks, tokens = case.of("BKT")
    dice = generator(device)
    where = {"generator": dice, "device": device}
    scores_BK = torch.randn(questions, chunks, **where).to(case.dtype)
    logp_BKT = torch.rand(questions, chunks, tokens, **where).mul_(-0.3).to(case.dtype)
    lengths_B = torch.randint(1, tokens + 1, (questions, 1, 1), **where)
    mask_BKT = torch.arange(tokens, device=device) < lengths_B
    return {
        "scores": scores_BK.requires_grad_(case.backward),
        "logp": logp_BKT.requires_grad_(case.backward),
        "mask": mask_BKT.expand(-1, chunks, -1).contiguous(),
        "upstream": torch.randn(questions, **where),
    }


def plain(given: Inputs, case: Case) -> Outputs:
    """(loss_B, posterior_BK)"""
    return _marginal(given["scores"].float(), given["logp"].float(), given["mask"])


def exact(given: Inputs, case: Case) -> Outputs:
    """In fp64."""
    return _marginal(given["scores"].double(), given["logp"].double(), given["mask"])


def _marginal(scores_BK: Tensor, logp_BKT: Tensor, mask_BKT: Tensor) -> Outputs:
    joint_BK = scores_BK.log_softmax(-1) + (logp_BKT * mask_BKT).sum(-1)
    return -joint_BK.logsumexp(-1), joint_BK.detach().softmax(-1)


def rag2(impl: str) -> Provider:
    """`rag2_kernels.marginal_nll`."""

    def call(given: Inputs, case: Case) -> Outputs:
        return rag2_kernels.marginal_nll(given["scores"], given["logp"], given["mask"], impl=impl)

    return ours(call, "marginal_nll", impl)


def flops(case: Case) -> float:
    """An addition a token; as many products backward."""
    questions, chunks, tokens = case.of("BKT")
    return questions * chunks * tokens * (1 + case.backward)


def moved(case: Case) -> float:
    """Scores, log-probabilities and mask in, losses and posteriors out; backward, gradients out."""
    questions, chunks, tokens = case.of("BKT")
    floats = questions * chunks * (tokens + 1) * case.bytes_each
    out = questions * (1 + chunks) * 4
    return floats * (1 + case.backward) + questions * chunks * tokens + out


def _case(questions: int, chunks: int, tokens: int, **more) -> Case:
    return Case({"B": questions, "K": chunks, "T": tokens}, **more)


OP = Op(
    name="marginal_nll",
    suites={
        "gpu": (
            _case(512, 16, 128, target_ms=0.012),
            _case(8192, 32, 256, target_ms=0.15),
            *swept(_case(5, 3, 7), _case(33, 17, 130)),
        ),
        "cpu": (_case(64, 8, 32),),
        "tiny": (_case(4, 3, 5), *swept(_case(4, 3, 5))[-1:]),
    },
    make=make,
    leaves=("scores", "logp"),
    providers={
        "plain": Provider(plain),
        "rag2_torch": rag2("torch"),
        "rag2_triton": rag2("triton"),
        "compiled": compiled(plain),
    },
    exact=exact,
    flops=flops,
    moved=moved,
)
