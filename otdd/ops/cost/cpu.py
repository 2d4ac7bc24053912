"""The `cpu` backend of `cost_matrix`: C++ tiles over raw pointers."""

from torch import Tensor

from otdd.ops import pointers

_METRICS = {"l1": 0, "sqeuclidean": 1, "l2": 2}


def cost_matrix_cpu(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Costs ``l1``, ``l2`` and ``sqeuclidean`` from differences: no cancellation, no buffer."""
    C = x.new_empty(*x.shape[:-1], y.shape[-2])
    (B, N, M, D), (x, y) = _flat(x, y)
    run = pointers.kernel("cost", x.dtype)
    clouds = pointers.matrices(x), pointers.matrices(y)
    status = run(B, N, M, D, *clouds, _METRICS[metric], C.data_ptr(), pointers.threads())
    pointers.check(status, "cost_matrix")
    return C


def cost_backward_cpu(
    grad: Tensor, x: Tensor, y: Tensor, metric: str, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``l1`` and ``sqeuclidean``: from differences too, and in one pass over them."""
    dx = x.new_empty(x.shape if need_x else (*x.shape[:-1], 0))
    dy = y.new_empty(y.shape if need_y else (*y.shape[:-1], 0))
    outputs = dx.data_ptr() if need_x else 0, dy.data_ptr() if need_y else 0
    (B, N, M, D), (x, y, grad) = _flat(x, y, grad)
    run = pointers.kernel("cost_backward", x.dtype)
    clouds = pointers.matrices(x), pointers.matrices(y)
    sizes, weights = (B, N, M, D), pointers.matrices(grad)
    status = run(*sizes, *clouds, _METRICS[metric], weights, *outputs, pointers.threads())
    pointers.check(status, "cost_matrix's backward")
    return dx, dy


def _flat(x: Tensor, y: Tensor, *more: Tensor) -> tuple[tuple, list[Tensor]]:
    """Sizes (B, N, M, D), and the tensors with one batch dimension or none, rows contiguous."""
    flat = [pointers.with_rows(t) for t in pointers.flat(x.dim() - 2, x, y, *more)]
    B = flat[0].shape[0] if x.dim() > 2 else 1
    return (B, x.shape[-2], y.shape[-2], x.shape[-1]), flat
