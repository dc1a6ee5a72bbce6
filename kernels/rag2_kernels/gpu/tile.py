"""The part that all matrix kernels share: which tile a program has, and its product a @ b^T."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def place(pid, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a program: neighbours share a column, and GROUP rows stay in the cache."""
    group = pid // (GROUP * columns)
    wide = tl.minimum(rows - group * GROUP, GROUP)
    inside = pid - group * GROUP * columns
    return group * GROUP + inside % wide, inside // wide


@triton.jit
def product(
    a_desc, b_desc, a_ptr, b_ptr, m0, n0, M, N,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    TMA: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows m0.. of a [M, H] with rows n0.. of b [N, H]: [BM, BN] in ACC, 0 beyond either's end."""
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    h = tl.arange(0, BH)
    acc = tl.zeros([BM, BN], ACC)
    for h0 in range(0, H, BH):
        if TMA:
            a = a_desc.load([m0, h0])
            b = b_desc.load([n0, h0])
        else:
            deep_H = h0 + h < H
            at_a = m.to(tl.int64)[:, None] * H + (h0 + h)[None, :]
            a = tl.load(a_ptr + at_a, mask=(m < M)[:, None] & deep_H[None, :], other=0.0)
            at_b = n.to(tl.int64)[:, None] * H + (h0 + h)[None, :]
            b = tl.load(b_ptr + at_b, mask=(n < N)[:, None] & deep_H[None, :], other=0.0)
        if UP:  # the interpreter multiplies the bits of bfloat16
            a = a.to(ACC)
            b = b.to(ACC)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def narrowed(x, dtype: tl.constexpr, UP: tl.constexpr):
    """To dtype; to bfloat16 in the interpreter, too, rounded to even, where it would cut off."""
    if UP:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
