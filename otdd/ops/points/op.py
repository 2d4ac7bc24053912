"""The ops behind `otdd.ops.sinkhorn_points`, with their derivatives.

``x (..., N, D)``, ``y (..., M, D)``; over the same batch ``a (..., N)``, ``b (..., M)``,
``g (..., M)``, and ``eps``, ``rho_a``, ``rho_b`` ``(...)`` in float64.
"""

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.dispatch import custom_op, differentiable, no_derivative
from otdd.ops.points import cpu
from otdd.ops.points.reference import points_reference, product_reference
from otdd.ops.sinkhorn.gradients import _value_slopes

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _solve(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    g: Tensor | None,
    metric: str,
    max_iter: int,
    tol: float,
    backend: str,
) -> Outputs:
    """One whole batch of solves -> f, g, value, cost, marginal_error, n_iter."""
    a, b, rho_a, rho_b = filled(x, y, a, b, eps, rho_a, rho_b)
    g = x.new_zeros(()).expand_as(b) if g is None else g
    if checks.values_are_checked(x):
        checks.finite(x, "x")
        checks.finite(y, "y")
        _costs_fit(x, y, metric)
        checks.weights(a, "a")
        checks.weights(b, "b")
        checks.finite(g, "init")
        checks.positive(eps, "eps", x.dtype)
        checks.positive(rho_a, "rho_a", x.dtype, or_inf=True)
        checks.positive(rho_b, "rho_b", x.dtype, or_inf=True)
    run = cpu.points_cpu if backend == "cpu" else points_reference
    return tuple(run(x, y, a, b, eps, rho_a, rho_b, g, metric, max_iter, tol))


def _fake_solve(x, y, a, b, eps, rho_a, rho_b, g, metric, max_iter, tol, backend):  # noqa: ANN001, ANN202
    *batch, N, _ = x.shape
    return (
        x.new_empty(*batch, N),
        x.new_empty(*batch, y.shape[-2]),
        x.new_empty(batch),
        x.new_empty(batch),
        x.new_empty(batch),
        x.new_empty(batch, dtype=torch.int64),
    )


def filled(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and penalties with a tensor for each: equal ones, and inf."""
    hard = eps.new_full((), torch.inf).expand(eps.shape)
    equal = (t.new_full((), 1 / t.shape[-2]).expand(t.shape[:-1]) for t in (x, y))
    a, b = (e if w is None else w for w, e in zip((a, b), equal, strict=True))
    return a, b, hard if rho_a is None else rho_a, hard if rho_b is None else rho_b


def _costs_fit(x: Tensor, y: Tensor, metric: str) -> None:
    """Raises if a cost in the box around the points could overflow."""
    if x.numel() == 0 or y.numel() == 0:
        return
    high = torch.maximum(x.amax(-2), y.amax(-2))
    low = torch.minimum(x.amin(-2), y.amin(-2))
    sides = (high - low) if metric == "l1" else (high - low).square()
    fits = bool(torch.isfinite(sides.sum(-1)).all())
    accepted = f"points whose {metric} cost is a number of {x.dtype}"
    checks.require(fits, "x and y", f"points {(high - low).max().item():.3g} apart", accepted)


def _product(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    kappa: Tensor | None,
    z: Tensor,
    metric: str,
    mode: str,
    over_cost: bool,
    backend: str,
) -> Tensor:
    """``sum_j P_ij (u_i + v_j + kappa C_ij) h(x_i, z_j)``; 1 for no u, 0 for no v and kappa."""
    run = cpu.product_cpu if backend == "cpu" else product_reference
    u = x.new_ones(()).expand_as(f) if u is None else u
    v = x.new_zeros(()).expand_as(g) if v is None else v
    kappa = torch.zeros_like(eps) if kappa is None else kappa
    return run(x, y, f, g, a, b, eps, u, v, kappa, z, metric, mode, over_cost)


def _fake_product(x, y, f, g, a, b, eps, u, v, kappa, z, metric, mode, over_cost, backend):  # noqa: ANN001, ANN202
    return x.new_empty(*x.shape[:-1], z.shape[-1])


solve_op = custom_op("otdd::sinkhorn_points", _solve, _fake_solve)
product_op = custom_op("otdd::sinkhorn_points_product", _product, _fake_product)


def row_gradient(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    kappa: Tensor | None,
    metric: str,
    backend: str,
) -> Tensor:
    """``sum_j P_ij (u_i + v_j + kappa C_ij) dc(x_i, y_j) / dx_i``, ``(..., N, D)``."""
    mode = "sign" if metric == "l1" else "difference"
    weights = u, v, kappa
    out = product_op(x, y, f, g, a, b, eps, *weights, y, metric, mode, metric == "l2", backend)
    return 2 * out if metric == "sqeuclidean" else out


def _solve_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    *problem, _, ctx.metric, _, _, ctx.backend = inputs
    f, g, _, _, marginal_error, n_iter = output
    ctx.save_for_backward(*problem, f, g)
    ctx.mark_non_differentiable(f, g, marginal_error, n_iter)
    ctx.set_materialize_grads(False)


@checks.outside_autocast
def _solve_backward(ctx, df, dg, dvalue, dcost, *_):  # noqa: ANN001, ANN002, ANN202
    none = (None,) * 8
    if dvalue is None and dcost is None:
        return None, None, None, None, *none
    run = _envelope if torch.is_grad_enabled() else _envelope_gradients
    wanted = ctx.needs_input_grad[:4]
    return *run(*ctx.saved_tensors, dvalue, dcost, *wanted, ctx.metric, ctx.backend), *none


def _envelope_gradients(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    f: Tensor,
    g: Tensor,
    dvalue: Tensor | None,
    dcost: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_a: bool,
    need_b: bool,
    metric: str,
    backend: str,
) -> Gradients:
    """The plan held fixed: ``dx_i = (dvalue + dcost) sum_j P_ij dc(x_i, y_j) / dx_i``, dy alike."""
    soft = rho_a is not None or rho_b is not None
    a, b, rho_a, rho_b = filled(x, y, a, b, eps, rho_a, rho_b)
    scale = dvalue if dcost is None else dcost if dvalue is None else dvalue + dcost
    scale = scale[..., None, None]
    plain = None, None, None, metric, backend
    dx = dy = da = db = None
    if need_x:
        dx = scale * row_gradient(x, y, f, g, a, b, eps, *plain)
    if need_y:
        dy = scale * row_gradient(y, x, g, f, b, a, eps, *plain)
    if dvalue is not None and (need_a or need_b):
        _, _, by_a, by_b = _value_slopes((None, a, b, eps, rho_a, rho_b), f, g, True, soft)
        da, db = dvalue.unsqueeze(-1) * by_a, dvalue.unsqueeze(-1) * by_b
    return dx, dy, da if need_a else None, db if need_b else None


_envelope = differentiable(
    _envelope_gradients,
    *no_derivative(
        "sinkhorn_points: no second derivatives; cost_matrix and sinkhorn have those of `value`"
    ),
)
solve = differentiable(solve_op, _solve_setup, _solve_backward)


def _transport(
    z: Tensor,
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    metric: str,
    backend: str,
) -> Tensor:
    """``P z``, ``(..., N, K)``."""
    return product_op(x, y, f, g, a, b, eps, None, None, None, z, metric, "value", False, backend)


def _transport_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    _, *tensors, ctx.metric, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


@checks.outside_autocast
def _transport_backward(ctx, grad):  # noqa: ANN001, ANN202
    x, y, f, g, a, b, eps = ctx.saved_tensors
    return transport(grad, y, x, g, f, b, a, eps, ctx.metric, ctx.backend), *(None,) * 9


transport = differentiable(_transport, _transport_setup, _transport_backward)
