"""`logit_transport`: softmaxes of two batches of logits, L1 costs and the solve as one op."""

from typing import Any

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.cost import cost_gradients, cost_op
from otdd.ops.dispatch import custom_op, differentiable, no_derivative
from otdd.ops.logits.cuda import logits_backward_cuda, logits_cuda
from otdd.ops.sinkhorn.op import plan_op, solve_op

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def logit_transport(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float,
    eps: float,
    max_iter: int,
    sinkd: bool,
    backend: str | None = None,
) -> Tensor:
    """Transport cost ``<P, C>`` between the rows of two batches of logits, plan held fixed.

    ``C_ij = |softmax(s_i / tau) - softmax(t_j / tau)|_1``; P is the plan of `otdd.ops.sinkhorn`
    between equal weights, of 1 each with `sinkd`. Costs and solve each run on the backend that
    `cost_matrix` and `sinkhorn` choose for them. Where both are ``cuda``, all of it is one native
    call in each direction, which reads logits, and writes their gradient, in half precision too.

    Args:
        student: ``(..., B, K)``, checked by the caller as all of this is; differentiable, once.
        teacher: The same shape; no gradient.
        tau: Temperature > 0 of both softmaxes.
        eps: Regularisation strength > 0.
        max_iter: Sinkhorn iterations.
        sinkd: SinKD's marginals.
        backend: As in `otdd.ops.sinkhorn`.

    Returns:
        ``(...)``, float32 or float64.

    Raises:
        ValueError: On the CPU (elsewhere with ``OTDD_CHECKS=1``): a softmax that is NaN.
        otdd.backends.BackendError: The backend asked for cannot run here.
    """
    of_cost = backends.choose("cost_matrix", pointers.refusals(student), backend)
    of_solve = backends.choose("sinkhorn", pointers.refusals(student), backend)
    if not _fused(of_cost, of_solve):
        student, teacher = (checks.as_float(t, "logits") for t in (student, teacher))
    return _transport(student, teacher, tau, eps, max_iter, sinkd, of_cost, of_solve)[0]


def _fused(of_cost: str, of_solve: str) -> bool:
    return of_cost == of_solve == "cuda"


def _forward(
    student: Tensor,
    teacher: Tensor,
    tau: float,
    eps: float,
    max_iter: int,
    sinkd: bool,
    of_cost: str,
    of_solve: str,
) -> Outputs:
    """The cost ``(...)``, then what its gradient needs: p, q, C, f and g."""
    if _fused(of_cost, of_solve):
        outputs = logits_cuda(student, teacher, tau, eps, max_iter, sinkd)
        check_softmaxes(*outputs[1:3])
        return outputs
    p, q = (torch.softmax(logits / tau, -1) for logits in (student, teacher))
    check_softmaxes(p, q)
    C = cost_op(p, q, "l1", of_cost)
    options = None, max_iter, 0.0, 0.0, "", "envelope", sinkd, of_solve
    f, g, _, cost, *_ = solve_op(C, None, None, _per_problem(C, eps), None, None, *options)
    return cost, p, q, C, f, g


def check_softmaxes(p: Tensor, q: Tensor) -> None:
    """Raises for the first that holds NaN, where values are looked at."""
    if checks.values_are_checked(p):  # of the softmax: a logit of -inf is fine
        checks.finite(p, "student_logits, their softmax")
        checks.finite(q, "teacher_logits, their softmax")


def _per_problem(C: Tensor, eps: float) -> Tensor:
    return C.new_full(C.shape[:-2], eps, dtype=torch.float64)


def _fake_forward(student: Tensor, teacher: Tensor, *options: object) -> Outputs:
    *batch, rows, _ = student.shape
    dtype = checks.wide(student.dtype)
    shapes = (
        batch,
        student.shape,
        student.shape,
        (*batch, rows, rows),
        (*batch, rows),
        (*batch, rows),
    )
    cost, p, q, C, f, g = (student.new_empty(shape, dtype=dtype) for shape in shapes)
    return cost, p, q, C, f, g


def _gradient(
    dcost: Tensor,
    p: Tensor,
    q: Tensor,
    C: Tensor,
    f: Tensor,
    g: Tensor,
    tau: float,
    eps: float,
    sinkd: bool,
    dtype: torch.dtype,
    of_cost: str,
    of_solve: str,
) -> Tensor:
    """Of the student's logits, in their type."""
    if _fused(of_cost, of_solve):
        return logits_backward_cuda(dcost, p, q, C, f, g, tau, eps, sinkd, dtype)
    e = _per_problem(C, eps)
    dC = plan_op(C, f, g, None, None, e, dcost, sinkd, True, of_solve)
    dp, _ = cost_gradients(dC, p, q, "l1", True, False, of_cost)
    return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype) / tau


def _fake_gradient(dcost: Tensor, p: Tensor, *others: Any) -> Tensor:
    return p.new_empty(p.shape, dtype=others[7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    student, _, tau, eps, _, sinkd, of_cost, of_solve = inputs
    ctx.options = tau, eps, sinkd, student.dtype, of_cost, of_solve
    ctx.save_for_backward(*output[1:])
    # Not p: a derivative of the gradient, which depends on it, has to find the way to its refusal.
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


@checks.outside_autocast
def _backward(ctx: Any, dcost: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    none = (None,) * 7
    if dcost is None:
        return None, *none
    run = _once if torch.is_grad_enabled() else _gradient_op
    return run(dcost, *ctx.saved_tensors, *ctx.options), *none


_gradient_op = custom_op("otdd::logit_transport_backward", _gradient, _fake_gradient)
_once = differentiable(
    _gradient_op,
    *no_derivative("the transport of logits, its plan held fixed, has no second derivative"),
)
_transport = differentiable(
    custom_op("otdd::logit_transport", _forward, _fake_forward), _setup_context, _backward
)
