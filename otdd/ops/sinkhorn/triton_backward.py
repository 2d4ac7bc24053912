"""Triton kernels for what follows a solve: the plan, and the derivative of its iterations."""

import triton
import triton.language as tl

from otdd.ops.sinkhorn.triton_parts import (
    LN2,
    add_tile,
    add_weights,
    load_penalty,
    load_tile,
    load_weights,
    log2_weights,
)


@triton.jit
def plan(
    C,
    f,
    g,
    a,
    b,
    eps,
    scale,
    P,
    N,
    M,
    C_b,
    C_n,
    f_b,
    f_n,
    g_b,
    g_m,
    a_b,
    a_n,
    b_b,
    b_m,
    eps_b,
    scale_b,
    SINKD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``scale a_i b_j exp((f_i + g_j - C_ij) / eps)``, 0 where a weight is."""
    dtype: tl.constexpr = C.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    wa = load_weights(a, problem, a_b, a_n, row, N, dtype, SINKD)
    wb = load_weights(b, problem, b_b, b_m, column, M, dtype, SINKD)
    x = tl.load(f + problem * f_b + row * f_n, mask=row < N, other=0)
    y = tl.load(g + problem * g_b + column * g_m, mask=column < M, other=0)
    per_unit = (1 / (tl.load(eps + problem * eps_b) * LN2)).to(dtype)
    logs = (
        x[:, None] + y[None, :] - load_tile(C + problem * C_b, C_n, row, column, N, M)
    ) * per_unit
    used = (wa > 0)[:, None] & (wb > 0)[None, :]
    mass = tl.exp2(tl.where(used, logs, float("-inf"))) * wa[:, None] * wb[None, :]
    if scale is not None:
        mass *= tl.load(scale + problem * scale_b)
    at = (problem * N + row)[:, None] * M + column[None, :]
    tl.store(P + at, mass, mask=(row < N)[:, None] & (column < M)[None, :])


@triton.jit
def backward_unrolled(
    C,
    a,
    b,
    eps,
    rho_a,
    rho_b,
    history,
    n_iter,
    df,
    dg,
    dC,
    da,
    db,
    N,
    M,
    C_b,
    C_n,
    a_b,
    a_n,
    b_b,
    b_m,
    eps_b,
    rho_a_b,
    rho_b_b,
    steps,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Reverse of a solve's steps; see `otdd.ops.sinkhorn.reference._unrolled`.

    `df` and `dg` are used up; `dC`, `da` and `db` begin as zeros. Other threads read what one has
    written to memory, hence the barriers.
    """
    dtype: tl.constexpr = C.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    C, dC = C + problem * C_b, dC + problem * N * M
    df, dg, da, db = df + problem * N, dg + problem * M, da + problem * N, db + problem * M
    e = tl.load(eps + problem * eps_b)
    _, damp_a = load_penalty(rho_a, problem, rho_a_b, e, dtype)
    _, damp_b = load_penalty(rho_b, problem, rho_b_b, e, dtype)
    per_unit = 1 / (e * LN2)
    step = tl.load(n_iter + problem)
    history += (problem * steps + step) * (N + M)
    while step > 0:
        for i in range(0, N, BLOCK_N):
            row = i + tl.arange(0, BLOCK_N)
            wa = load_weights(a, problem, a_b, a_n, row, N, dtype, False)
            u = (tl.load(history + row, mask=row < N, other=0) * per_unit).to(dtype)
            u += log2_weights(wa)
            flows = tl.zeros([BLOCK_N], dtype)
            for j in range(0, M, BLOCK_M):
                column = j + tl.arange(0, BLOCK_M)
                wb = load_weights(b, problem, b_b, b_m, column, M, dtype, False)
                v = tl.load(history + N + column, mask=column < M, other=0) * per_unit
                v = tl.where(wb > 0, v.to(dtype) / damp_b, float("-inf"))
                slope = damp_b * tl.load(dg + column, mask=column < M, other=0)
                cost = load_tile(C, C_n, row, column, N, M) * per_unit.to(dtype)
                flow = tl.exp2(u[:, None] + v[None, :] - cost) * slope[None, :]
                add_tile(dC, M, row, column, N, M, flow)
                flows += tl.sum(flow, 1)
            old = tl.load(df + row, mask=row < N, other=0)
            tl.store(df + row, old - flows, mask=row < N)
            add_weights(da, wa, row, N, -e.to(dtype) * flows)
        tl.debug_barrier()
        history -= N + M
        for j in range(0, M, BLOCK_M):
            column = j + tl.arange(0, BLOCK_M)
            wb = load_weights(b, problem, b_b, b_m, column, M, dtype, False)
            v = tl.load(history + N + column, mask=column < M, other=0) * per_unit
            v = v.to(dtype) + log2_weights(wb)
            flows = tl.zeros([BLOCK_M], dtype)
            for i in range(0, N, BLOCK_N):
                row = i + tl.arange(0, BLOCK_N)
                wa = load_weights(a, problem, a_b, a_n, row, N, dtype, False)
                u = tl.load(history + N + M + row, mask=row < N, other=0) * per_unit
                u = tl.where(wa > 0, u.to(dtype) / damp_a, float("-inf"))
                slope = damp_a * tl.load(df + row, mask=row < N, other=0)
                cost = load_tile(C, C_n, row, column, N, M) * per_unit.to(dtype)
                flow = tl.exp2(u[:, None] + v[None, :] - cost) * slope[:, None]
                add_tile(dC, M, row, column, N, M, flow)
                flows += tl.sum(flow, 0)
            tl.store(dg + column, -flows, mask=column < M)
            add_weights(db, wb, column, M, -e.to(dtype) * flows)
        tl.debug_barrier()
        for i in range(0, N, BLOCK_N):
            row = i + tl.arange(0, BLOCK_N)
            tl.store(df + row, tl.zeros([BLOCK_N], dtype), mask=row < N)
        tl.debug_barrier()
        step -= 1
