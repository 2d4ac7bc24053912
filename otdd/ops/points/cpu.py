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
from otdd.ops.points.levels import through_levels
from otdd.ops.points.reference import Clouds, PointSolution, label_costs
from otdd.ops.sinkhorn import sinkhorn

STORED = 1 << 23  # entries of the largest stored cost
_METRICS = {"l1": 0, "sqeuclidean": 1, "l2": 2}
_MODES = {"value": 0, "difference": 1, "sign": 2}


def points_cpu(
    p: Clouds, g: Tensor, metric: str, max_iter: int, tol: float, schedule: float
) -> PointSolution:
    """See `points_reference`; some problems at a time with their costs, or all without."""
    batch, entries = p.x.shape[:-2], p.x.shape[-2] * p.y.shape[-2]
    if entries > STORED:
        return through_levels(streamed, p, g, metric, max_iter, tol, schedule)
    tails = 2, 2, 1, 1, 0, 0, 0, 1, 1, 2, 1
    flat = [
        None if t is None else t.reshape(-1, *t.shape[t.dim() - tail :])
        for t, tail in zip((*p, g), tails, strict=True)
    ]
    step = STORED // entries
    chunks = []
    for k in range(0, max(1, batch.numel()), step):
        *some, start = (None if t is None else t[k : k + step] for t in flat)
        chunks.append(_stored(Clouds(*some), start, metric, max_iter, tol, schedule))
    joined = chunks[0] if len(chunks) == 1 else (torch.cat(t) for t in zip(*chunks, strict=True))
    return PointSolution(*(t.reshape(batch + t.shape[1:]) for t in joined))


def _stored(
    p: Clouds, g: Tensor, metric: str, max_iter: int, tol: float, schedule: float
) -> PointSolution:
    C = cost_matrix(p.x, p.y, metric, backend="cpu")
    if p.label_cost is not None:
        C = C + label_costs(p, slice(None))
    options = {"max_iter": max_iter, "tol": tol, "schedule": schedule or None, "backend": "cpu"}
    r = sinkhorn(C, p.a, p.b, eps=p.eps, init=(None, g), rho_a=p.rho_a, rho_b=p.rho_b, **options)
    return PointSolution(r.f, r.g, r.value, r.cost, r.marginal_error, r.n_iter)


def streamed(
    p: Clouds, g: Tensor, metric: str, max_iter: int, tol: float | Tensor
) -> PointSolution:
    """One cost and one exp an entry and iteration, and memory for ``(N + M) D`` numbers."""
    *batch, N, D = p.x.shape
    M = p.y.shape[-2]
    out = PointSolution(
        f=p.x.new_empty(*batch, N),
        g=p.x.new_empty(*batch, M),
        value=p.x.new_empty(batch),
        cost=p.x.new_empty(batch),
        marginal_error=p.x.new_empty(batch),
        n_iter=p.x.new_empty(batch, dtype=torch.int64),
    )
    points = (pointers.with_rows(t) for t in (p.x, p.y))
    tol = tol if isinstance(tol, Tensor) else torch.full_like(p.eps, tol)
    rest = p.a, p.b, p.eps, p.rho_a, p.rho_b, g, tol
    x, y, a, b, eps, rho_a, rho_b, g, tol = pointers.flat(len(batch), *points, *rest)
    status = pointers.kernel("points", p.x.dtype)(
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
        per_problem(tol),
        *(t.data_ptr() for t in out),
        pointers.threads(),
    )
    pointers.check(status, "sinkhorn_points")
    return out


def product_cpu(
    p: Clouds,
    f: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor,
    kappa: Tensor,
    z: Tensor,
    metric: str,
    mode: str,
    over_distance: bool,
) -> Tensor:
    """See `product_reference`."""
    *batch, N, D = p.x.shape
    M, K = z.shape[-2:]
    out = p.x.new_empty(*batch, N, K)
    points = (pointers.with_rows(t) for t in (p.x, p.y, z))
    rest = f, g, p.a, p.b, p.eps, u, v, kappa
    x, y, z, f, g, a, b, eps, u, v, kappa = pointers.flat(len(batch), *points, *rest)
    status = pointers.kernel("plan_product", p.x.dtype)(
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
        over_distance,
        out.data_ptr(),
        pointers.threads(),
    )
    pointers.check(status, "a product with the plan")
    return out
