"""`transport_moves`: where the transport of each class takes its points, as one op."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.barycentric import images
from otdd.ops.cost import cost_op, gradient_of_x
from otdd.ops.dispatch import custom_op, differentiable, no_derivative
from otdd.ops.matmul import product
from otdd.ops.moves.cuda import moves_cuda
from otdd.ops.sinkhorn.op import plan_op, solve_op

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Moves:
    """What `transport_moves` gives.

    Attributes:
        of_x: Images of x, or the gradient in x, ``(..., N, D)``.
        f: Row potentials, ``(..., N + L)``.
        g: Column potentials, ``(..., M)``; a start for the next solve.
        eps: Regularisation strength of each class, ``(...)``.
    """

    of_x: Tensor
    f: Tensor
    g: Tensor
    eps: Tensor


def transport_moves(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    lambda_1: float,
    metric: str,
    max_iter: int,
    gradient: bool,
    given: Tensor | None = None,
    g: Tensor | None = None,
    backend: str | None = None,
) -> Moves:
    """Solves the transport of many classes and says how it moves x, the plan held fixed.

    ``C = cost_matrix(x, y)`` above the rows `given`, ``eps = lambda_1 std(C)`` of each class over
    its pairs with weight, ``P = sinkhorn(C, a, b)``. Then either the images
    ``T(x_i) = sum_j P_ij y_j / a_i``, as by `otdd.ops.barycentric`, or the gradient of ``<P, C>``
    in x. Costs and solve each run on the backend that `cost_matrix` and `sinkhorn` choose for them.
    Where both are ``cuda``, one native call makes the costs (of ``l1`` and ``sqeuclidean``), eps,
    the solve, and the plan; in place of that, the gradient itself under ``l1``.

    Args:
        x: Moving points, ``(..., N, D)``; all shapes are checked by the caller. float16 and
            bfloat16 are widened once, before the kernels, and all results are in float32: those of
            widening first, to the bit.
        y: Targets, ``(..., M, D)``, of the same type when widened, as all that follows is.
        a: Row weights, ``(..., N + L)``; 0 is a mask.
        b: Column weights, ``(..., M)``.
        lambda_1: eps as a factor of the standard deviation of the costs.
        metric: As in `otdd.ops.cost_matrix`.
        max_iter: Sinkhorn iterations.
        gradient: The gradient, not the images.
        given: Costs of further points, which stay where they are, ``(..., L, M)``.
        g: Column potentials to start from, ``(..., M)``.
        backend: As in `otdd.ops.sinkhorn`.

    Raises:
        ValueError: Different devices, and on the CPU (elsewhere with ``OTDD_CHECKS=1``) what the
            parts refuse.
        TypeError: Not floating point, or different dtypes.
        otdd.backends.BackendError: The backend asked for cannot run here.
    """
    x = checks.as_float(x, "x")
    y, a, b = _widened(y, "y", x), _widened(a, "a", x), _widened(b, "b", x)
    given = None if given is None else _widened(given, "given", x)
    g = None if g is None else _widened(g, "g", x)
    of_cost = backends.choose("cost_matrix", pointers.refusals(x), backend)
    of_solve = backends.choose("sinkhorn", pointers.refusals(x), backend)
    options = lambda_1, metric, max_iter, gradient, of_cost, of_solve
    return Moves(*_moves(x, y, a, b, given, g, *options))


def _widened(t: Tensor, name: str, x: Tensor) -> Tensor:
    """`t` of the dtype of x: the kernels read memory, and not what type it is of."""
    t = checks.as_float(t, name)
    checks.same_kind(t, name, x, "x")
    return t


def scaled_eps(C: Tensor, a: Tensor, b: Tensor, lambda_1: float) -> Tensor:
    """``lambda_1`` times the standard deviation of costs between points with weight, ``(...)``."""
    rows, columns = (a > 0).to(C.dtype), (b > 0).to(C.dtype)
    valid, count = rows[..., :, None] * columns[..., None, :], rows.sum(-1) * columns.sum(-1)
    mean = (C * valid).sum((-2, -1)) / count
    spread = ((C - mean[..., None, None]).square() * valid).sum((-2, -1)) / count
    floor = 1e-6 * mean.abs() + 1e-12  # a single pair has no spread
    return lambda_1 * spread.sqrt().maximum(floor)


def _forward(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    given: Tensor | None,
    start: Tensor | None,
    lambda_1: float,
    metric: str,
    max_iter: int,
    gradient: bool,
    of_cost: str,
    of_solve: str,
) -> Outputs:
    """What becomes of x, then f, g and eps."""
    checked = checks.values_are_checked(x)
    if checked:
        for name, t in (("given", given), ("g", start)):
            if t is not None:
                checks.finite(t, name)
    in_one = metric in ("l1", "sqeuclidean") and of_cost == of_solve == "cuda"
    C = None if in_one else cost_op(x, y, metric, of_cost)
    if of_solve == "cuda":
        if checked:
            checks.finite(x, "x")
            checks.finite(y, "y")
            checks.weights(a, "a")
            checks.weights(b, "b")
        of_x, plan, f, g, eps = moves_cuda(
            x, y, C, a, b, given, start, lambda_1, metric, max_iter, gradient
        )
        if checked:
            if not math.isfinite(f.sum().item()):  # costs that overflow, if of a mask alone, show
                checks.finite(cost_op(x, y, metric, of_cost) if C is None else C, "C")
            checks.positive(eps, "eps", eps.dtype)
        if not gradient:
            of_x = product(plan, y)
        elif not (in_one and metric == "l1"):
            of_x = gradient_of_x(plan, x, y, C, metric, of_cost)
        return of_x, f, g, eps
    assert C is not None
    costs = C if given is None else torch.cat([C, given], -2)
    eps, count = scaled_eps(costs, a, b, lambda_1), x.shape[-2]
    options = max_iter, 0.0, 0.0, "", "envelope", False, of_solve
    e = eps.double()
    f, g, *_ = solve_op(costs, a, b, e, None, None, start, *options)
    part = C, f[..., :count], g, a[..., :count], b, e
    if not gradient:
        return images(*part, y, of_solve), f, g, eps  # the costs have shown that y is finite
    plan = plan_op(*part, None, False, False, of_solve)
    return gradient_of_x(plan, x, y, C, metric, of_cost), f, g, eps


def _fake(x: Tensor, y: Tensor, a: Tensor, b: Tensor, *options: object) -> Outputs:
    shapes = x.shape, a.shape, b.shape, x.shape[:-2]
    of_x, f, g, eps = (x.new_empty(shape) for shape in shapes)
    return of_x, f, g, eps


_moves = differentiable(
    custom_op("otdd::transport_moves", _forward, _fake),
    *no_derivative("transport_moves: how a transport moves points has no derivative here"),
)
