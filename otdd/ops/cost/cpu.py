"""The `cpu` backend of `cost_matrix`: C++ tiles."""

from torch import Tensor

from otdd.ops import pointers

_METRICS = {"l1": 0, "sqeuclidean": 1, "l2": 2}


def cost_matrix_cpu(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Costs ``l1``, ``l2`` and ``sqeuclidean`` from differences: no cancellation, no buffer."""
    C = x.new_empty(*x.shape[:-1], y.shape[-2])
    x, y = map(pointers.with_rows, pointers.flat(x.dim() - 2, x, y))
    run = pointers.kernel("cost", x.dtype)
    status = run(x, y, _METRICS[metric], C, pointers.threads())
    pointers.check(status, "cost_matrix")
    return C


def cost_backward_cpu(
    grad: Tensor, x: Tensor, y: Tensor, metric: str, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``l1`` and ``sqeuclidean``: from differences too, and in one pass over them."""
    dx = x.new_empty(x.shape if need_x else (*x.shape[:-1], 0))
    dy = y.new_empty(y.shape if need_y else (*y.shape[:-1], 0))
    outputs = dx if need_x else None, dy if need_y else None
    x, y, grad = map(pointers.with_rows, pointers.flat(x.dim() - 2, x, y, grad))
    run = pointers.kernel("cost_backward", x.dtype)
    status = run(x, y, _METRICS[metric], grad, *outputs, pointers.threads())
    pointers.check(status, "cost_matrix's backward")
    return dx, dy
