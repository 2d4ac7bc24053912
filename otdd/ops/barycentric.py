"""`barycentric`: where the plan sends each source, without keeping the plan."""

from torch import Tensor

from otdd.ops import checks
from otdd.ops.sinkhorn import SinkhornResult


def barycentric(result: SinkhornResult, y: Tensor) -> Tensor:
    """Barycentric projection ``T(x_i) = sum_j P_ij y_j / sum_j P_ij``.

    The plan lives only inside this call; it is differentiable in what `result` is (see
    `SinkhornResult`) and in `y`. At convergence the row sums are a, so this is ``diag(1/a) P y``;
    dividing by the row sums themselves keeps every image inside the hull of y before that too. A
    row of weight zero is sent to 0.

    Args:
        result: A solve with costs ``(..., N, M)``.
        y: Values at the targets, ``(..., M, D)``.

    Returns:
        Images of the sources, ``(..., N, D)``.

    Raises:
        ValueError: `y` does not have M rows, or is on another device.
        TypeError: `y` is not floating point or has another dtype than the solve.
    """
    y = checks.as_float(y, "y")
    checks.same_kind(y, "y", result.f, "the solve")
    M = result.g.shape[-1]
    checks.require(
        y.dim() >= 2 and y.shape[-2] == M, "y", f"shape {tuple(y.shape)}", f"(..., {M}, D)"
    )
    plan = result.plan
    mass = plan.sum(-1, keepdim=True)
    return (plan @ y) / mass.masked_fill(mass == 0, 1)
