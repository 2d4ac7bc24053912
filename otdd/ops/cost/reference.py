"""Cost matrices in plain PyTorch: the specification, and the path for any device.

``x (..., N, D)`` and ``y (..., M, D)``, float32 or float64. No ``(N, M, D)`` buffer.
"""

import math

import torch
from torch import Tensor

from otdd.ops.matmul import product, wide

_CHUNK = 1 << 22  # elements of the largest temporary in the L1 backward


def cost_matrix_reference(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Cost ``(..., N, M)`` under `metric`; see `otdd.ops.cost_matrix`."""
    if metric == "l1":
        return torch.cdist(x, y, p=1.0)
    if metric == "l2":
        scale = scale_of_squares(x, y)
        return _euclidean(x / scale, y / scale) * scale
    if metric == "sqeuclidean":
        return _euclidean(x, y).square()
    return 1 - product(normalised(x), normalised(as_one(y)).mT)


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    if as_one(y).dim() < x.dim():  # cdist would copy it for each problem
        return _euclidean(x.flatten(0, -2), as_one(y)).unflatten(0, x.shape[:-1])
    # Differences, not |x|^2 + |y|^2 - 2xy: exact for close points and shifted clouds.
    return torch.cdist(x, y, p=2.0, compute_mode="donot_use_mm_for_euclid_dist")


def as_one(t: Tensor) -> Tensor:
    """`t`, without a batch if all its problems have the same points, at the same place.

    What is computed of it is then not computed, nor kept, for each problem.
    """
    batch = zip(t.shape[:-2], t.stride(), strict=False)
    one = t.numel() > 0 and all(size == 1 or stride == 0 for size, stride in batch)
    return t[(0,) * (t.dim() - 2)] if one else t


def scale_of_squares(x: Tensor, y: Tensor) -> Tensor:
    """A power of two for each problem: 1 unless squares of its largest number leave the range."""
    top = torch.maximum(x.detach().abs().amax((-2, -1)), y.detach().abs().amax((-2, -1)))
    info = torch.finfo(x.dtype)
    safe = (top == 0) | ((top > info.tiny**0.25) & (top < info.max**0.4))
    exponent = torch.frexp(top).exponent - 1
    power = torch.ldexp(torch.ones_like(top), torch.where(safe, 0, exponent))
    return power[..., None, None]


def normalised(x: Tensor) -> Tensor:
    """``x / |x|`` along the last axis; a zero vector stays zero (its cosine to anything is 0).

    Its derivatives are 0; a norm has no second one at 0, so none is taken there.
    """
    zero = (x == 0).all(-1, keepdim=True)
    x = torch.where(zero, 1, x / peak(x))  # the largest is 1: no square under- or overflows
    return torch.where(zero, 0, x / torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def peak(x: Tensor) -> Tensor:
    """Largest magnitude along the last axis, a constant for the gradient; 1 for a zero vector."""
    top = x.detach().abs().amax(-1, keepdim=True)
    return torch.where(top > 0, top, 1)


def cost_backward_reference(
    grad: Tensor, x: Tensor, y: Tensor, metric: str, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """``dx_i = sum_j G_ij w(x_i - y_j)`` and ``dy_j = -sum_i G_ij w(x_i - y_j)``.

    ``w`` is the sign for ``l1`` and twice its argument for ``sqeuclidean``. A side that is not
    needed is empty.
    """
    if metric == "l1":
        return _l1_backward(grad, x, y, need_x, need_y)
    dx = _sqeuclidean_side(grad, x, y) if need_x else x.new_empty(*x.shape[:-1], 0)
    dy = _sqeuclidean_side(grad.mT, y, x) if need_y else y.new_empty(*y.shape[:-1], 0)
    return dx, dy


def _sqeuclidean_side(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``dx_i = 2 sum_j G_ij (x_i - y_j)``, both clouds centred first so that nothing cancels."""
    y = as_one(y)
    centre = y.mean(-2, keepdim=True)
    return 2 * (grad.sum(-1, keepdim=True) * (x - centre) - product(grad, y - centre))


def _l1_backward(
    grad: Tensor, x: Tensor, y: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.zeros_like(x) if need_x else x.new_empty(*x.shape[:-1], 0)
    dy = torch.zeros_like(y) if need_y else y.new_empty(*y.shape[:-1], 0)
    *batch, n, d = x.shape
    batch = math.prod(batch)
    rows = max(1, _CHUNK // max(1, batch * y.shape[-2] * d))
    cols = max(1, _CHUNK // max(1, batch * y.shape[-2] * min(rows, n)))
    for i in range(0, n, rows):
        g = wide(grad[..., i : i + rows, :])
        for k in range(0, d, cols):
            xs, ys = x[..., i : i + rows, None, k : k + cols], y[..., None, :, k : k + cols]
            signs = wide(torch.sign(xs - ys))  # (..., rows, M, cols)
            if need_x:
                dx[..., i : i + rows, k : k + cols] = torch.einsum("...nm,...nmd->...nd", g, signs)
            if need_y:
                dy[..., k : k + cols] -= torch.einsum("...nm,...nmd->...md", g, signs)
    return dx, dy
