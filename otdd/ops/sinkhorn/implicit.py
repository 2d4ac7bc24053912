"""The linear system of the fixed point, from products with the plan alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from otdd.ops.watch import Watch

LOOK = 8  # steps of conjugate gradients from one look at whether all are done to the next

Product = Callable[[Tensor], Tensor]


def over(numerator: Tensor, weights: Tensor) -> Tensor:
    """Division that gives 0 where the weight is 0 (a mask has no gradient)."""
    return torch.where(weights > 0, numerator / torch.where(weights > 0, weights, 1), 0)


def implicit_tolerance(dtype: torch.dtype) -> float:
    """How far the fixed point's linear system is trusted: potentials of `dtype` carry no more."""
    return 10 * torch.finfo(dtype).eps


def adjoint(
    times: Product,
    transposed: Product,
    damp_a: Tensor,
    damp_b: Tensor,
    df: Tensor,
    dg: Tensor,
    rtol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adjoint of the fixed point: ``(diag(c) - P' diag(1/r) P) h = dg - P' (df / r)``.

    r and c are the plan's own row and column sums over the damping of their marginal. Between hard
    marginals the matrix is positive semi-definite and its kernel is the constants, the freedom
    (f + c, g - c); `h` is found by conjugate gradients on the symmetrically scaled system,
    orthogonally to that kernel. Blocks that the plan hardly joins make it nearly singular; see
    `implicit_tolerance`.

    Args:
        times: ``P h`` of ``(..., M)`` in float64.
        transposed: ``P' k`` of ``(..., N)``.
        damp_a: Damping of the row marginal, ``(..., 1)``.
        damp_b: Damping of the column marginal.
        df: Cotangent of the row potentials, ``(..., N)`` in float64; 0 where a weight is 0.
        dg: Cotangent of the column potentials, ``(..., M)``.
        rtol: Residual over that of h = 0 which ends the search.

    Returns:
        k ``(..., N)`` and h ``(..., M)``, by which the costs get ``P_ij (k_i + h_j)``, and
        ``P h``, ``P' k``.
    """
    r = times(torch.ones_like(dg)) / damp_a
    c = transposed(torch.ones_like(df)) / damp_b
    half = c.sqrt()

    def matrix(z: Tensor) -> Tensor:
        return z - over(transposed(over(times(over(z, half)), r)), half)

    hard = (damp_a == 1) & (damp_b == 1)
    kernel = torch.where(hard, half / half.norm(dim=-1, keepdim=True), 0)
    rhs = over(dg - transposed(over(df, r)), half)
    rhs = rhs - (rhs * kernel).sum(-1, keepdim=True) * kernel
    h = over(_conjugate_gradients(matrix, rhs, kernel, rtol), half)
    to_rows = times(h)
    k = over(df - to_rows, r)
    return k, h, to_rows, transposed(k)


def _conjugate_gradients(matrix: Product, rhs: Tensor, kernel: Tensor, rtol: float) -> Tensor:
    """Batched CG orthogonal to `kernel`; problems that are done stand still.

    Done is a residual of `rtol`, or a direction whose curvature is below it: what lies there is
    rounding, divided by nearly nothing. Nothing of the result depends on how late the host sees
    that all are done.
    """
    if rhs.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the linear system of the fixed point ends when the device says so: derivatives that "
            "need it cannot be captured in a CUDA graph"
        )
    x, residual = torch.zeros_like(rhs), rhs
    direction, rho = rhs, rhs.square().sum(-1, keepdim=True)
    goal = rho * rtol**2
    going, watch = torch.ones_like(rho, dtype=torch.bool), Watch(LOOK, waits=True)
    for k in range(10 * rhs.shape[-1]):
        going = going & (rho > goal)
        if watch.over(k, going):
            break
        image = matrix(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        steep = curvature > rtol * direction.square().sum(-1, keepdim=True)
        going = active = going & steep
        step = torch.where(active, rho / curvature, 0)
        x = x + step * direction
        residual = residual - step * image
        residual = residual - (residual * kernel).sum(-1, keepdim=True) * kernel
        rho, before = residual.square().sum(-1, keepdim=True), rho
        direction = residual + torch.where(active, rho / before, 0) * direction
    return x
