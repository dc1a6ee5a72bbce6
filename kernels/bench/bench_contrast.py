"""info_nce (forward and backward): B queries against N chunks of width D, one positive each."""

import torch
from op import (
    FURTHER,
    HALF,
    Case,
    Inputs,
    Op,
    Outputs,
    Provider,
    blocks,
    compiled,
    generator,
    ours,
    swept,
    unit_rows,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import rag2_kernels

SCALE = 20.0  # of a cosine


def make(case: Case, device: torch.device) -> Inputs:
    """queries_BD, chunks_ND of length 1 and positive_B; a query leans towards its positive."""
    queries, chunks, width = case.of("BND")
    dice = generator(device)
    where = {"generator": dice, "device": device}
    chunks_ND = torch.randn(chunks, width, **where, dtype=case.dtype)
    positive_B = torch.randperm(chunks, **where)[:queries]
    queries_BD = torch.randn(queries, width, **where, dtype=case.dtype)
    queries_BD += 0.2 * chunks_ND[positive_B]
    return {
        "queries": unit_rows(queries_BD).requires_grad_(case.backward),
        "chunks": unit_rows(chunks_ND).requires_grad_(case.backward),
        "positive": positive_B,
    }


def plain(given: Inputs, case: Case) -> Outputs:
    """The matrix of similarities, then cross_entropy."""
    similarity_BN = (given["queries"] @ given["chunks"].T).float() * SCALE
    return (cross_entropy(similarity_BN, given["positive"]),)


def rag2(impl: str) -> Provider:
    """`rag2_kernels.info_nce`."""

    def call(given: Inputs, case: Case) -> Outputs:
        rows = (given["queries"], given["chunks"], given["positive"])
        return (rag2_kernels.info_nce(*rows, SCALE, impl=impl),)

    return ours(call, "info_nce", impl)


def exact(given: Inputs, case: Case) -> Outputs:
    """In fp64, similarities of a block of queries at a time, computed again for the gradients."""
    chunks_ND = given["chunks"].double()

    def nll(queries_bD: Tensor, chunks_ND: Tensor, positive_b: Tensor) -> Tensor:
        similarity_bN = SCALE * queries_bD.double() @ chunks_ND.T
        return cross_entropy(similarity_bN, positive_b, reduction="sum")

    total = chunks_ND.new_zeros(())
    for some in blocks(len(given["queries"]), len(chunks_ND), chunks_ND.device):
        rows = (given["queries"][some], chunks_ND, given["positive"][some])
        total = total + checkpoint(nll, *rows, use_reentrant=False)
    return (total / len(given["queries"]),)


def flops(case: Case) -> float:
    """2 B N D forward and 4 B N D backward."""
    queries, chunks, width = case.of("BND")
    return (2 + 4 * case.backward) * queries * chunks * width


def moved(case: Case) -> float:
    """Queries, chunks and positives; backward, the gradients as well."""
    queries, chunks, width = case.of("BND")
    return (queries + chunks) * width * case.bytes_each * (1 + case.backward) + 8 * queries


def _case(queries: int, chunks: int, width: int, **more) -> Case:
    sizes = {"B": queries, "N": chunks, "D": width}
    return Case(sizes, **{"dtype": HALF, "backward": True, **more})


OP = Op(
    name="info_nce",
    suites={
        "gpu": (
            _case(32_768, 65_536, 768, target_ms=23.0),
            _case(16_384, 32_768, 768, turn=FURTHER),
            *swept(_case(63, 127, 41), _case(128, 256, 64)),
        ),
        "cpu": (_case(512, 2048, 256, dtype=torch.float32),),
        "tiny": (_case(9, 21, 12, dtype=torch.float32),),
    },
    make=make,
    leaves=("queries", "chunks"),
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
