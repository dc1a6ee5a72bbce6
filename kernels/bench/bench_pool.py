"""masked_mean_pool (forward and backward): states of B texts of L tokens, width H, to length 1."""

import torch
from op import HALF, Case, Inputs, Op, Outputs, Provider, compiled, generator, ours, swept
from torch import Tensor
from torch.nn.functional import normalize

import rag2_kernels


def make(case: Case, device: torch.device) -> Inputs:
    """hidden_BLH, mask_BL with texts of different lengths, upstream_BH."""
    texts, tokens, width = case.of("BLH")
    dice = generator(device)
    where = {"generator": dice, "device": device}
    hidden_BLH = torch.randn(texts, tokens, width, **where, dtype=case.dtype)
    lengths_B1 = torch.randint(1, tokens + 1, (texts, 1), **where)
    return {
        "hidden": hidden_BLH.requires_grad_(case.backward),
        "mask": torch.arange(tokens, device=device) < lengths_B1,
        "upstream": torch.randn(texts, width, **where),
    }


def plain(given: Inputs, case: Case) -> Outputs:
    """The masked states, their sum, the length of the mean."""
    return (_pooled(given["hidden"].float(), given["mask"]),)


def exact(given: Inputs, case: Case) -> Outputs:
    """In fp64."""
    return (_pooled(given["hidden"].double(), given["mask"]),)


def _pooled(hidden_BLH: Tensor, mask_BL: Tensor) -> Tensor:
    sum_BH = (hidden_BLH * mask_BL[..., None]).sum(1)
    return normalize(sum_BH / mask_BL.sum(1, keepdim=True), dim=-1)


def rag2(impl: str) -> Provider:
    """`rag2_kernels.masked_mean_pool`."""

    def call(given: Inputs, case: Case) -> Outputs:
        return (rag2_kernels.masked_mean_pool(given["hidden"], given["mask"], impl=impl),)

    return ours(call, "masked_mean_pool", impl)


def flops(case: Case) -> float:
    """An addition a number of the states; a product backward."""
    texts, tokens, width = case.of("BLH")
    return texts * tokens * width * (1 + case.backward)


def moved(case: Case) -> float:
    """States and mask in, embeddings in fp32 out; backward, the gradient of the states out."""
    texts, tokens, width = case.of("BLH")
    states = texts * tokens * width * case.bytes_each
    return states * (1 + case.backward) + texts * tokens + texts * width * 4


def _case(texts: int, tokens: int, width: int, **more) -> Case:
    sizes = {"B": texts, "L": tokens, "H": width}
    return Case(sizes, **{"dtype": HALF, "backward": True, **more})


OP = Op(
    name="masked_mean_pool",
    suites={
        "gpu": (
            _case(1024, 512, 768, target_ms=0.43),
            *swept(_case(3, 33, 20), _case(16, 129, 384)),
        ),
        "cpu": (_case(64, 128, 256, dtype=torch.float32),),
        "tiny": (_case(3, 7, 10, dtype=torch.float32), _case(3, 7, 10)),
    },
    make=make,
    leaves=("hidden",),
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
