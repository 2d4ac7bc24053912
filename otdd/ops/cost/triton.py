"""The `triton` backend of `cost_matrix`: the cost ``l1``, from differences, and its gradients.

A program adds up one tile of the result, feature by feature or point by point: no ``(N, M, D)``
buffer, no atomics, and an order of sums that the sizes alone fix.
"""

import math

import torch
import triton
from torch import Tensor

from otdd.ops import pointers
from otdd.ops.cost import kernels

ENOUGH = 264  # programs, two for each multiprocessor of an H200


def cost_matrix_triton(x: Tensor, y: Tensor) -> Tensor:
    """Cost ``l1``."""
    C = x.new_empty(*x.shape[:-1], y.shape[-2])
    if C.numel() == 0:
        return C
    B, (x, y) = _flat(x, y)
    N, M, D = x.shape[-2], y.shape[-2], x.shape[-1]
    rows, columns = tile(B, N, M, x.dtype)
    grid = B, triton.cdiv(N, rows), triton.cdiv(M, columns)
    clouds = *_strides(x), *_strides(y)
    with pointers.on_device(x):
        kernels.l1_cost[grid](x, y, C, N, M, D, *clouds, rows, columns, 64, num_warps=8)
    return C


def cost_backward_triton(
    grad: Tensor, x: Tensor, y: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``l1``; that of y is that of x with the clouds exchanged."""
    dx = x.new_empty(x.shape if need_x else (*x.shape[:-1], 0))
    dy = y.new_empty(y.shape if need_y else (*y.shape[:-1], 0))
    B, (x, y) = _flat(x, y)
    (grad,) = pointers.flat(grad.dim() - 2, grad)
    if need_x:
        _side(grad, x, y, dx, B)
    if need_y:
        _side(grad.mT, y, x, dy, B)
    return dx, dy


def _side(G: Tensor, x: Tensor, y: Tensor, dx: Tensor, B: int) -> None:
    if dx.numel() == 0:
        return
    N, M, D = x.shape[-2], y.shape[-2], x.shape[-1]
    rows, features = tile(B, N, D, x.dtype)
    grid = B, triton.cdiv(N, rows), triton.cdiv(D, features)
    weights = *_strides(G), G.stride(-1)
    clouds = *_strides(x), *_strides(y)
    arguments = G, x, y, dx, N, M, D, *weights, *clouds, rows, features, 64
    with pointers.on_device(x):
        kernels.l1_side[grid](*arguments, num_warps=8)


def tile(B: int, N: int, M: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a program: as many as leave enough programs for the chip."""
    single = dtype == torch.float32
    tiles = ((64, 64), (32, 64), (32, 32), (16, 32)) if single else ((32, 32), (16, 32))
    for rows, columns in tiles:
        if B * triton.cdiv(N, rows) * triton.cdiv(M, columns) >= ENOUGH:
            break
    return rows, columns


def _strides(t: Tensor) -> tuple[int, int]:
    """Of the batch, 0 without one, and of the rows."""
    return t.stride(0) if t.dim() == 3 else 0, t.stride(-2)


def _flat(x: Tensor, y: Tensor) -> tuple[int, list[Tensor]]:
    """Problems, and the clouds with one batch dimension or none, rows contiguous."""
    clouds = pointers.flat(x.dim() - 2, x, y)
    return math.prod(x.shape[:-2]), [pointers.with_rows(t) for t in clouds]
