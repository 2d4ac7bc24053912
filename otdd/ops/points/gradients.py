"""Derivatives of `sinkhorn_points`: of the plan held fixed, of the fixed point, of an image."""

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.dispatch import differentiable, no_derivative
from otdd.ops.points.implicit import implicit_op
from otdd.ops.points.op import (
    PROBLEM,
    filled,
    label_gradient,
    product_op,
    row_gradient,
    solve_op,
)
from otdd.ops.points.reference import Clouds
from otdd.ops.points.second import image_backward_op, second_op
from otdd.ops.sinkhorn.gradients import value_slopes

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_OPTIONS = 7  # arguments of a solve after the problem


def _solve_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    f, g, _, _, marginal_error, n_iter = output
    _save(ctx, inputs, f, g)
    ctx.mark_non_differentiable(f, g, marginal_error, n_iter)


def _implicit_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    f, g, _, _, marginal_error, n_iter = output
    _save(ctx, inputs, f, g)
    ctx.mark_non_differentiable(marginal_error, n_iter)


def _save(ctx, inputs, f, g) -> None:  # noqa: ANN001
    _, ctx.metric, _, _, _, ctx.precision, ctx.backend = inputs[PROBLEM:]
    ctx.save_for_backward(*inputs[:PROBLEM], f, g)
    ctx.set_materialize_grads(False)


def _wanted(ctx) -> tuple[bool, ...]:  # noqa: ANN001
    """Whether x, y, a, b and the costs between labels need a gradient."""
    return *ctx.needs_input_grad[:4], ctx.needs_input_grad[PROBLEM - 1]


def _of_inputs(grads: Gradients) -> tuple[Tensor | None, ...]:
    dx, dy, da, db, dW = grads
    return dx, dy, da, db, *(None,) * 5, dW, *(None,) * _OPTIONS


@checks.outside_autocast
def _solve_backward(ctx, df, dg, dvalue, dcost, *_):  # noqa: ANN001, ANN002, ANN202
    if dvalue is None and dcost is None:
        return _of_inputs((None,) * 5)
    run = _envelope if torch.is_grad_enabled() else _envelope_gradients
    options = ctx.metric, ctx.precision, ctx.backend
    return _of_inputs(run(*ctx.saved_tensors, dvalue, dcost, *_wanted(ctx), *options))


@checks.outside_autocast
def _implicit_backward(ctx, df, dg, dvalue, dcost, *_):  # noqa: ANN001, ANN002, ANN202
    if df is None and dg is None and dvalue is None and dcost is None:
        return _of_inputs((None,) * 5)
    wanted, options = _wanted(ctx), (ctx.metric, ctx.precision, ctx.backend)
    run = _through if torch.is_grad_enabled() else _through_gradients
    need_x, need_y, _, _, need_label_cost = wanted
    needs = need_x, need_y, need_label_cost
    grads = run(*ctx.saved_tensors, df, dg, dvalue, dcost, *needs, *options)
    return _of_inputs(tuple(t if w else None for t, w in zip(grads, wanted, strict=True)))


def _envelope_gradients(
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
    dvalue: Tensor | None,
    dcost: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_a: bool,
    need_b: bool,
    need_label_cost: bool,
    metric: str,
    precision: str,
    backend: str,
) -> Gradients:
    """The plan held fixed: ``dx_i = (dvalue + dcost) sum_j P_ij dc(x_i, y_j) / dx_i``, dy alike."""
    soft = rho_a is not None or rho_b is not None
    p = filled(x, y, a, b, eps, rho_a, rho_b, labels_x, labels_y, label_cost)
    scale = dvalue if dcost is None else dcost if dvalue is None else dvalue + dcost
    scale = scale[..., None, None]
    plain = None, None, None, metric, precision, backend
    dx = dy = da = db = dW = None
    if need_x:
        dx = scale * row_gradient(p, f, g, *plain)
    if need_y:
        dy = scale * row_gradient(p.swapped(), g, f, *plain)
    if need_label_cost:
        dW = scale * label_gradient(p, f, g, *plain)
    if dvalue is not None and (need_a or need_b):
        _, _, by_a, by_b = value_slopes((None, *p[2:7]), f, g, True, soft)
        da, db = dvalue.unsqueeze(-1) * by_a, dvalue.unsqueeze(-1) * by_b
    return dx, dy, da if need_a else None, db if need_b else None, dW


def _envelope_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ctx.metric, ctx.precision, ctx.backend = inputs
    ctx.save_for_backward(*tensors[: PROBLEM + 4])
    ctx.set_materialize_grads(False)


@checks.outside_autocast
def _envelope_backward(ctx, w_x, w_y, w_a, w_b, w_label_cost):  # noqa: ANN001, ANN202
    *problem, f, g, dvalue, dcost = ctx.saved_tensors
    along = w_x, w_y, w_a, w_b, w_label_cost
    if all(w is None for w in along):
        return (None,) * (PROBLEM + 12)
    if dcost is not None:
        raise NotImplementedError(
            "sinkhorn_points: grad='envelope' holds the plan fixed in the gradient of `cost`, "
            "which then has no second derivative; `value` has one"
        )
    if ctx.metric == "l1" and (w_x is not None or w_y is not None):
        raise NotImplementedError("sinkhorn_points with metric l1 has no second derivative")
    wanted = need_x, need_y, _, _, need_label_cost = _wanted(ctx)
    options = need_x, need_y, need_label_cost, ctx.metric, ctx.precision, ctx.backend
    run = _second if torch.is_grad_enabled() else second_op
    *grads, ddvalue = run(*problem, f, g, dvalue, *along, *options)
    dx, dy, da, db, dW = (t if w else None for t, w in zip(grads, wanted, strict=True))
    return dx, dy, da, db, *(None,) * 5, dW, None, None, ddvalue, *(None,) * 9


def _through_gradients(
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
    df: Tensor | None,
    dg: Tensor | None,
    dvalue: Tensor | None,
    dcost: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_label_cost: bool,
    metric: str,
    precision: str,
    backend: str,
) -> Gradients:
    """Through the fixed point: value, cost, f and g."""
    problem = x, y, a, b, eps, rho_a, rho_b, labels_x, labels_y, label_cost
    df = torch.zeros_like(f) if df is None else df
    dg = torch.zeros_like(g) if dg is None else dg
    if dvalue is not None:
        soft, p = rho_a is not None or rho_b is not None, filled(*problem)
        slopes = value_slopes((None, *p[2:7]), f, g, False, soft)
        by_f, by_g, by_a, by_b = (slope * dvalue.unsqueeze(-1) for slope in slopes)
        df, dg = df + by_f, dg + by_g
    options = need_x, need_y, need_label_cost, metric, precision, backend
    dx, dy, da, db, dW = implicit_op(*problem, f, g, df, dg, dcost, *options)
    return (dx, dy, da, db, dW) if dvalue is None else (dx, dy, da + by_a, db + by_b, dW)


def _transport(
    z: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    labels_x: Tensor | None,
    labels_y: Tensor | None,
    label_cost: Tensor | None,
    f: Tensor,
    g: Tensor,
    metric: str,
    precision: str,
    backend: str,
) -> Tensor:
    """``P z``, ``(..., N, K)``."""
    problem = x, y, a, b, eps, rho_a, rho_b, labels_x, labels_y, label_cost
    options = metric, "value", False, precision, backend
    return product_op(*problem, f, g, None, None, None, z, *options)


def _transport_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ctx.metric, ctx.precision, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


@checks.outside_autocast
def _transport_backward(ctx, grad):  # noqa: ANN001, ANN202
    z, *problem, f, g = ctx.saved_tensors
    need_z, *wanted = ctx.needs_input_grad[: PROBLEM + 3]
    back = None
    if need_z:
        options = ctx.metric, ctx.precision, ctx.backend
        back = transport(grad, *Clouds(*problem).swapped(), g, f, *options)
    if not any(wanted):
        return back, *(None,) * (PROBLEM + 5)
    run = _image_once if torch.is_grad_enabled() else image_backward_op
    needs = wanted[0], wanted[1], wanted[PROBLEM - 1]
    grads = run(*problem, f, g, z, grad, *needs, ctx.metric, ctx.backend)
    of = 0, 1, 2, 3, PROBLEM - 1, PROBLEM, PROBLEM + 1
    dx, dy, da, db, dW, df, dg = (t if wanted[k] else None for k, t in zip(of, grads, strict=True))
    return back, dx, dy, da, db, *(None,) * 5, dW, df, dg, *(None,) * 3


_NO_MORE = no_derivative(
    "sinkhorn_points: only `value` under grad='envelope' has a second derivative, and none has a "
    "third"
)
_envelope = differentiable(_envelope_gradients, _envelope_setup, _envelope_backward)
_second = differentiable(second_op, *_NO_MORE)
_through = differentiable(_through_gradients, *_NO_MORE)
_image_once = differentiable(image_backward_op, *_NO_MORE)
solve = differentiable(solve_op, _solve_setup, _solve_backward)
solve_implicit = differentiable(solve_op, _implicit_setup, _implicit_backward)
transport = differentiable(_transport, _transport_setup, _transport_backward)
