"""The `cuda` backend of `cost_matrix`: CUDA C++, in the current stream."""

import math

from torch import Tensor

from otdd.ops import pointers
from otdd.ops.cost.reference import scale_of_squares


def cost_matrix_cuda(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Costs ``l1``, ``l2`` and ``sqeuclidean`` from differences: no cancellation, no buffer."""
    if metric == "l2":
        scale = scale_of_squares(x, y)
        return cost_matrix_cuda(x / scale, y / scale, "sqeuclidean").sqrt() * scale
    C = x.new_empty(*x.shape[:-1], y.shape[-2])
    sizes = _sizes(x, y)
    x, y = map(pointers.with_rows, pointers.flat(x.dim() - 2, x, y))
    device, stream = pointers.place(x)
    space = pointers.workspace(x, "cost", *sizes)
    run = pointers.cuda_kernel("cost", x.dtype)
    status = run(device, stream, metric == "sqeuclidean", x, y, C, space)
    pointers.check_cuda(status, "cost_matrix")
    return C


def cost_backward_cuda(
    grad: Tensor, x: Tensor, y: Tensor, metric: str, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``l1``, in an order of sums that the sizes alone fix."""
    assert metric == "l1"
    dx = x.new_empty(x.shape if need_x else (*x.shape[:-1], 0))
    dy = y.new_empty(y.shape if need_y else (*y.shape[:-1], 0))
    outputs = dx if need_x else None, dy if need_y else None
    sizes = _sizes(x, y)
    x, y, grad = pointers.flat(x.dim() - 2, x, y, grad)
    x, y = pointers.with_rows(x), pointers.with_rows(y)
    device, stream = pointers.place(x)
    space = pointers.workspace(x, "cost_backward", *sizes)
    run = pointers.cuda_kernel("cost_backward", x.dtype)
    status = run(device, stream, x, y, grad, *outputs, space)
    pointers.check_cuda(status, "cost_matrix's backward")
    return dx, dy


def _sizes(x: Tensor, y: Tensor) -> tuple[int, int, int, int]:
    """Problems, points of x, points of y, features."""
    return math.prod(x.shape[:-2]), x.shape[-2], y.shape[-2], x.shape[-1]
