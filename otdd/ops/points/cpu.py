"""The `cpu` backend of `sinkhorn_points`: C++.

While a cost matrix is small, storing it is faster: its iteration needs no exp. Above that the costs
are made tile by tile.
"""

import torch
from torch import Tensor

from otdd.ops import pointers
from otdd.ops.points.dense import stored
from otdd.ops.points.levels import through_levels
from otdd.ops.points.reference import Clouds, PointSolution

STORED = 1 << 23  # entries of the largest stored cost
_METRICS = {"l1": 0, "sqeuclidean": 1, "l2": 2}
_MODES = {"value": 0, "difference": 1, "sign": 2}


def points_cpu(
    p: Clouds, g: Tensor, metric: str, max_iter: int, tol: float, schedule: float
) -> PointSolution:
    """See `points_reference`; some problems at a time with their costs, or all without."""
    if p.x.shape[-2] * p.y.shape[-2] > STORED:
        return through_levels(streamed, p, g, metric, max_iter, tol, schedule)
    return stored(p, g, metric, max_iter, tol, schedule, "cpu", STORED)


def streamed(
    p: Clouds, g: Tensor, metric: str, max_iter: int, tol: float | Tensor
) -> PointSolution:
    """One cost and one exp an entry and iteration, and memory for ``(N + M) D`` numbers.

    With K and L labels, for ``K M + L N`` more: costs between labels are then read in whole
    vectors.
    """
    *batch, N, _ = p.x.shape
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
        x,
        y,
        _METRICS[metric],
        _labels(p),
        a,
        b,
        eps,
        rho_a,
        rho_b,
        g,
        max_iter,
        tol,
        *out,
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
    *batch, N, _ = p.x.shape
    out = p.x.new_empty(*batch, N, z.shape[-1])
    points = (pointers.with_rows(t) for t in (p.x, p.y, z))
    rest = f, g, p.a, p.b, p.eps, u, v, kappa
    x, y, z, f, g, a, b, eps, u, v, kappa = pointers.flat(len(batch), *points, *rest)
    status = pointers.kernel("plan_product", p.x.dtype)(
        x,
        y,
        _METRICS[metric],
        _labels(p),
        f,
        g,
        a,
        b,
        eps,
        u,
        v,
        kappa,
        z,
        _MODES[mode],
        over_distance,
        out,
        pointers.threads(),
    )
    pointers.check(status, "a product with the plan")
    return out


def _labels(p: Clouds) -> tuple[Tensor | None, ...]:
    """Labels of the rows, of the columns, and their costs, for native code."""
    if p.label_cost is None:
        return None, None, None
    tensors = p.labels_x, p.labels_y, pointers.with_rows(p.label_cost)
    return pointers.flat(p.eps.dim(), *tensors)
