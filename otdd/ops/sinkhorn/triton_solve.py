"""Triton kernels that solve: one program has one problem, whole, in one launch."""

import triton
import triton.language as tl

from otdd.ops.sinkhorn.triton_parts import (
    LN2,
    add_terms,
    column_lse,
    conjugate,
    kept,
    load_penalty,
    load_tile,
    load_weights,
    log2_weights,
    row_error,
    row_terms,
)


@triton.jit
def solve_resident(
    C,
    a,
    b,
    eps,
    rho_a,
    rho_b,
    g0,
    f_out,
    g_out,
    cost_out,
    error_out,
    n_iter_out,
    history,
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
    g_b,
    g_m,
    max_iter,
    tol,
    SINKD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A problem whose costs stay in registers: one exponential an entry and iteration.

    The terms E of the rows' sums give the columns' as well, ``sum_i w_i E_ij`` with a weight a row;
    where a column's entries may have been flushed to 0, its terms are made anew.
    """
    dtype: tl.constexpr = C.dtype.element_ty
    # What is lost below the smallest number must not touch a sum of 128 terms.
    LEAST: tl.constexpr = 2.0**-94 if dtype == tl.float32 else 2.0**-960
    problem = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    e = tl.load(eps + problem * eps_b)
    rho_a_, damp_a = load_penalty(rho_a, problem, rho_a_b, e, dtype)
    _, damp_b = load_penalty(rho_b, problem, rho_b_b, e, dtype)
    unit = (e * LN2).to(dtype)
    wa = load_weights(a, problem, a_b, a_n, row, N, dtype, SINKD)
    wb = load_weights(b, problem, b_b, b_m, column, M, dtype, SINKD)
    log_a, log_b = log2_weights(wa), log2_weights(wb)
    masked = tl.sum(((wb == 0) & (column < M)).to(tl.int32), 0) > 0
    cost = load_tile(C + problem * C_b, C_n, row, column, N, M) * (1 / (e * LN2)).to(dtype)

    g = tl.zeros([BLOCK_M], dtype)
    if g0 is not None:
        g = tl.load(g0 + problem * g_b + column.to(tl.int64) * g_m, mask=column < M, other=0) / unit
    u = tl.zeros([BLOCK_N], dtype)
    total = tl.full((), 0, dtype)
    error = tl.full((), 0, dtype)
    steps = 0
    going = True
    while going:
        used = log_b > float("-inf")
        if history is not None:
            past = history + (problem * (max_iter + 1) + steps) * (N + M)
            tl.store(past + row, u.to(tl.float64) * (e * LN2), mask=row < N)
            kept_g = tl.where(used, g, 0).to(tl.float64) * (e * LN2)
            tl.store(past + N + column, kept_g, mask=column < M)
        v = tl.where(used, log_b + g, float("-inf"))
        top, terms = row_terms(v, cost)
        lse = top + tl.log2(tl.sum(terms, 1))
        last = steps == max_iter
        if last | (tol > 0):
            weights = load_weights(a, problem, a_b, a_n, row, N, dtype, SINKD)
            errors = row_error(log_a, u, lse, weights, unit, rho_a_, rho_a is None)
            error = tl.sum(errors, 0)
            last = last | ((steps > 0) & (tol > 0) & (error <= tol))
        logs = g
        if last:
            by_row = tl.sum(terms * cost, 1) * unit
            total = tl.sum(tl.where(log_a > float("-inf"), tl.exp2(log_a + u + top) * by_row, 0), 0)
            anew = masked
        else:
            u = -damp_a * lse
            weight = log_a + (u + top)
            highest = tl.max(weight, 0)
            sums = tl.where(used, tl.sum(terms * tl.exp2(weight - highest)[:, None], 0), 1)
            anew = tl.min(sums, 0) < LEAST
            logs = highest + tl.log2(tl.where(sums < LEAST, 1, sums)) - tl.where(used, v, 0)
            steps += 1
        if anew:
            logs = column_lse(log_a + u, cost)
        g = tl.where(last & used, g, -damp_b * logs)
        going = not last

    tl.store(f_out + problem * N + row, u * unit, mask=row < N)
    tl.store(g_out + problem * M + column, g * unit, mask=column < M)
    tl.store(cost_out + problem, total)
    tl.store(error_out + problem, error)
    tl.store(n_iter_out + problem, steps.to(tl.int64))


@triton.jit
def solve_streamed(
    C,
    a,
    b,
    eps,
    rho_a,
    rho_b,
    g0,
    f_out,
    g_out,
    cost_out,
    error_out,
    n_iter_out,
    history,
    scratch,
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
    g_b,
    g_m,
    max_iter,
    tol,
    SINKD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A problem of any size: costs are read anew, twice an iteration, and so are exponentials.

    Other threads read what one has written to memory, hence the barriers. `scratch` holds the
    rows' logarithms of this step and of the one before, and g.
    """
    dtype: tl.constexpr = C.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    C += problem * C_b
    scratch += problem * (2 * N + M)
    e = tl.load(eps + problem * eps_b)
    rho_a_, damp_a = load_penalty(rho_a, problem, rho_a_b, e, dtype)
    _, damp_b = load_penalty(rho_b, problem, rho_b_b, e, dtype)
    unit, per_unit = (e * LN2).to(dtype), (1 / (e * LN2)).to(dtype)
    g_row = scratch + 2 * N
    for j in range(0, M, BLOCK_M):
        column = j + tl.arange(0, BLOCK_M)
        g = tl.zeros([BLOCK_M], dtype)
        if g0 is not None:
            g = (
                tl.load(g0 + problem * g_b + column.to(tl.int64) * g_m, mask=column < M, other=0)
                / unit
            )
        tl.store(g_row + column, g, mask=column < M)

    steps = 0
    error = tl.full((), 0, dtype)
    going = True
    while going:
        tl.debug_barrier()
        now, before = scratch + (steps % 2) * N, scratch + (1 - steps % 2) * N
        errors = tl.zeros([BLOCK_N], dtype)
        for i in range(0, N, BLOCK_N):
            row = i + tl.arange(0, BLOCK_N)
            top, sums = tl.full([BLOCK_N], float("-inf"), dtype), tl.zeros([BLOCK_N], dtype)
            for j in range(0, M, BLOCK_M):
                column = j + tl.arange(0, BLOCK_M)
                v = log2_weights(load_weights(b, problem, b_b, b_m, column, M, dtype, SINKD))
                v += tl.load(g_row + column, mask=column < M, other=0)
                cost = load_tile(C, C_n, row, column, N, M) * per_unit
                top, sums = add_terms(top, sums, v[None, :] - cost, 1)
            lse = top + tl.log2(sums)
            if steps > 0:
                weights = load_weights(a, problem, a_b, a_n, row, N, dtype, SINKD)
                u = -damp_a * tl.load(before + row, mask=row < N, other=0)
                log_a = log2_weights(weights)
                errors += row_error(log_a, u, lse, weights, unit, rho_a_, rho_a is None)
            tl.store(now + row, lse, mask=row < N)
        error = tl.sum(errors, 0)
        if history is not None:
            past = history + (problem * (max_iter + 1) + steps) * (N + M)
            for i in range(0, N, BLOCK_N):
                row = i + tl.arange(0, BLOCK_N)
                u = -damp_a * tl.load(before + row, mask=(row < N) & (steps > 0), other=0)
                tl.store(past + row, u.to(tl.float64) * (e * LN2), mask=row < N)
            for j in range(0, M, BLOCK_M):
                column = j + tl.arange(0, BLOCK_M)
                g = tl.load(g_row + column, mask=column < M, other=0)
                tl.store(past + N + column, g.to(tl.float64) * (e * LN2), mask=column < M)
        going = not ((steps == max_iter) | ((steps > 0) & (tol > 0) & (error <= tol)))
        tl.debug_barrier()
        if going:
            for j in range(0, M, BLOCK_M):
                column = j + tl.arange(0, BLOCK_M)
                top, sums = tl.full([BLOCK_M], float("-inf"), dtype), tl.zeros([BLOCK_M], dtype)
                for i in range(0, N, BLOCK_N):
                    row = i + tl.arange(0, BLOCK_N)
                    w = log2_weights(load_weights(a, problem, a_b, a_n, row, N, dtype, SINKD))
                    w -= damp_a * tl.load(now + row, mask=row < N, other=0)
                    cost = load_tile(C, C_n, row, column, N, M) * per_unit
                    top, sums = add_terms(top, sums, w[:, None] - cost, 0)
                g = -damp_b * (top + tl.log2(sums))
                tl.store(g_row + column, g, mask=column < M)
            steps += 1

    before = scratch + (1 - steps % 2) * N
    totals = tl.zeros([BLOCK_N], dtype)
    for i in range(0, N, BLOCK_N):
        row = i + tl.arange(0, BLOCK_N)
        u = -damp_a * tl.load(before + row, mask=row < N, other=0)
        tl.store(f_out + problem * N + row, u * unit, mask=row < N)
        u += log2_weights(load_weights(a, problem, a_b, a_n, row, N, dtype, SINKD))
        for j in range(0, M, BLOCK_M):
            column = j + tl.arange(0, BLOCK_M)
            g = tl.load(g_row + column, mask=column < M, other=0)
            tl.store(g_out + problem * M + column, g * unit, mask=column < M)
            g += log2_weights(load_weights(b, problem, b_b, b_m, column, M, dtype, SINKD))
            cost = load_tile(C, C_n, row, column, N, M) * per_unit
            totals += tl.sum(tl.exp2(u[:, None] + g[None, :] - cost) * cost, 1)
    tl.store(cost_out + problem, tl.sum(totals, 0) * unit)
    tl.store(error_out + problem, error)
    tl.store(n_iter_out + problem, steps.to(tl.int64))


@triton.jit
def values(
    f,
    g,
    a,
    b,
    eps,
    rho_a,
    rho_b,
    value_out,
    N,
    M,
    a_b,
    a_n,
    b_b,
    b_m,
    eps_b,
    rho_a_b,
    rho_b_b,
    SINKD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`otdd.ops.sinkhorn.reference.dual_value` of each problem."""
    dtype: tl.constexpr = f.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    e = tl.load(eps + problem * eps_b)
    rho_a_, _ = load_penalty(rho_a, problem, rho_a_b, e, dtype)
    rho_b_, _ = load_penalty(rho_b, problem, rho_b_b, e, dtype)
    zeros = tl.zeros([BLOCK], dtype)
    sum_a, sum_b, mass, value = zeros, zeros, zeros, zeros
    for i in range(0, N, BLOCK):
        at = i + tl.arange(0, BLOCK)
        w = load_weights(a, problem, a_b, a_n, at, N, dtype, SINKD)
        x = tl.load(f + problem * N + at, mask=at < N, other=0)
        sum_a += w
        value += w * conjugate(tl.where(w > 0, x, 0), rho_a_)
    for j in range(0, M, BLOCK):
        at = j + tl.arange(0, BLOCK)
        w = load_weights(b, problem, b_b, b_m, at, M, dtype, SINKD)
        x = tl.load(g + problem * M + at, mask=at < M, other=0)
        sum_b += w
        x = tl.where(w > 0, x, 0)
        mass += w * kept(x, rho_b_, rho_b is None)
        value += w * conjugate(x, rho_b_)
    soft = (rho_a_ < float("inf")) | (rho_b_ < float("inf"))
    both = tl.where(soft, tl.sum(sum_a, 0), 0) * tl.where(soft, tl.sum(sum_b, 0), 0)
    added = tl.where(soft, e.to(dtype) * (tl.sum(mass, 0) - both), 0)
    tl.store(value_out + problem, tl.sum(value, 0) - added)
