"""Entropic OT between point clouds in plain PyTorch, some rows of the cost at a time.

The specification of `otdd.ops.sinkhorn_points`, on any device: the iterates of
`otdd.ops.sinkhorn.reference` on the cost matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from otdd.ops.cost.reference import cost_matrix_reference
from otdd.ops.matmul import product
from otdd.ops.sinkhorn.reference import (
    damping,
    dual_value,
    kept,
    plan_from_potentials,
    soft_rows,
    weighted,
)

_BLOCK = 1 << 20  # entries of the cost that exist at a time


class Clouds(NamedTuple):
    """What is to be solved; every tensor over the same batch ``(...)``.

    The cost is ``C_ij = c(x_i, y_j)``, and ``label_cost[labels_x_i, labels_y_j]`` more where the
    points have labels.
    """

    x: Tensor  # (..., N, D)
    y: Tensor  # (..., M, D)
    a: Tensor | None  # (..., N); None until `op.filled` puts equal weights there
    b: Tensor | None  # (..., M)
    eps: Tensor  # (...), float64
    rho_a: Tensor | None  # (...), float64; None, once filled inf, where the marginal is to be met
    rho_b: Tensor | None
    labels_x: Tensor | None  # (..., N), int64
    labels_y: Tensor | None  # (..., M)
    label_cost: Tensor | None  # (..., K, L)

    def swapped(self) -> Clouds:
        """The same problem with rows and columns exchanged."""
        return Clouds(
            self.y,
            self.x,
            self.b,
            self.a,
            self.eps,
            self.rho_b,
            self.rho_a,
            self.labels_y,
            self.labels_x,
            None if self.label_cost is None else self.label_cost.mT,
        )

    def where(self, chosen: Tensor) -> Clouds:
        """Some problems of a batch, ``chosen`` a bool ``(...)``; with one batch dimension."""
        return Clouds(*(None if t is None else t[chosen] for t in self))


class PointSolution(NamedTuple):
    """What one solve returns."""

    f: Tensor
    g: Tensor
    value: Tensor
    cost: Tensor
    marginal_error: Tensor
    n_iter: Tensor


def _row_blocks(p: Clouds, metric: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of rows with their costs, and of these the part of the points."""
    width = max(1, p.x.shape[:-2].numel() * p.y.shape[-2])
    step = max(1, _BLOCK // width)
    for i in range(0, p.x.shape[-2], step):
        rows = slice(i, i + step)
        distance = cost_matrix_reference(p.x[..., rows, :], p.y, metric)
        yield rows, distance + label_costs(p, rows), distance


def label_costs(p: Clouds, rows: slice) -> Tensor | float:
    """``label_cost[labels_x_i, labels_y_j]`` of some rows."""
    if p.label_cost is None:
        return 0.0
    lx, ly, K = p.labels_x[..., rows], p.labels_y, p.label_cost.shape[-1]
    of_rows = p.label_cost.take_along_dim(lx.unsqueeze(-1).expand(*lx.shape, K), -2)
    return of_rows.take_along_dim(ly.unsqueeze(-2).expand(*lx.shape, ly.shape[-1]), -1)


def _soft_rows(p: Clouds, g: Tensor, metric: str) -> Tensor:
    """``-eps LSE_j(log b_j + (g_j - C_ij) / eps)``."""
    f = p.x.new_empty(p.x.shape[:-1])  # not a list of parts: they keep the heap from shrinking
    log_b, e = p.b.log(), p.eps.to(p.x.dtype).unsqueeze(-1)
    for rows, C, _ in _row_blocks(p, metric):
        f[..., rows] = soft_rows(C, g, log_b, e)
    return f


def points_reference(
    p: Clouds,
    g: Tensor,
    metric: str,
    max_iter: int,
    tol: float | Tensor,
    precision: str = "highest",
) -> PointSolution:
    """`sinkhorn_reference` on the costs of the clouds; columns are rows, x and y exchanged.

    Args:
        p: The problems.
        g: Column potentials to start from, ``(..., M)``.
        metric: Ground cost between points: ``l1``, ``l2``, ``sqeuclidean``.
        max_iter: Iterations at most.
        tol: Marginal error at which a problem stops, a number or ``(...)`` in float64; 0 never.
        precision: Not used: nothing here is less than the dtype's.
    """
    damp_a, damp_b = (damping(rho, p.eps, p.x.dtype) for rho in (p.rho_a, p.rho_b))
    f = torch.zeros_like(p.a, memory_format=torch.contiguous_format)
    active = torch.ones(p.eps.shape, dtype=torch.bool, device=p.x.device)
    n_iter = torch.zeros(p.eps.shape, dtype=torch.int64, device=p.x.device)
    columns, stops = p.swapped(), isinstance(tol, Tensor) or tol > 0
    for _ in range(max_iter):
        moving = active.unsqueeze(-1)
        f = torch.where(moving, damp_a * _soft_rows(p, g, metric), f)
        g = torch.where(moving, damp_b * _soft_rows(columns, f, metric), g)
        n_iter += active
        if stops:
            active = active & ~(_plan_sums(p, f, g, metric)[1] <= tol)
            if not bool(active.any()):
                break
    value = dual_value(f, g, p.a, p.b, p.eps, p.rho_a, p.rho_b)
    return PointSolution(f, g, value, *_plan_sums(p, f, g, metric), n_iter)


def _plan_sums(p: Clouds, f: Tensor, g: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """``<P, C>`` and ``sum_i |sum_j P_ij - a_i exp(-f_i / rho_a)|``."""
    cost, error = p.x.new_zeros(p.eps.shape), p.x.new_zeros(p.eps.shape)
    wanted = weighted(p.a, kept(f, p.rho_a))
    for rows, C, _ in _row_blocks(p, metric):
        plan = plan_from_potentials(C, f[..., rows], g, p.a[..., rows], p.b, p.eps)
        cost += (plan * C).sum((-1, -2))
        error += (plan.sum(-1) - wanted[..., rows]).abs().sum(-1)
    return cost, error


def product_reference(
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
    precision: str = "highest",
) -> Tensor:
    """``out_i = sum_j w_ij h(x_i, z_j)`` with ``w_ij = P_ij (u_i + v_j + kappa C_ij)``.

    Products with the plan, with its transpose (the problem swapped), and gradients with respect to
    the points are all of this form.

    Args:
        p: The problems; their penalties are not used.
        f: Row potentials, ``(..., N)``.
        g: Column potentials, ``(..., M)``.
        u: A number for each row, ``(..., N)``.
        v: A number for each column, ``(..., M)``.
        kappa: A number for the cost, ``(...)`` in float64.
        z: Values at the columns, ``(..., M, K)``; ``y`` unless `mode` is ``value``.
        metric: Ground cost between points.
        mode: h: ``value`` z_j, ``difference`` x_i - z_j, ``sign`` the sign of the difference.
        over_distance: Divide w_ij by c(x_i, y_j); 0 where that is 0.
        precision: Not used, as in `points_reference`.
    """
    kappa = kappa.to(p.x.dtype)[..., None, None]
    out = p.x.new_empty(*p.x.shape[:-1], z.shape[-1])
    for rows, C, distance in _row_blocks(p, metric):
        w = plan_from_potentials(C, f[..., rows], g, p.a[..., rows], p.b, p.eps)
        w = w * (u[..., rows].unsqueeze(-1) + v.unsqueeze(-2) + kappa * C)
        if over_distance:
            apart = distance > 0
            w = torch.where(apart, w / torch.where(apart, distance, 1), 0)
        out[..., rows, :] = _weighted_sum(w, p.x[..., rows, :], z, mode)
    return out


def _weighted_sum(w: Tensor, x: Tensor, z: Tensor, mode: str) -> Tensor:
    """``sum_j w_ij h(x_i, z_j)``."""
    if mode == "value":
        return product(w, z)
    columns = []
    for d in range(x.shape[-1]):  # differences feature by feature: nothing cancels
        t = x[..., d].unsqueeze(-1) - z[..., d].unsqueeze(-2)
        columns.append((w * (t.sign() if mode == "sign" else t)).sum(-1))
    return torch.stack(columns, -1)
