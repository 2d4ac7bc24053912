"""Cost matrices in plain PyTorch: the specification, and the path for any device.

``x (B, N, D)`` and ``y (B, M, D)``, contiguous, float32 or float64. No ``(N, M, D)`` buffer.
"""

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements of the largest temporary in the L1 backward


def cost_matrix_reference(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Cost ``(B, N, M)`` under `metric`; see `otdd.ops.cost_matrix`."""
    if metric == "l1":
        return torch.cdist(x, y, p=1.0)
    if metric == "l2":
        return _euclidean(x, y)
    if metric == "sqeuclidean":
        return _euclidean(x, y).square()
    return 1 - normalised(x) @ normalised(y).mT


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    # Differences, not |x|^2 + |y|^2 - 2xy: exact for close points and shifted clouds.
    return torch.cdist(x, y, p=2.0, compute_mode="donot_use_mm_for_euclid_dist")


def normalised(x: Tensor) -> Tensor:
    """``x / |x|`` along the last axis; a zero vector stays zero (its cosine to anything is 0)."""
    x = x / peak(x)  # so that no square under- or overflows
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def peak(x: Tensor) -> Tensor:
    """Largest magnitude along the last axis, a constant for the gradient; 1 for a zero vector."""
    top = x.detach().abs().amax(-1, keepdim=True)
    return torch.where(top > 0, top, 1)


def l1_backward_reference(
    grad: Tensor, x: Tensor, y: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """``dx_id = sum_j G_ij sign(x_id - y_jd)`` and ``dy_jd = -sum_i G_ij sign(x_id - y_jd)``."""
    dx = torch.zeros_like(x) if need_x else x.new_empty(0)
    dy = torch.zeros_like(y) if need_y else y.new_empty(0)
    batch, n, d = x.shape
    rows = max(1, _CHUNK // max(1, batch * y.shape[1] * d))
    cols = max(1, _CHUNK // max(1, batch * y.shape[1] * min(rows, n)))
    for i in range(0, n, rows):
        g = grad[:, i : i + rows]
        for k in range(0, d, cols):
            xs, ys = x[:, i : i + rows, None, k : k + cols], y[:, None, :, k : k + cols]
            signs = torch.sign(xs - ys)  # (B, rows, M, cols)
            if need_x:
                dx[:, i : i + rows, k : k + cols] = torch.einsum("bnm,bnmd->bnd", g, signs)
            if need_y:
                dy[..., k : k + cols] -= torch.einsum("bnm,bnmd->bmd", g, signs)
    return dx, dy
