"""mips_topk (forward): the K largest inner products of B queries with a corpus of N rows, width D.

Rows are of length 1, as embeddings are. Compared are the scores, and the exact scores of the rows:
which of two rows that are equal but for rounding is chosen does not matter.
"""

import importlib

import torch
from op import (
    HALF,
    LAST,
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

import rag2_kernels

TILE = 1 << 16  # corpus rows of the tiled search


def make(case: Case, device: torch.device) -> Inputs:
    """queries_BD and corpus_ND."""
    queries, rows, width = case.of("BND")
    dice = generator(device)
    made = [
        unit_rows(torch.randn(n, width, generator=dice, device=device, dtype=case.dtype))
        for n in (queries, rows)
    ]
    return {
        "queries": made[0].requires_grad_(case.backward),
        "corpus": made[1].requires_grad_(case.backward),
    }


def plain(given: Inputs, case: Case) -> Outputs:
    """All scores, then topk."""
    return tuple((given["queries"] @ given["corpus"].T).topk(case.sizes["K"], dim=1))


def tiled(given: Inputs, case: Case) -> Outputs:
    """A tile's scores and its K best, then the K best of all: how GPU brute force searches."""
    k = case.sizes["K"]
    scores, rows = [], []
    for number, tile_nD in enumerate(given["corpus"].split(TILE)):
        best = (given["queries"] @ tile_nD.T).topk(min(k, len(tile_nD)), dim=1)
        scores.append(best.values)
        rows.append(best.indices + number * TILE)
    best = torch.cat(scores, 1).topk(k, dim=1)
    return best.values, torch.cat(rows, 1).gather(1, best.indices)


def rag2(impl: str) -> Provider:
    """`rag2_kernels.mips_topk`."""

    def call(given: Inputs, case: Case) -> Outputs:
        k = case.sizes["K"]
        return rag2_kernels.mips_topk(given["queries"], given["corpus"], k, impl=impl)

    return ours(call, "mips_topk", impl)


def flashlib(given: Inputs, case: Case) -> Outputs:
    """Nearest rows by squared distance, which are those of the largest products at length 1."""
    search = importlib.import_module("flashlib").flash_knn
    queries_BD, corpus_ND = given["queries"], given["corpus"]
    rows_BK = search(queries_BD, corpus_ND, case.sizes["K"], return_distances=False).long()
    scores_BK = torch.bmm(corpus_ND[rows_BK].float(), queries_BD.float()[..., None])[..., 0]
    return scores_BK, rows_BK


def faiss_flat(given: Inputs, case: Case) -> Outputs:
    """IndexFlatIP; the index, a copy of the corpus in fp32, is built by the first call."""
    faiss = importlib.import_module("faiss")
    if "index" not in given:
        faiss.omp_set_num_threads(torch.get_num_threads())
        given["index"] = faiss.IndexFlatIP(case.sizes["D"])
        given["index"].add(given["corpus"].float().numpy())
    scores_BK, rows_BK = given["index"].search(given["queries"].float().numpy(), case.sizes["K"])
    return torch.from_numpy(scores_BK), torch.from_numpy(rows_BK)


def exact(given: Inputs, case: Case) -> Outputs:
    """In fp64, a block of the corpus at a time, merged."""
    queries_BD, corpus_ND, k = given["queries"].double(), given["corpus"], case.sizes["K"]
    best_BM = rows_BM = None
    for some in blocks(len(corpus_ND), len(queries_BD) + case.sizes["D"], corpus_ND.device):
        block_nD = corpus_ND[some].double()
        scores_BK, rows_BK = (queries_BD @ block_nD.T).topk(min(k, len(block_nD)), dim=1)
        rows_BK = rows_BK + some.start
        if best_BM is not None and rows_BM is not None:
            scores_BK = torch.cat([best_BM, scores_BK], 1)
            rows_BK = torch.cat([rows_BM, rows_BK], 1)
            scores_BK, place_BK = scores_BK.topk(min(k, scores_BK.shape[1]), dim=1)
            rows_BK = rows_BK.gather(1, place_BK)
        best_BM, rows_BM = scores_BK, rows_BK
    assert best_BM is not None and rows_BM is not None
    return best_BM, rows_BM


def judged(given: Inputs, outputs: Outputs) -> Outputs:
    """(scores_BK, exact scores of the rows); gradients as they are."""
    scores_BK, rows_BK, *gradients = outputs
    vectors_BKD = given["corpus"].detach()[rows_BK].double()
    queries_BD1 = given["queries"].detach().double()[..., None]
    return scores_BK, torch.bmm(vectors_BKD, queries_BD1)[..., 0], *gradients


def flops(case: Case) -> float:
    """2 B N D; the gradient is of K rows a query: 4 B K D."""
    queries, rows, width, k = case.of("BNDK")
    return 2 * queries * rows * width + 4 * queries * k * width * case.backward


def moved(case: Case) -> float:
    """Queries and corpus, scores in fp32 and rows in int64; backward, gradients of their size."""
    queries, rows, width, k = case.of("BNDK")
    matrices = (queries + rows) * width * case.bytes_each
    return matrices * (1 + case.backward) + queries * k * (4 + 8)


def _case(queries: int, rows: int, width: int, k: int, **more) -> Case:
    sizes = {"B": queries, "N": rows, "D": width, "K": k}
    return Case(sizes, **{"dtype": HALF, **more})


OP = Op(
    name="mips_topk",
    suites={
        "gpu": (
            _case(1024, 1_000_000, 768, 16, target_ms=2.7),
            _case(4096, 1_000_000, 128, 16, target_ms=2.5),
            _case(8192, 200_000, 256, 16, target_ms=1.7),
            _case(16_384, 100_000, 128, 32, target_ms=1.3),
            _case(1, 1_000_000, 768, 10, target_ms=0.42),
            _case(32, 1_000_000, 768, 10, target_ms=0.42),
            _case(1024, 21_000_000, 768, 16, target_ms=55.0, turn=LAST),
            *swept(_case(7, 1003, 48, 5), _case(1, 5000, 33, 10), _case(130, 20_000, 64, 16)),
        ),
        "cpu": (_case(64, 100_000, 256, 16, dtype=torch.float32),),
        "tiny": (
            _case(5, 300, 20, 4, dtype=torch.float32),
            *swept(_case(3, 150, 16, 2))[:1],
        ),
    },
    make=make,
    leaves=("queries", "corpus"),
    providers={
        "plain": Provider(plain),
        "rag2_torch": rag2("torch"),
        "rag2_triton": rag2("triton"),
        "compiled": compiled(plain),
        "tiled": Provider(tiled, note="stands for GPU brute force of FAISS and cuVS"),
        "flashlib": Provider(flashlib, ("flashlib", "triton"), gpu_only=True),
        "faiss": Provider(faiss_flat, ("faiss",), cpu_only=True, note="its index holds a copy"),
    },
    exact=exact,
    flops=flops,
    moved=moved,
    judged=judged,
)
