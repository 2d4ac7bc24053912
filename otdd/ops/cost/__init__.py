"""`cost_matrix`: pairwise ground costs, differentiable, without an ``(N, M, D)`` buffer."""

import math
from typing import Any

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.cost.cpu import cost_backward_cpu, cost_matrix_cpu
from otdd.ops.cost.cuda import cost_backward_cuda, cost_matrix_cuda
from otdd.ops.cost.reference import (
    cost_backward_reference,
    cost_matrix_reference,
    normalised,
    peak,
)
from otdd.ops.dispatch import custom_op, differentiable
from otdd.ops.matmul import matmul

METRICS = ("l1", "l2", "sqeuclidean", "cosine")


def cost_matrix(x: Tensor, y: Tensor, metric: str = "l1", *, backend: str | None = None) -> Tensor:
    """Pairwise cost between two point clouds.

    - ``l1``: ``sum_d |x_d - y_d|``; gradient ``sign(x_d - y_d)``, 0 where equal
    - ``l2``: Euclidean distance; gradient 0 where points coincide, to a normal number
    - ``sqeuclidean``: squared Euclidean distance
    - ``cosine``: ``1 - <x, y> / (|x| |y|)``; a zero vector has cost 1 to everything, gradient 0

    Differentiable in `x` and `y`; twice for all metrics but ``l1``. Neither direction makes an
    ``(N, M, D)`` buffer. ``l2`` is right also where squares would over- or underflow.

    When one point of many moves, its row alone has to be made, and gets the gradient::

        C = torch.cat([known_rows, cost_matrix(x_new[None], y)])

    Args:
        x: Sources, ``(..., N, D)``; float16 and bfloat16 are computed, and returned, in float32.
        y: Targets, ``(..., M, D)``; leading dimensions broadcast against those of `x`.
        metric: One of ``l1``, ``l2``, ``sqeuclidean``, ``cosine``.
        backend: ``reference``, ``cpu``, ``cuda``, ``triton``, or None for the first that can.

    Returns:
        Cost, ``(..., N, M)``, float32 or float64.

    Raises:
        ValueError: Unknown metric, shapes that don't fit, D = 0, N or M = 0, different devices, NaN
            or inf (checked on the CPU; elsewhere with ``OTDD_CHECKS=1``), unknown backend.
        TypeError: Not floating point, or different dtypes.
        otdd.backends.BackendError: The backend asked for cannot run here.
    """
    checks.require(metric in METRICS, "metric", repr(metric), ", ".join(METRICS))
    x, y = checks.as_float(x, "x"), checks.as_float(y, "y")
    checks.same_kind(y, "y", x, "x")
    checks.require(x.dim() >= 2, "x", f"shape {tuple(x.shape)}", "(..., N, D)")
    checks.require(y.dim() >= 2, "y", f"shape {tuple(y.shape)}", "(..., M, D)")
    for name, t in (("x", x), ("y", y)):
        checks.require(
            0 not in t.shape[-2:], name, f"shape {tuple(t.shape)}", "at least one point, D >= 1"
        )
    if x.shape[-1] != y.shape[-1]:
        checks.require(False, "y", f"D = {y.shape[-1]}", f"D of x, {x.shape[-1]}")
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"y: got leading dimensions {tuple(y.shape[:-2])}; accepted: ones that broadcast "
            f"with those of x, {tuple(x.shape[:-2])}"
        ) from None
    x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
    chosen = backends.choose("cost_matrix", pointers.refusals(x), backend)
    return _cost_matrix(x, y, metric, chosen)


def _cost(x: Tensor, y: Tensor, metric: str, backend: str) -> Tensor:
    # Products, those of cosine and of most gradients, are the library's own ground.
    if backend == "cpu" and metric != "cosine":
        C = cost_matrix_cpu(x, y, metric)
    elif backend == "cuda" and metric != "cosine":
        C = cost_matrix_cuda(x, y, metric)
    elif backend == "triton" and metric == "l1":
        C = pointers.triton_kernels("cost").cost_matrix_triton(x, y)
    else:
        C = cost_matrix_reference(x, y, metric)
    # NaN and inf show in the cost, and it is mostly much smaller than the points are.
    if checks.values_are_checked(x) and not math.isfinite(C.sum().item()):
        checks.finite(x, "x")
        checks.finite(y, "y")
    return C


def _fake_cost(x: Tensor, y: Tensor, metric: str, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], y.shape[-2])


def _gradients(
    grad: Tensor, x: Tensor, y: Tensor, metric: str, need_x: bool, need_y: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y under ``l1`` or ``sqeuclidean``; one not needed has D = 0."""
    if backend == "triton" and metric == "l1":
        return pointers.triton_kernels("cost").cost_backward_triton(grad, x, y, need_x, need_y)
    run = cost_backward_reference
    if backend == "cpu":
        run = cost_backward_cpu
    elif backend == "cuda" and metric == "l1":
        run = cost_backward_cuda
    return run(grad, x, y, metric, need_x, need_y)


def _fake_gradients(
    grad: Tensor, x: Tensor, y: Tensor, metric: str, need_x: bool, need_y: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(*x.shape[:-1], x.shape[-1] if need_x else 0)
    return dx, y.new_empty(*y.shape[:-1], y.shape[-1] if need_y else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, y, ctx.metric, ctx.backend = inputs
    ctx.save_for_backward(x, y, *([output] if ctx.metric == "l2" else []))


@checks.outside_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors[:2]
    need_x, need_y = ctx.needs_input_grad[:2]
    if ctx.metric == "cosine":
        dx = _cosine_side(grad, x, y) if need_x else None
        dy = _cosine_side(grad.mT, y, x) if need_y else None
        return dx, dy, None, None
    metric = ctx.metric
    if metric == "l2":
        grad, metric = _of_squares(grad, ctx.saved_tensors[2]), "sqeuclidean"
    run = _cost_gradients if torch.is_grad_enabled() else cost_gradients
    dx, dy = run(grad, x, y, metric, need_x, need_y, ctx.backend)
    return dx if need_x else None, dy if need_y else None, None, None


def gradient_of_x(
    grad: Tensor, x: Tensor, y: Tensor, C: Tensor | None, metric: str, backend: str
) -> Tensor:
    """Gradient of ``<grad, C>``, for ``C`` the costs of `cost_matrix`, in x; not differentiable.

    The costs themselves are needed for ``l2`` alone.
    """
    if metric == "cosine":
        return _cosine_side(grad, x, y)
    if metric == "l2":
        assert C is not None
        grad, metric = _of_squares(grad, C), "sqeuclidean"
    return cost_gradients(grad, x, y, metric, True, False, backend)[0]


def _of_squares(grad: Tensor, C: Tensor) -> Tensor:
    """The gradient with respect to squared distances, from that of the distances C."""
    none = torch.finfo(C.dtype).tiny > C  # 0, or too small to be divided by: the gradient is 0
    return grad / (2 * C).masked_fill_(none, torch.inf)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, y, ctx.metric, ctx.need_x, ctx.need_y, ctx.backend = inputs
    ctx.save_for_backward(grad, x, y)


@checks.outside_autocast
def _second_backward(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """Of ``<u, dx> + <v, dy> = 2 sum_ij G_ij <x_i - y_j, u_i - v_j>``, for ``sqeuclidean``."""
    if ctx.metric == "l1":
        raise NotImplementedError("cost_matrix with metric l1 has no second derivative")
    grad, x, y = ctx.saved_tensors
    u = u if ctx.need_x else torch.zeros_like(x)
    v = v if ctx.need_y else torch.zeros_like(y)
    need_grad, need_x, need_y = ctx.needs_input_grad[:3]
    d_grad = None
    if need_grad:
        centre = y.detach().mean(-2, keepdim=True)
        x, y = x - centre, y - centre
        own = (x * u).sum(-1).unsqueeze(-1) + (y * v).sum(-1).unsqueeze(-2)
        d_grad = 2 * (own - matmul(u, y.mT) - matmul(x, v.mT))
    dx, dy = _cost_gradients(grad, u, v, ctx.metric, need_x, need_y, ctx.backend)
    return d_grad, dx if need_x else None, dy if need_y else None, None, None, None, None


def _cosine_side(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    unit, top = normalised(x), peak(x)
    d_unit = -matmul(grad, normalised(y))
    norm = torch.linalg.vector_norm(x / top, dim=-1, keepdim=True)  # of x it is top times that
    tangent = d_unit - (d_unit * unit).sum(-1, keepdim=True) * unit
    return torch.where(norm > 0, tangent / torch.where(norm > 0, norm, 1) / top, 0)


cost_gradients = custom_op("otdd::cost_matrix_backward", _gradients, _fake_gradients)
_cost_gradients = differentiable(cost_gradients, _setup_second, _second_backward)
cost_op = custom_op("otdd::cost_matrix", _cost, _fake_cost)
_cost_matrix = differentiable(cost_op, _setup_context, _backward)
