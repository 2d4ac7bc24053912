"""Triton kernels of the cost ``l1`` and its gradients: a program adds up one tile of the result."""

import triton
import triton.language as tl


@triton.jit
def l1_cost(
    x,
    y,
    C,
    N,
    M,
    D,
    x_b,
    x_n,
    y_b,
    y_m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``C_ij = sum_d |x_id - y_jd|``, in sums of CHUNK features each."""
    dtype: tl.constexpr = C.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    xs = x + problem * x_b + row.to(tl.int64) * x_n
    ys = y + problem * y_b + column.to(tl.int64) * y_m
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype)
    for start in range(0, D, CHUNK):
        part = tl.zeros([BLOCK_N, BLOCK_M], dtype)
        for d in range(start, tl.minimum(start + CHUNK, D)):
            p = tl.load(xs + d, mask=row < N, other=0)
            q = tl.load(ys + d, mask=column < M, other=0)
            part += tl.abs(p[:, None] - q[None, :])
        total += part
    at = (problem * N + row)[:, None] * M + column[None, :]
    tl.store(C + at, total, mask=(row < N)[:, None] & (column < M)[None, :])


@triton.jit
def l1_side(
    G,
    x,
    y,
    dx,
    N,
    M,
    D,
    G_b,
    G_n,
    G_m,
    x_b,
    x_n,
    y_b,
    y_m,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``dx_id = sum_j G_ij sign(x_id - y_jd)``, in sums of CHUNK points each."""
    dtype: tl.constexpr = dx.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (feature < D)[None, :]
    at = row.to(tl.int64)[:, None] * x_n + feature[None, :]
    p = tl.load(x + problem * x_b + at, mask=inside, other=0)
    weights = G + problem * G_b + row.to(tl.int64) * G_n
    points = y + problem * y_b + feature
    step_w, step_p = tl.cast(G_m, tl.int64), tl.cast(y_m, tl.int64)  # a 1 is no tensor
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    for start in range(0, M, CHUNK):
        part = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        for j in range(start, tl.minimum(start + CHUNK, M)):
            w = tl.load(weights + j * step_w, mask=row < N, other=0)[:, None]
            t = p - tl.load(points + j * step_p, mask=feature < D, other=0)[None, :]
            part += tl.where(t > 0, w, tl.where(t < 0, -w, 0))
        total += part
    at = (problem * N + row)[:, None] * D + feature[None, :]
    tl.store(dx + at, total, mask=inside)
