"""Epsilon scaling between point clouds, whose range of costs is not known without the costs."""

from collections.abc import Callable

import torch
from torch import Tensor

from otdd.ops.points.reference import Clouds, PointSolution
from otdd.ops.sinkhorn.accelerate import LEVEL_ERROR, LEVEL_ITERATIONS


def through_levels(
    solver: Callable[..., PointSolution],
    p: Clouds,
    g: Tensor,
    metric: str,
    max_iter: int,
    tol: float,
    schedule: float,
    *options: str,
) -> PointSolution:
    """A solve that starts where levels of eps above the one asked for end; as in `sinkhorn`.

    Every problem has levels of its own, from the largest cost in the box around its points.

    Args:
        solver: ``(p, g, metric, max_iter, tol, *options)``; tol a number, or one for each problem.
        p: The problems.
        g: Column potentials to start from.
        metric: Ground cost between points.
        max_iter: Iterations at the last level, at most.
        tol: Marginal error at which a problem ends there.
        schedule: Ratio of one level to the one before; 0: no levels.
        options: Passed on.
    """
    n_iter: Tensor | int = 0
    if schedule:
        n_iter = torch.zeros_like(p.eps, dtype=torch.int64)
        level, goal = highest_cost(p, metric), LEVEL_ERROR * p.a.sum(-1).double()
        level = level.masked_fill(level.isinf(), torch.nan)  # it would never fall
        level = level.clamp(max=torch.finfo(p.x.dtype).max / 16)
        while bool((above := level > p.eps).any()):
            some = p._replace(eps=level).where(above)
            r = solver(some, g[above], metric, LEVEL_ITERATIONS, goal[above], *options)
            g = g.masked_scatter(above.unsqueeze(-1), r.g)
            n_iter = n_iter.masked_scatter(above, n_iter[above] + r.n_iter)
            level = level * schedule
    r = solver(p, g, metric, max_iter, tol, *options)
    return r._replace(n_iter=r.n_iter + n_iter)


def highest_cost(p: Clouds, metric: str) -> Tensor:
    """Upper bound of the costs between points of weight > 0, ``(...)`` in float64."""
    low_x, high_x = _box(p.x, p.a)
    low_y, high_y = _box(p.y, p.b)
    sides = torch.maximum(high_x, high_y).double() - torch.minimum(low_x, low_y).double()
    bound = sides.sum(-1) if metric == "l1" else sides.square().sum(-1)
    if metric == "l2":
        bound = bound.sqrt()
    if p.label_cost is not None:
        low, high = (t.double() for t in p.label_cost.aminmax(dim=-1))
        bound = bound + high.amax(-1) - low.amin(-1)
    return bound


def _box(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest coordinates of the points of weight > 0, ``(..., D)``."""
    none = (weights <= 0).unsqueeze(-1)
    low = points.masked_fill(none, torch.inf).amin(-2)
    return low, points.masked_fill(none, -torch.inf).amax(-2)
