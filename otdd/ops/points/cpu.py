"""The `cpu` backend of `sinkhorn_points`: C++ over raw pointers.

While a cost matrix is small, storing it is faster: its iteration needs no exp. Above that the costs
are made tile by tile.
"""

import math

import torch
from torch import Tensor

from otdd.ops import pointers
from otdd.ops.cost import cost_matrix
from otdd.ops.pointers import matrices, per_point, per_problem
from otdd.ops.points.reference import PointSolution
from otdd.ops.sinkhorn import sinkhorn

STORED = 1 << 23  # entries of the largest stored cost
_METRICS = {"l1": 0, "sqeuclidean": 1, "l2": 2}
_MODES = {"value": 0, "difference": 1, "sign": 2}


def points_cpu(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    rho_b: Tensor,
    g: Tensor,
    metric: str,
    max_iter: int,
    tol: float,
) -> PointSolution:
    """See `points_reference`; some problems at a time with their costs, or all without."""
    batch, entries = x.shape[:-2], x.shape[-2] * y.shape[-2]
    if entries > STORED:
        return streamed(x, y, a, b, eps, rho_a, rho_b, g, metric, max_iter, tol)
    problems = x, y, a, b, eps, rho_a, rho_b, g
    tails = 2, 2, 1, 1, 0, 0, 0, 1
    flat = [
        t.reshape(-1, *t.shape[t.dim() - tail :]) for t, tail in zip(problems, tails, strict=True)
    ]
    step = STORED // entries
    chunks = [
        _stored(*(t[k : k + step] for t in flat), metric, max_iter, tol)
        for k in range(0, max(1, batch.numel()), step)
    ]
    joined = chunks[0] if len(chunks) == 1 else (torch.cat(t) for t in zip(*chunks, strict=True))
    return PointSolution(*(t.reshape(batch + t.shape[1:]) for t in joined))


def _stored(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    rho_b: Tensor,
    g: Tensor,
    metric: str,
    max_iter: int,
    tol: float,
) -> PointSolution:
    C = cost_matrix(x, y, metric, backend="cpu")
    options = {"max_iter": max_iter, "tol": tol, "rho_a": rho_a, "rho_b": rho_b, "backend": "cpu"}
    r = sinkhorn(C, a, b, eps=eps, init=(None, g), **options)
    return PointSolution(r.f, r.g, r.value, r.cost, r.marginal_error, r.n_iter)


def streamed(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    rho_b: Tensor,
    g: Tensor,
    metric: str,
    max_iter: int,
    tol: float,
) -> PointSolution:
    """One cost and one exp an entry and iteration, and memory for ``(N + M) D`` numbers."""
    *batch, N, D = x.shape
    M = y.shape[-2]
    out = PointSolution(
        f=x.new_empty(*batch, N),
        g=x.new_empty(*batch, M),
        value=x.new_empty(batch),
        cost=x.new_empty(batch),
        marginal_error=x.new_empty(batch),
        n_iter=x.new_empty(batch, dtype=torch.int64),
    )
    points = (pointers.with_rows(t) for t in (x, y))
    x, y, a, b, eps, rho_a, rho_b, g = pointers.flat(
        len(batch), *points, a, b, eps, rho_a, rho_b, g
    )
    status = pointers.kernel("points", x.dtype)(
        math.prod(batch),
        N,
        M,
        D,
        matrices(x),
        matrices(y),
        _METRICS[metric],
        per_point(a),
        per_point(b),
        per_problem(eps),
        per_problem(rho_a),
        per_problem(rho_b),
        per_point(g),
        max_iter,
        tol,
        *(t.data_ptr() for t in out),
        pointers.threads(),
    )
    pointers.check(status, "sinkhorn_points")
    return out


def product_cpu(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    u: Tensor,
    v: Tensor,
    kappa: Tensor,
    z: Tensor,
    metric: str,
    mode: str,
    over_cost: bool,
) -> Tensor:
    """See `product_reference`."""
    *batch, N, D = x.shape
    M, K = z.shape[-2:]
    out = x.new_empty(*batch, N, K)
    points = (pointers.with_rows(t) for t in (x, y, z))
    x, y, z, f, g, a, b, eps, u, v, kappa = pointers.flat(
        len(batch), *points, f, g, a, b, eps, u, v, kappa
    )
    status = pointers.kernel("plan_product", x.dtype)(
        math.prod(batch),
        N,
        M,
        D,
        K,
        matrices(x),
        matrices(y),
        _METRICS[metric],
        per_point(f),
        per_point(g),
        per_point(a),
        per_point(b),
        per_problem(eps),
        per_point(u),
        per_point(v),
        per_problem(kappa),
        matrices(z),
        _MODES[mode],
        over_cost,
        out.data_ptr(),
        pointers.threads(),
    )
    pointers.check(status, "a product with the plan")
    return out
