"""The ops behind `otdd.ops.sinkhorn_points`, and the weighted sums that its gradients are.

A problem's tensors are those of `reference.Clouds`, over one batch, in that order; a and b may be
None for equal weights, rho_a and rho_b for marginals that are met, the labels for none.
"""

import torch
from torch import Tensor

from otdd.ops import checks, pointers
from otdd.ops.dispatch import custom_op
from otdd.ops.matmul import matmul
from otdd.ops.points import cpu, dense
from otdd.ops.points.levels import through_levels
from otdd.ops.points.reference import Clouds, points_reference, product_reference

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
PROBLEM = 10  # tensors of a problem


def _solve(
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
    g: Tensor | None,
    metric: str,
    max_iter: int,
    tol: float,
    schedule: float,
    precision: str,
    backend: str,
) -> Outputs:
    """One whole batch of solves -> f, g, value, cost, marginal_error, n_iter."""
    p = filled(x, y, a, b, eps, rho_a, rho_b, labels_x, labels_y, label_cost)
    g = x.new_zeros(()).expand_as(p.b) if g is None else g
    if checks.values_are_checked(x):
        _check_values(p, g, metric)
    if backend == "cpu":
        out = cpu.points_cpu(p, g, metric, max_iter, tol, schedule)
    elif backend == "cuda":
        out = dense.stored(p, g, metric, max_iter, tol, schedule, backend, dense.AT_ONCE)
    else:
        kernels = pointers.triton_kernels("points") if backend == "triton" else None
        run = kernels.points_triton if kernels else points_reference
        out = through_levels(run, p, g, metric, max_iter, tol, schedule, precision)
    f, g, value, cost, *rest = out
    # Views of other memory: autograd would refuse that they are changed in place.
    return f, g, value.clone(), cost.clone(), *rest


def _fake_solve(x, y, *_):  # noqa: ANN001, ANN002, ANN202
    *batch, N, _ = x.shape
    return (
        x.new_empty(*batch, N),
        x.new_empty(*batch, y.shape[-2]),
        x.new_empty(batch),
        x.new_empty(batch),
        x.new_empty(batch),
        x.new_empty(batch, dtype=torch.int64),
    )


def equal_weights(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights a and b, equal ones of mass 1 where they are None."""
    if a is None:
        a = x.new_full((), 1 / x.shape[-2]).expand(x.shape[:-1])
    if b is None:
        b = y.new_full((), 1 / y.shape[-2]).expand(y.shape[:-1])
    return a, b


def filled(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    *labels: Tensor | None,
) -> Clouds:
    """A problem with a tensor for each weight and penalty: equal ones, and inf."""
    a, b = equal_weights(x, y, a, b)
    if rho_a is None or rho_b is None:
        hard = eps.new_full((), torch.inf).expand(eps.shape)
        rho_a, rho_b = (hard if rho is None else rho for rho in (rho_a, rho_b))
    return Clouds(x, y, a, b, eps, rho_a, rho_b, *labels)


def _check_values(p: Clouds, g: Tensor, metric: str) -> None:
    """Raises for the first value that is not accepted."""
    checks.finite(p.x, "x")
    checks.finite(p.y, "y")
    _costs_fit(p.x, p.y, metric, p.label_cost)
    checks.weights(p.a, "a")
    checks.weights(p.b, "b")
    checks.finite(g, "init")
    checks.positive(p.eps, "eps", p.x.dtype)
    checks.positive(p.rho_a, "rho_a", p.x.dtype, or_inf=True)
    checks.positive(p.rho_b, "rho_b", p.x.dtype, or_inf=True)
    if p.label_cost is None:
        return
    checks.finite(p.label_cost, "label_cost")
    sides = (p.labels_x, "labels_x", -2), (p.labels_y, "labels_y", -1)
    for labels, name, side in sides:
        if labels.numel():
            low, high = (bound.item() for bound in labels.aminmax())
            top = p.label_cost.shape[side] - 1
            seen, accepted = f"labels from {low} to {high}", f"0 to {top}, as label_cost has"
            checks.require(low >= 0 and high <= top, name, seen, accepted)


def _costs_fit(x: Tensor, y: Tensor, metric: str, label_cost: Tensor | None) -> None:
    """Raises if a cost in the box around the points could overflow."""
    if x.numel() == 0 or y.numel() == 0:
        return
    high = torch.maximum(x.amax(-2), y.amax(-2))
    low = torch.minimum(x.amin(-2), y.amin(-2))
    sides = (high - low) if metric == "l1" else (high - low).square()
    top = sides.sum(-1)
    if label_cost is not None:
        top = top + label_cost.abs().amax((-1, -2)).nan_to_num()  # a NaN there is told by its name
    fits = bool(torch.isfinite(top).all())
    cost = "squared l2 cost" if metric == "l2" else f"{metric} cost"
    accepted = f"points whose {cost}, with that of labels, is a number of {x.dtype}"
    checks.require(fits, "x and y", f"points {(high - low).max().item():.3g} apart", accepted)


def _product(
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
    u: Tensor | None,
    v: Tensor | None,
    kappa: Tensor | None,
    z: Tensor,
    metric: str,
    mode: str,
    over_distance: bool,
    precision: str,
    backend: str,
) -> Tensor:
    """``sum_j P_ij (u_i + v_j + kappa C_ij) h(x_i, z_j)``; 1 for no u, 0 for no v and kappa."""
    p = filled(x, y, a, b, eps, rho_a, rho_b, labels_x, labels_y, label_cost)
    u = x.new_ones(()).expand_as(f) if u is None else u
    v = x.new_zeros(()).expand_as(g) if v is None else v
    kappa = torch.zeros_like(eps) if kappa is None else kappa
    options = u, v, kappa, z, metric, mode, over_distance
    if backend == "cpu":
        return cpu.product_cpu(p, f, g, *options)
    if backend == "cuda":
        return dense.product_stored(p, f, g, *options, backend)
    kernels = pointers.triton_kernels("points") if backend == "triton" else None
    run = kernels.product_triton if kernels else product_reference
    return run(p, f, g, *options, precision)


def _fake_product(x: Tensor, *others: object) -> Tensor:
    z = others[14]
    return x.new_empty(*x.shape[:-1], z.shape[-1])


solve_op = custom_op("otdd::sinkhorn_points", _solve, _fake_solve)
product_op = custom_op("otdd::sinkhorn_points_product", _product, _fake_product)


def row_gradient(
    p: Clouds,
    f: Tensor,
    g: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    kappa: Tensor | None,
    metric: str,
    precision: str,
    backend: str,
) -> Tensor:
    """``sum_j P_ij (u_i + v_j + kappa C_ij) dc(x_i, y_j) / dx_i``, ``(..., N, D)``."""
    mode = "sign" if metric == "l1" else "difference"
    options = metric, mode, metric == "l2", precision, backend
    out = product_op(*p, f, g, u, v, kappa, p.y, *options)
    return 2 * out if metric == "sqeuclidean" else out


def label_gradient(
    p: Clouds,
    f: Tensor,
    g: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    kappa: Tensor | None,
    metric: str,
    precision: str,
    backend: str,
) -> Tensor:
    """``sum P_ij (u_i + v_j + kappa C_ij)`` over i of label k and j of label l, ``(..., K, L)``."""
    K, L = p.label_cost.shape[-2:]
    kind = {"dtype": p.x.dtype, "device": p.x.device}
    of_y = (p.labels_y.unsqueeze(-1) == torch.arange(L, device=p.x.device)).to(**kind)
    of_x = (p.labels_x.unsqueeze(-2) == torch.arange(K, device=p.x.device).unsqueeze(-1)).to(**kind)
    options = metric, "value", False, precision, backend
    return matmul(of_x, product_op(*p, f, g, u, v, kappa, of_y, *options))
