"""Every operation of the package, and the order in which a suite runs their shapes."""

import bench_contrast
import bench_linear
import bench_marginal
import bench_pool
import bench_search
from op import SHORT, Case, Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        bench_linear.RAG,
        bench_linear.ANSWER,
        bench_search.OP,
        bench_contrast.OP,
        bench_marginal.OP,
        bench_pool.OP,
    )
}


def cases(suite: str, names: list[str], dtypes: list[str]) -> list[tuple[Op, Case]]:
    """Of some operations and dtypes (of none named: all), headlines first."""
    chosen = [
        (op, case)
        for op in OPS.values()
        if not names or op.name in names
        for case in op.suites[suite]
        if not dtypes or SHORT[case.dtype] in dtypes
    ]
    return sorted(chosen, key=lambda pair: pair[1].turn)
