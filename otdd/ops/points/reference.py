"""Entropic OT between point clouds in plain PyTorch, some rows of the cost at a time.

The specification of `otdd.ops.sinkhorn_points`, on any device: the iterates of
`otdd.ops.sinkhorn.reference` on the cost matrix. ``x (..., N, D)``, ``y (..., M, D)``,
``a (..., N)``, ``b (..., M)``; ``eps``, ``rho_a`` and ``rho_b`` ``(...)`` in float64, rho infinite
where a marginal is to be met.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from otdd.ops.cost.reference import cost_matrix_reference
from otdd.ops.sinkhorn.reference import (
    damping,
    dual_value,
    kept,
    plan_from_potentials,
    soft_rows,
    weighted,
)

_BLOCK = 1 << 20  # entries of the cost that exist at a time


class PointSolution(NamedTuple):
    """What one solve returns."""

    f: Tensor
    g: Tensor
    value: Tensor
    cost: Tensor
    marginal_error: Tensor
    n_iter: Tensor


def _row_blocks(x: Tensor, y: Tensor, metric: str) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their costs."""
    width = max(1, x.shape[:-2].numel() * y.shape[-2])
    step = max(1, _BLOCK // width)
    for i in range(0, x.shape[-2], step):
        rows = slice(i, i + step)
        yield rows, cost_matrix_reference(x[..., rows, :], y, metric)


def _soft_rows(x: Tensor, y: Tensor, g: Tensor, log_b: Tensor, e: Tensor, metric: str) -> Tensor:
    """``-eps LSE_j(log b_j + (g_j - c(x_i, y_j)) / eps)``."""
    f = x.new_empty(x.shape[:-1])  # not a list of parts: they would keep the heap from shrinking
    for rows, C in _row_blocks(x, y, metric):
        f[..., rows] = soft_rows(C, g, log_b, e)
    return f


def points_reference(
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
    """`sinkhorn_reference` on the costs ``c(x_i, y_j)``; columns are rows, x and y exchanged."""
    log_a, log_b = a.log(), b.log()
    e = eps.to(x.dtype).unsqueeze(-1)
    damp_a, damp_b = damping(rho_a, eps, x.dtype), damping(rho_b, eps, x.dtype)
    f = torch.zeros_like(a, memory_format=torch.contiguous_format)
    active = torch.ones(eps.shape, dtype=torch.bool, device=x.device)
    n_iter = torch.zeros(eps.shape, dtype=torch.int64, device=x.device)

    def sums() -> tuple[Tensor, Tensor]:
        return _plan_sums(x, y, a, b, eps, rho_a, f, g, metric)

    for _ in range(max_iter):
        moving = active.unsqueeze(-1)
        f = torch.where(moving, damp_a * _soft_rows(x, y, g, log_b, e, metric), f)
        g = torch.where(moving, damp_b * _soft_rows(y, x, f, log_a, e, metric), g)
        n_iter += active
        if tol > 0:
            active = active & ~(sums()[1] <= tol)
            if not bool(active.any()):
                break
    value = dual_value(f, g, a, b, eps, rho_a, rho_b)
    return PointSolution(f, g, value, *sums(), n_iter)


def _plan_sums(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    f: Tensor,
    g: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """``<P, C>`` and ``sum_i |sum_j P_ij - a_i exp(-f_i / rho_a)|``."""
    cost, error = x.new_zeros(eps.shape), x.new_zeros(eps.shape)
    wanted = weighted(a, kept(f, rho_a))
    for rows, C in _row_blocks(x, y, metric):
        plan = plan_from_potentials(C, f[..., rows], g, a[..., rows], b, eps)
        cost += (plan * C).sum((-1, -2))
        error += (plan.sum(-1) - wanted[..., rows]).abs().sum(-1)
    return cost, error


def product_reference(
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
    """``out_i = sum_j w_ij h(x_i, z_j)`` with ``w_ij = P_ij (u_i + v_j + kappa C_ij)``.

    Products with the plan, with its transpose (x and y exchanged), and gradients with respect to
    the points are all of this form.

    Args:
        x: Points of the rows, ``(..., N, D)``.
        y: Points of the columns, ``(..., M, D)``.
        f: Row potentials, ``(..., N)``.
        g: Column potentials, ``(..., M)``.
        a: Row weights, ``(..., N)``.
        b: Column weights, ``(..., M)``.
        eps: Regularisation strength, ``(...)`` in float64.
        u: A number for each row, ``(..., N)``.
        v: A number for each column, ``(..., M)``.
        kappa: A number for the cost, ``(...)`` in float64.
        z: Values at the columns, ``(..., M, K)``; ``y`` unless `mode` is ``value``.
        metric: Ground cost.
        mode: h: ``value`` z_j, ``difference`` x_i - z_j, ``sign`` the sign of the difference.
        over_cost: Divide w_ij by C_ij; 0 where that is 0.
    """
    kappa = kappa.to(x.dtype)[..., None, None]
    out = x.new_empty(*x.shape[:-1], z.shape[-1])
    for rows, C in _row_blocks(x, y, metric):
        w = plan_from_potentials(C, f[..., rows], g, a[..., rows], b, eps)
        w = w * (u[..., rows].unsqueeze(-1) + v.unsqueeze(-2) + kappa * C)
        if over_cost:
            w = torch.where(C > 0, w / torch.where(C > 0, C, 1), 0)
        out[..., rows, :] = _weighted_sum(w, x[..., rows, :], z, mode)
    return out


def _weighted_sum(w: Tensor, x: Tensor, z: Tensor, mode: str) -> Tensor:
    """``sum_j w_ij h(x_i, z_j)``."""
    if mode == "value":
        return w @ z
    columns = []
    for d in range(x.shape[-1]):  # differences feature by feature: nothing cancels
        t = x[..., d].unsqueeze(-1) - z[..., d].unsqueeze(-2)
        columns.append((w * (t.sign() if mode == "sign" else t)).sum(-1))
    return torch.stack(columns, -1)
