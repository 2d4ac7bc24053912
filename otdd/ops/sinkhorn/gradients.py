"""Derivatives of a solve: of the plan held fixed, of the iterations done, of the fixed point."""

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.dispatch import differentiable, no_derivative
from otdd.ops.sinkhorn.op import Gradients, backward_op, filled, plan_op, solve_op
from otdd.ops.sinkhorn.reference import conjugate, kept, over, weighted


def _solve_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    problem, (ctx.grad, ctx.sinkd, ctx.backend) = inputs[:6], inputs[-3:]
    f, g, _, _, marginal_error, n_iter, history = output
    iterations = (history, n_iter) if ctx.grad == "unrolled" else (None, None)
    ctx.save_for_backward(*problem, f, g, *iterations)
    constants = (f, g) if ctx.grad == "envelope" else ()
    kept = () if history is None else (history,)
    ctx.mark_non_differentiable(*constants, marginal_error, n_iter, *kept)
    ctx.set_materialize_grads(False)


@checks.outside_autocast
def _solve_backward(ctx, df, dg, dvalue, dcost, *_):  # noqa: ANN001, ANN002, ANN202
    *problem, f, g, history, n_iter = ctx.saved_tensors
    need_C, need_a, need_b = ctx.needs_input_grad[:3]
    if df is None and dg is None and dvalue is None and dcost is None:
        return (None,) * 14
    again = torch.is_grad_enabled()  # a derivative of this derivative may be asked for
    if ctx.grad == "envelope":
        run = _envelope if again else _envelope_gradients
        needed = need_C, need_a or need_b
        dC, da, db = run(*problem, f, g, dvalue, dcost, *needed, ctx.sinkd, ctx.backend)
    else:
        run = _through if again else _through_gradients
        dC, da, db = run(
            *problem, f, g, history, n_iter, df, dg, dvalue, dcost, ctx.grad, ctx.sinkd, ctx.backend
        )
    wanted = dC if need_C else None, da if need_a else None, db if need_b else None
    return *wanted, *(None,) * 11


def value_slopes(
    problem: tuple[Tensor, ...], f: Tensor, g: Tensor, fixed_point: bool, soft: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Partial derivatives of the dual value: in f, g, and in a, b at given potentials.

    At the fixed point the rows of P sum to ``a exp(-f / rho_a)``, which `value` itself does not
    use; there the value is stationary in f and g, and the derivatives in a and b are the total
    ones. Without a `soft` marginal the value is ``<a, f> + <b, g>``.
    """
    _, a, b, eps, rho_a, rho_b = problem
    if not soft:
        return a, b, torch.where(a > 0, f, 0), torch.where(b > 0, g, 0)
    kept_a, kept_b = kept(f, rho_a), kept(g, rho_b)
    soft = (torch.isfinite(rho_a) | torch.isfinite(rho_b)).unsqueeze(-1)
    e = torch.where(soft, eps.unsqueeze(-1), 0).to(a.dtype)
    by_f = weighted(a, kept_a)
    by_g = weighted(b, kept_b) * _steeper(eps, rho_b, b.dtype)
    by_a = conjugate(f, rho_a) + e * b.sum(-1, keepdim=True) - (e * kept_a if fixed_point else 0)
    by_b = conjugate(g, rho_b) + e * a.sum(-1, keepdim=True) - e * kept_b
    return by_f, by_g, torch.where(a > 0, by_a, 0), torch.where(b > 0, by_b, 0)


def _steeper(eps: Tensor, rho: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 + eps / rho``, ``(..., 1)``."""
    return (1 + eps / rho).to(dtype).unsqueeze(-1)


def _envelope_gradients(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    f: Tensor,
    g: Tensor,
    dvalue: Tensor | None,
    dcost: Tensor | None,
    need_C: bool,
    need_weights: bool,
    sinkd: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The plan held fixed: ``dC = (dvalue + dcost) P``, and `value`'s slopes in a and b."""
    dC = da = db = None
    if need_C:
        scale = dvalue if dcost is None else dcost if dvalue is None else dvalue + dcost
        dC = plan_op(C, f, g, a, b, eps, scale, sinkd, True, backend)
    if dvalue is not None and need_weights:
        problem = filled(C, a, b, eps, rho_a, rho_b, sinkd)
        soft = rho_a is not None or rho_b is not None
        _, _, by_a, by_b = value_slopes(problem, f, g, True, soft)
        da, db = dvalue.unsqueeze(-1) * by_a, dvalue.unsqueeze(-1) * by_b
    return dC, da, db


def _envelope_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, _, _, ctx.sinkd, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@checks.outside_autocast
def _envelope_backward(ctx, w_C, w_a, w_b):  # noqa: ANN001, ANN202
    """Second derivatives of `value`: P, f and g move with (C, a, b) as the fixed point does."""
    C, a, b, eps, rho_a, rho_b, f, g, dvalue, dcost = ctx.saved_tensors
    if dcost is not None:
        raise NotImplementedError(
            "sinkhorn: grad='envelope' holds the plan fixed in the gradient of `cost`, which then "
            "has no second derivative; `value` has one"
        )
    problem = filled(C, a, b, eps, rho_a, rho_b, ctx.sinkd)
    e = eps.to(f.dtype).unsqueeze(-1)
    df, dg, da, db, ddvalue = value_slopes_backward(problem, f, g, dvalue, w_a, w_b)
    dC = 0
    if w_C is not None:
        P = plan_op(C, f, g, a, b, eps, None, ctx.sinkd, False, ctx.backend)
        flow = P * w_C
        ddvalue = ddvalue + flow.sum((-1, -2))
        flow = flow * dvalue[..., None, None]
        to_rows, to_columns = flow.sum(-1), flow.sum(-2)
        df, dg, dC = df + to_rows / e, dg + to_columns / e, -flow / e.unsqueeze(-1)
        da, db = da + over(to_rows, problem[1]), db + over(to_columns, problem[2])
    through = _once(*problem, f, g, None, None, df, dg, None, "implicit", ctx.sinkd, ctx.backend)
    grads = (
        None if t is None else (direct + implicit).to(t.dtype)
        for t, direct, implicit in zip((C, a, b), (dC, da, db), through, strict=True)
    )
    return *grads, *(None,) * 5, ddvalue, *(None,) * 5


def value_slopes_backward(
    problem: tuple[Tensor, ...],
    f: Tensor,
    g: Tensor,
    dvalue: Tensor,
    w_a: Tensor | None,
    w_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of ``dvalue (<w_a, by_a> + <w_b, by_b>)`` at the fixed point: f, g, a, b and dvalue."""
    _, a, b, eps, rho_a, rho_b = problem
    e, scale = eps.to(a.dtype).unsqueeze(-1), dvalue.unsqueeze(-1)
    _, _, by_a, by_b = value_slopes(problem, f, g, True, True)
    df, dg, da, db = (torch.zeros_like(t) for t in (f, g, a, b))
    ddvalue = torch.zeros_like(dvalue)
    soft = (torch.isfinite(rho_a) | torch.isfinite(rho_b)).unsqueeze(-1)
    mass = torch.where(soft, e * scale, 0)  # each slope holds the other side's mass
    if w_a is not None:
        w = torch.where(a > 0, w_a, 0)
        ddvalue = ddvalue + (w * by_a).sum(-1)
        df = scale * weighted(w, kept(f, rho_a)) * _steeper(eps, rho_a, a.dtype)
        db = torch.where(b > 0, mass * w.sum(-1, keepdim=True), 0)
    if w_b is not None:
        w = torch.where(b > 0, w_b, 0)
        ddvalue = ddvalue + (w * by_b).sum(-1)
        dg = scale * weighted(w, kept(g, rho_b)) * _steeper(eps, rho_b, a.dtype)
        da = torch.where(a > 0, mass * w.sum(-1, keepdim=True), 0)
    return df, dg, da, db, ddvalue


def _through_gradients(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    f: Tensor,
    g: Tensor,
    history: Tensor | None,
    n_iter: Tensor | None,
    df: Tensor | None,
    dg: Tensor | None,
    dvalue: Tensor | None,
    dcost: Tensor | None,
    mode: str,
    sinkd: bool,
    backend: str,
) -> Gradients:
    """Through the iterations or the fixed point: value, cost, f and g."""
    problem = filled(C, a, b, eps, rho_a, rho_b, sinkd)
    df = torch.zeros_like(f) if df is None else df
    dg = torch.zeros_like(g) if dg is None else dg
    if dvalue is not None:
        soft = rho_a is not None or rho_b is not None
        slopes = value_slopes(problem, f, g, False, soft)
        by_f, by_g, by_a, by_b = (slope * dvalue.unsqueeze(-1) for slope in slopes)
        df, dg = df + by_f, dg + by_g
    dC, da, db = backward_op(*problem, f, g, history, n_iter, df, dg, dcost, mode, sinkd, backend)
    dC = dC.to(C.dtype)
    return (dC, da, db) if dvalue is None else (dC, da + by_a, db + by_b)


_NO_MORE = no_derivative(
    "sinkhorn: only `value` under grad='envelope' has a second derivative, and none has a third"
)
_envelope = differentiable(_envelope_gradients, _envelope_setup, _envelope_backward)
_through = differentiable(_through_gradients, *_NO_MORE)
_once = differentiable(backward_op, *_NO_MORE)
solve = differentiable(solve_op, _solve_setup, _solve_backward)
