"""Derivatives of the fixed point between point clouds, without their cost matrix.

Every one is a solve of one linear system by conjugate gradients, two products with the plan a step,
and after it one weighted sum over the plan for each cloud.
"""

import torch
from torch import Tensor

from otdd.ops.dispatch import custom_op
from otdd.ops.points.blocks import blocks
from otdd.ops.points.op import filled, label_gradient, product_op, row_gradient
from otdd.ops.points.reference import Clouds
from otdd.ops.sinkhorn.implicit import Product, adjoint, implicit_tolerance, over
from otdd.ops.sinkhorn.reference import damping, kept

# Entries of the largest batch of plans that conjugate gradients keep: then a step is no exp.
KEPT = 1 << 22


def widened(p: Clouds, *more: Tensor) -> tuple[Clouds, *tuple[Tensor, ...]]:
    """The problem and more in float64: the linear system is worse conditioned than the solve."""
    W = None if p.label_cost is None else p.label_cost.double()
    x, y, a, b = (t.double() for t in p[:4])
    return p._replace(x=x, y=y, a=a, b=b, label_cost=W), *(t.double() for t in more)


def _plan_products(
    p: Clouds, f: Tensor, g: Tensor, metric: str, precision: str, backend: str
) -> tuple[Product, Product]:
    """``P h`` and ``P' k`` for the conjugate gradients; the plan kept while it is small."""
    N, M = p.x.shape[-2], p.y.shape[-2]
    if p.eps.numel() * N * M <= KEPT:
        plan = p.x.new_empty(*p.x.shape[:-1], M)
        for rows, part, _ in blocks(p, f, g, metric, backend):
            plan[..., rows, :] = part
        return (
            lambda h: (plan @ h.unsqueeze(-1)).squeeze(-1),
            lambda k: (k.unsqueeze(-2) @ plan).squeeze(-2),
        )
    options = metric, "value", False, precision, backend

    def product(p: Clouds, f: Tensor, g: Tensor, z: Tensor) -> Tensor:
        return product_op(*p, f, g, None, None, None, z.unsqueeze(-1), *options).squeeze(-1)

    columns = p.swapped()
    return lambda h: product(p, f, g, h), lambda k: product(columns, g, f, k)


def solve_adjoint(
    p: Clouds,
    f: Tensor,
    g: Tensor,
    df: Tensor,
    dg: Tensor,
    dtype: torch.dtype,
    metric: str,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What cotangents of f and g become at the fixed point, all in float64.

    Args:
        p: The problem, as from `widened`.
        f: Row potentials, ``(..., N)``.
        g: Column potentials.
        df: Their cotangents.
        dg: Those of g.
        dtype: Of the solve.
        metric: Ground cost between points.
        precision: Of products between points.
        backend: Runs them.

    Returns:
        k ``(..., N)`` and h ``(..., M)``, by which the costs get ``P_ij (k_i + h_j)``, and the
        derivatives in a and b.
    """
    products = _plan_products(p, f, g, metric, precision, backend)
    df, dg = torch.where(p.a > 0, df, 0), torch.where(p.b > 0, dg, 0)
    damp = (damping(rho, p.eps, torch.float64) for rho in (p.rho_a, p.rho_b))
    k, h, to_rows, to_columns = adjoint(*products, *damp, df, dg, implicit_tolerance(dtype))
    e = p.eps.unsqueeze(-1)
    return k, h, -over(e * to_rows, p.a), -over(e * to_columns, p.b)


def _implicit(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    labels_x: Tensor | None,
    labels_y: Tensor | None,
    label_cost: Tensor | None,
    f: Tensor,
    g: Tensor,
    df: Tensor,
    dg: Tensor,
    dcost: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_label_cost: bool,
    metric: str,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of (f, g, cost) with respect to x, y, a, b and the label costs.

    What is not needed is empty.
    """
    p = filled(x, y, a, b, eps, rho_a, rho_b, labels_x, labels_y, label_cost)
    p, f, g, df, dg = widened(p, f, g, df, dg)
    options = metric, precision, backend
    own, da, db, kappa = 0.0, 0.0, 0.0, None
    if dcost is not None:
        dcost = dcost.double().unsqueeze(-1)
        mean, to_rows, to_columns = _costs_off_their_mean(p, f, g, *options)
        # The columns of P sum to b exp(-g / rho_b), so what a constant in C adds is known.
        e = p.eps.unsqueeze(-1)
        in_columns = mean * dcost * torch.where(p.b > 0, kept(g, p.rho_b), 0)
        to_rows, to_columns = dcost * to_rows, dcost * to_columns
        df = df + to_rows / e
        dg = dg + to_columns / e - in_columns * p.b / p.rho_b.unsqueeze(-1)
        da, db = over(to_rows, p.a), over(to_columns, p.b) + in_columns
        own, kappa = dcost * (1 + mean / e), (-dcost / e).squeeze(-1)
    k, h, by_a, by_b = solve_adjoint(p, f, g, df, dg, x.dtype, *options)
    u, v = k + own, h
    dx, dy, dW = x.new_empty(*x.shape[:-1], 0), y.new_empty(*y.shape[:-1], 0), None
    if need_x:
        dx = row_gradient(p, f, g, u, v, kappa, *options)
    if need_y:
        dy = row_gradient(p.swapped(), g, f, v, u, kappa, *options)
    if need_label_cost:
        dW = label_gradient(p, f, g, u, v, kappa, *options)
    dW = x.new_empty(*eps.shape, 0, 0) if dW is None else dW
    return tuple(t.to(x.dtype) for t in (dx, dy, da + by_a, db + by_b, dW))


def _costs_off_their_mean(
    p: Clouds, f: Tensor, g: Tensor, metric: str, precision: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``<P, C> / sum(P)``, ``(..., 1)``, and the row and column sums of ``P (C - that)``."""
    options = metric, "value", False, precision, backend
    one = torch.ones_like(p.eps)

    def sums(p: Clouds, f: Tensor, g: Tensor, u: Tensor, kappa: Tensor | None) -> Tensor:
        ones = g.new_ones(()).expand(*g.shape, 1)
        return product_op(*p, f, g, u.expand_as(f), None, kappa, ones, *options).squeeze(-1)

    one_each = one.unsqueeze(-1)
    mass = sums(p, f, g, one_each, None).sum(-1, keepdim=True)
    mean = over(sums(p, f, g, 0 * one_each, one).sum(-1, keepdim=True), mass)
    return mean, sums(p, f, g, -mean, one), sums(p.swapped(), g, f, -mean, one)


def fake_gradients(
    x: Tensor, y: Tensor, label_cost: Tensor | None, need_x: bool, need_y: bool, need_labels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, a, b and the label costs; empty where not needed."""
    batch = x.shape[:-2]
    shape = (*batch, 0, 0) if label_cost is None or not need_labels else label_cost.shape
    return (
        x.new_empty(*x.shape[:-1], x.shape[-1] if need_x else 0),
        y.new_empty(*y.shape[:-1], y.shape[-1] if need_y else 0),
        x.new_empty(x.shape[:-1]),
        y.new_empty(y.shape[:-1]),
        x.new_empty(shape),
    )


def _fake_implicit(x, y, *others):  # noqa: ANN001, ANN002, ANN202
    return fake_gradients(x, y, others[7], *others[13:16])


implicit_op = custom_op("otdd::sinkhorn_points_implicit", _implicit, _fake_implicit)
