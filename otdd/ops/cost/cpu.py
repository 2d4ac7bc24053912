"""The `cpu` backend of `cost_matrix`: C++ tiles over raw pointers."""

import torch
from torch import Tensor

from otdd.ops import pointers

_METRICS = {"l1": 0, "sqeuclidean": 1, "l2": 2}


def cost_matrix_cpu(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Costs ``l1``, ``l2`` and ``sqeuclidean`` from differences: no cancellation, no buffer."""
    B, N, D = x.shape
    C = x.new_empty(B, N, y.shape[1])
    (x, x_rows), (y, y_rows) = pointers.rows(x), pointers.rows(y)
    run = pointers.kernel("cost", x.dtype)
    threads = torch.get_num_threads()
    run(B, N, y.shape[1], D, x_rows, y_rows, _METRICS[metric], C.data_ptr(), threads)
    return C


def l1_backward_cpu(
    grad: Tensor, x: Tensor, y: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the L1 cost, each a sum of signs weighted by `grad`."""
    dx = _sign_sum(grad, x, y) if need_x else x.new_empty(0)
    dy = _sign_sum(grad.mT, y, x) if need_y else y.new_empty(0)
    return dx, dy


def _sign_sum(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``sum_j G_ij sign(x_i - y_j)``, ``(B, N, D)``."""
    B, N, D = x.shape
    out = x.new_empty(B, N, D)
    (x, x_rows), (y, y_rows) = pointers.rows(x), pointers.rows(y)
    run = pointers.kernel("sign_sum", x.dtype)
    threads = torch.get_num_threads()
    address, strides = grad.data_ptr(), grad.stride()
    run(B, N, y.shape[1], D, x_rows, y_rows, address, *strides, out.data_ptr(), threads)
    return out
