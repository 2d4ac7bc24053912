"""What the Triton kernels of `sinkhorn` share.

Potentials are kept over eps ln 2, so that exponentials are powers of two: ``u = f / (eps ln 2)``,
``v = log2 b + g / (eps ln 2)`` and, with ``k = 1 / (eps ln 2)``, the logarithms of a row's terms
are ``v_j - k C_ij``. A weight of 0 is -inf there; -inf is never subtracted from itself.
"""

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def log2_weights(w):
    """-inf for 0."""
    return tl.where(w > 0, tl.log2(tl.where(w > 0, w, 1)), float("-inf"))


@triton.jit
def load_weights(w, problem, stride_b, stride, at, n, dtype: tl.constexpr, SINKD: tl.constexpr):
    """Weights at indices `at`, 0 beyond `n`; equal ones where none are given."""
    if w is not None:
        return tl.load(w + problem * stride_b + at.to(tl.int64) * stride, mask=at < n, other=0)
    one = tl.full((), 1, tl.float64)
    equal = one if SINKD else one / n
    return tl.where(at < n, equal.to(dtype), 0)


@triton.jit
def load_tile(of, stride, row, column, N, M):
    """Entries of a matrix, 0 beyond it."""
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(of + at, mask=(row < N)[:, None] & (column < M)[None, :], other=0)


@triton.jit
def load_penalty(rho, problem, stride, eps, dtype: tl.constexpr):
    """A penalty rho and its ``rho / (rho + eps)``; infinite and 1 where there is none."""
    r = tl.full((), float("inf"), tl.float64) if rho is None else tl.load(rho + problem * stride)
    return r.to(dtype), (1 / (1 + eps / r)).to(dtype)


@triton.jit
def kept(f, rho, HARD: tl.constexpr):
    """``exp(-f / rho)``: the part of its weight that a point keeps."""
    return f * 0 + 1 if HARD else tl.exp(-f / rho)


@triton.jit
def conjugate(f, rho):
    """``rho (1 - exp(-f / rho))``, or f for an infinite rho, without cancellation."""
    hard = rho == float("inf")
    finite = tl.where(hard, 1, rho)
    x = tl.where(hard, 0, -f / finite)
    small = tl.abs(x) < 0.35
    near = tl.where(small, x, 0)
    series = near * (1 / 15)
    for i in tl.static_range(14):
        series = (1 + series) * near * (1 / (14 - i))
    soft = -finite * tl.where(small, series, tl.exp(tl.where(small, 0, x)) - 1)
    return tl.where(hard, f, soft)


@triton.jit
def row_error(weight_log, u, lse, a, unit, rho_a, HARD: tl.constexpr):
    """``|sum_j P_ij - a_i exp(-f_i / rho_a)|`` of rows whose terms have the logarithm `lse`."""
    gap = tl.exp2(weight_log + u + lse) - a * kept(tl.where(a > 0, u * unit, 0), rho_a, HARD)
    return tl.where(a > 0, tl.abs(gap), 0)


@triton.jit
def row_terms(v, cost):
    """``max_j`` and ``2^(term - max)`` of a tile's rows. One v is finite at least."""
    logs = v[None, :] - cost
    top = tl.max(logs, 1)
    return top, tl.exp2(logs - top[:, None])


@triton.jit
def column_lse(weighted_u, cost):
    """``log2 sum_i 2^(weighted_u_i - cost_ij)``. One weighted_u is finite at least."""
    logs = weighted_u[:, None] - cost
    top = tl.max(logs, 0)
    return top + tl.log2(tl.sum(tl.exp2(logs - top[None, :]), 0))


@triton.jit
def add_terms(top, sums, logs, axis: tl.constexpr):
    """Running maximum and sum of ``2^(logs - maximum)``; -inf and 0 while there are no terms."""
    higher = tl.maximum(top, tl.max(logs, axis))
    base = tl.where(higher == float("-inf"), 0, higher)
    new = tl.sum(tl.exp2(logs - tl.expand_dims(base, axis)), axis)
    return higher, sums * tl.exp2(top - base) + new


@triton.jit
def add_tile(to, stride, row, column, N, M, tile):
    at = to + row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row < N)[:, None] & (column < M)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0) + tile, mask=inside)


@triton.jit
def add_weights(to, weights, at, n, slope):
    """Adds ``slope / weight`` where a weight is not 0."""
    more = tl.where(weights > 0, slope / tl.where(weights > 0, weights, 1), 0)
    tl.store(to + at, tl.load(to + at, mask=at < n, other=0) + more, mask=at < n)
