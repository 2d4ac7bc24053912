"""`cost_matrix`: pairwise ground costs, differentiable, without an ``(N, M, D)`` buffer."""

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.cost.cpu import cost_matrix_cpu, l1_backward_cpu
from otdd.ops.cost.reference import (
    cost_matrix_reference,
    l1_backward_reference,
    normalised,
    peak,
)

METRICS = ("l1", "l2", "sqeuclidean", "cosine")


def cost_matrix(x: Tensor, y: Tensor, metric: str = "l1", *, backend: str | None = None) -> Tensor:
    """Pairwise cost between two point clouds.

    - ``l1``: ``sum_d |x_d - y_d|``; gradient ``sign(x_d - y_d)``, 0 where equal
    - ``l2``: Euclidean distance; gradient 0 where the points coincide
    - ``sqeuclidean``: squared Euclidean distance
    - ``cosine``: ``1 - <x, y> / (|x| |y|)``; a zero vector has cost 1 to everything, gradient 0

    Differentiable in `x` and `y`; twice for all metrics but ``l1``. Neither direction makes an
    ``(N, M, D)`` buffer.

    Args:
        x: Sources, ``(..., N, D)``; float16 and bfloat16 are computed, and returned, in float32.
        y: Targets, ``(..., M, D)``; leading dimensions broadcast against those of `x`.
        metric: One of ``l1``, ``l2``, ``sqeuclidean``, ``cosine``.
        backend: ``reference``, ``cpu``, or None for the first that can.

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
    checks.require(x.shape[-1] == y.shape[-1], "y", f"D = {y.shape[-1]}", f"D of x, {x.shape[-1]}")
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"y: got leading dimensions {tuple(y.shape[:-2])}; accepted: ones that broadcast "
            f"with those of x, {tuple(x.shape[:-2])}"
        ) from None
    x3 = x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
    y3 = y.expand(*batch, *y.shape[-2:]).reshape(-1, *y.shape[-2:])
    chosen = backends.choose(
        "cost_matrix", {"cpu": pointers.refusal(x3), "reference": None}, backend
    )
    C = _cost_matrix(x3, y3, metric, chosen)
    return C.reshape(*batch, x.shape[-2], y.shape[-2])


@torch.library.custom_op("otdd::cost_matrix", mutates_args=())
def _cost_matrix(x: Tensor, y: Tensor, metric: str, backend: str) -> Tensor:
    if checks.values_are_checked(x):
        checks.finite(x, "x")
        checks.finite(y, "y")
    if backend == "cpu" and metric != "cosine":
        return cost_matrix_cpu(x, y, metric)
    return cost_matrix_reference(x, y, metric)


@_cost_matrix.register_fake
def _(x: Tensor, y: Tensor, metric: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], y.shape[1])


@torch.library.custom_op("otdd::cost_matrix_l1_backward", mutates_args=())
def _l1_backward(
    grad: Tensor, x: Tensor, y: Tensor, need_x: bool, need_y: bool, backend: str
) -> tuple[Tensor, Tensor]:
    run = l1_backward_cpu if backend == "cpu" else l1_backward_reference
    return run(grad, x, y, need_x, need_y)


@_l1_backward.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor, need_x: bool, need_y: bool, backend: str):  # noqa: ANN202
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(y) if need_y else y.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    x, y, ctx.metric, ctx.backend = inputs
    ctx.save_for_backward(x, y, *([output] if ctx.metric == "l2" else []))


@checks.outside_autocast
def _backward(ctx, grad: Tensor):  # noqa: ANN001, ANN202
    x, y = ctx.saved_tensors[:2]
    need_x, need_y = ctx.needs_input_grad[:2]
    if ctx.metric == "l1":
        dx, dy = _l1_backward(grad.contiguous(), x, y, need_x, need_y, ctx.backend)
    elif ctx.metric == "cosine":
        dx = _cosine_side(grad, x, y) if need_x else None
        dy = _cosine_side(grad.mT, y, x) if need_y else None
    else:
        if ctx.metric == "l2":
            C = ctx.saved_tensors[2]
            grad = torch.where(C > 0, grad / (2 * torch.where(C > 0, C, 1)), 0)
        dx = _sqeuclidean_side(grad, x, y) if need_x else None
        dy = _sqeuclidean_side(grad.mT, y, x) if need_y else None
    return dx if need_x else None, dy if need_y else None, None, None


def _sqeuclidean_side(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``dx_i = 2 sum_j G_ij (x_i - y_j)``, both clouds centred first so that nothing cancels."""
    centre = y.detach().mean(-2, keepdim=True)
    return 2 * (grad.sum(-1, keepdim=True) * (x - centre) - grad @ (y - centre))


def _cosine_side(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    unit, top = normalised(x), peak(x)
    d_unit = -(grad @ normalised(y))
    norm = torch.linalg.vector_norm(x / top, dim=-1, keepdim=True)  # of x it is top times that
    tangent = d_unit - (d_unit * unit).sum(-1, keepdim=True) * unit
    return torch.where(norm > 0, tangent / torch.where(norm > 0, norm, 1) / top, 0)


_cost_matrix.register_autograd(_backward, setup_context=_setup_context)
for _device in ("cpu", "cuda"):
    _cost_matrix.register_autocast(_device, torch.float32)
