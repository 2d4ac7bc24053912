"""`sinkhorn_points`: entropic OT between point clouds, without their cost matrix."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.cost import METRICS, cost_matrix
from otdd.ops.cost.reference import normalised
from otdd.ops.matmul import matmul
from otdd.ops.points.op import filled, solve, transport
from otdd.ops.sinkhorn import (
    GRADS,
    Grad,
    SinkhornResult,
    _per_problem,
    problem_tensors,
    sinkhorn,
)
from otdd.ops.sinkhorn.reference import over, plan_from_potentials

# Entries of the largest batch of costs kept for a derivative through the iterations.
DENSE = 1 << 25


@dataclass(frozen=True, eq=False, slots=True)
class PointsResult:
    """Solution of entropic OT between clouds; like `SinkhornResult`, with points for costs.

    ``value`` and ``cost`` are differentiable in x, y, a and b under every gradient mode; ``f``,
    ``g`` and what is made of the plan under ``unrolled`` and ``implicit`` (constants under
    ``envelope``).

    Attributes:
        value: Dual objective, ``(...)``.
        cost: Transport cost ``<P, C>``, ``(...)``.
        f: Row potentials, ``(..., N)``, in the units of the cost.
        g: Column potentials, ``(..., M)``.
        n_iter: Iterations done, int64 ``(...)``.
        marginal_error: ``sum_i |sum_j P_ij - a_i exp(-f_i / rho_a)|``, ``(...)``.
        x: Points of the rows, ``(..., N, D)``; under ``cosine`` as ``sqeuclidean`` takes them.
        y: Points of the columns, ``(..., M, D)``.
        a: Row weights, ``(..., N)``.
        b: Column weights, ``(..., M)``.
        eps: Regularisation strength, float64 ``(...)``.
        metric: Ground cost between `x` and `y`.
        tol: Marginal error that was asked for.
        grad: Gradient mode.
        backend: Backend that solved it.
    """

    value: Tensor
    cost: Tensor
    f: Tensor
    g: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    eps: Tensor
    metric: str
    tol: float
    grad: str
    backend: str

    @property
    def converged(self) -> Tensor:
        """``marginal_error <= tol``, bool ``(...)``; False for a problem that holds a NaN."""
        return self.marginal_error <= self.tol

    @property
    def plan(self) -> Tensor:
        """Transport plan ``P_ij = a_i b_j exp((f_i + g_j - c(x_i, y_j)) / eps)``.

        Made at each access: ``(..., N, M)`` numbers, and as many for the cost. `apply` and
        `barycentric` need neither.
        """
        x, y, f, g, a, b = self._tensors()
        C = cost_matrix(x, y, self.metric, backend=self.backend)
        return plan_from_potentials(C, f, g, a, b, self.eps)

    def apply(self, z: Tensor, *, transpose: bool = False) -> Tensor:
        """``P z``, or with `transpose` ``P' z``, the plan made tile by tile.

        Args:
            z: ``(..., M, K)``, or ``(..., N, K)`` with `transpose`; leading dimensions broadcast to
                those of the solve. Differentiable.
            transpose: From rows to columns.

        Returns:
            ``(..., N, K)`` or ``(..., M, K)``.

        Raises:
            ValueError: Shapes that don't fit, another device, NaN or inf.
            TypeError: `z` is not floating point or has another dtype than the solve.
        """
        z = checks.as_float(z, "z")
        checks.same_kind(z, "z", self.f, "the solve")
        *batch, n = self.f.shape if transpose else self.g.shape
        wanted = f"{(*batch, n)} + (K,), K >= 1, or broadcastable"
        fits = z.dim() >= 2 and z.shape[-2] == n and z.shape[-1] > 0
        try:
            z = z.expand(*batch, *z.shape[-2:]) if fits else z
        except RuntimeError:
            fits = False
        checks.require(fits, "z", f"shape {tuple(z.shape)}", wanted)
        if checks.values_are_checked(z):
            checks.finite(z, "z")
        if self.grad != "envelope":
            return matmul(self.plan.mT if transpose else self.plan, z)
        x, y, f, g, a, b = self._tensors()
        if transpose:
            x, y, f, g, a, b = y, x, g, f, b, a
        return transport(z, x, y, f, g, a, b, self.eps, self.metric, self.backend)

    def barycentric(self, z: Tensor) -> Tensor:
        """Barycentric projection ``(1 / a_i) sum_j P_ij z_j``; a row of weight zero is sent to 0.

        Args:
            z: Values at the columns, ``(..., M, K)``, as in `apply`.

        Returns:
            ``(..., N, K)``.
        """
        return over(self.apply(z), self._tensors()[4].unsqueeze(-1))

    def _tensors(self) -> tuple[Tensor, ...]:
        tensors = self.x, self.y, self.f, self.g, self.a, self.b
        return tuple(t.detach() for t in tensors) if self.grad == "envelope" else tensors


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str = "sqeuclidean",
    eps: float | Tensor,
    max_iter: int = 100,
    tol: float = 0.0,
    init: tuple[Tensor, Tensor] | SinkhornResult | PointsResult | None = None,
    grad: Grad = "envelope",
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    backend: str | None = None,
) -> PointsResult:
    """Solves ``min_P <P, C> + eps KL(P | a x b)`` with ``C_ij = c(x_i, y_j)``.

    The iterates of ``sinkhorn(cost_matrix(x, y, metric), a, b, ...)``, in memory for ``(N + M) D``
    numbers: costs are made tile by tile in each iteration, from differences of coordinates, so that
    clouds far from the origin keep their digits. A cost matrix that is small is kept all the same
    where that is faster.

    Gradients:

    - ``envelope``: ``dvalue/dx_i = sum_j P_ij dc(x_i, y_j)/dx_i``, ``dvalue/da = f`` (up to a
      constant), y and b alike, and `cost` with the plan held fixed; streamed as well. No second
      derivatives.
    - ``unrolled`` and ``implicit``: as in `otdd.ops.sinkhorn`, whose cost matrix they keep; for at
      most 2^25 costs in all.

    Args:
        x: Sources, ``(..., N, D)``; float16 and bfloat16 are computed, and results given, in
            float32.
        y: Targets, ``(..., M, D)``; leading dimensions broadcast against those of `x`.
        a: Row weights, ``(..., N)`` or broadcastable to it; uniform ``1 / N`` by default. Zero
            masks a row.
        b: Column weights, ``(..., M)``, likewise.
        metric: ``l1``, ``l2``, ``sqeuclidean`` or ``cosine``, as in `otdd.ops.cost_matrix`.
        eps: Regularisation strength > 0 in the units of the cost; a number, or a tensor that
            broadcasts to the batch ``(...)``. Not differentiable.
        max_iter: Iterations at most, >= 1.
        tol: If > 0, each problem stops by itself once its `marginal_error` (L1) is at most this.
        init: Potentials to start from, ``(f, g)`` or an earlier result; only g is used.
        grad: ``envelope``, ``unrolled`` or ``implicit``.
        rho_a: Penalty > 0 on the row marginal, as in `otdd.ops.sinkhorn`; None or inf: met.
        rho_b: Penalty on the column marginal, likewise.
        backend: ``reference``, ``cpu``, or None for the first that can.

    Raises:
        ValueError: A bad option, shapes that don't fit, different devices, D = 0, N or M = 0,
            eps or rho <= 0, more than 2^25 costs without ``envelope``, and on the CPU (elsewhere
            with ``OTDD_CHECKS=1``) NaN or inf, costs that overflow, negative weights or a problem
            with only zero weights.
        TypeError: Not floating point, or different dtypes.
        otdd.backends.BackendError: The backend asked for cannot run here.
    """
    checks.solver_options(max_iter, tol, grad=(grad, GRADS), metric=(metric, METRICS))
    x, y = _clouds(x, y)
    if metric == "cosine":
        x, y, metric = *_on_sphere(x, y), "sqeuclidean"
    shape = x.new_empty(()).expand(*x.shape[:-1], y.shape[-2])  # of the cost that is not made
    if isinstance(init, PointsResult):
        init = init.f, init.g
    _, (_, g), a, b, eps = problem_tensors(shape, eps, init, a, b, "init", like="x")
    rho_a, rho_b = (
        None if rho is None else _per_problem(rho, name, shape, or_inf=True)
        for rho, name in ((rho_a, "rho_a"), (rho_b, "rho_b"))
    )
    options = {"max_iter": int(max_iter), "tol": float(tol)}
    if grad != "envelope":
        accepted = "grad='envelope' above 2^25 costs in all"
        checks.require(shape.numel() <= DENSE, "grad", f"{grad!r} for {shape.numel()}", accepted)
        C = cost_matrix(x, y, metric, backend=backend)
        penalties = {"rho_a": rho_a, "rho_b": rho_b}
        r = sinkhorn(
            C, a, b, eps=eps, init=(None, g), grad=grad, **penalties, **options, backend=backend
        )
        solved = r.value, r.cost, r.f, r.g, r.n_iter, r.marginal_error
        return PointsResult(*solved, x, y, r.a, r.b, eps, metric, r.tol, grad, r.backend)
    refusals = {"cpu": pointers.cpu_refusal(x), "reference": None}
    chosen = backends.choose("sinkhorn_points", refusals, backend)
    f, g, value, cost, marginal_error, n_iter = solve(
        x, y, a, b, eps, rho_a, rho_b, g, metric, *options.values(), chosen
    )
    solved = value, cost, f, g, n_iter, marginal_error
    a, b, *_ = filled(x, y, a, b, eps, None, None)
    return PointsResult(*solved, x, y, a, b, eps, metric, float(tol), grad, chosen)


def _clouds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points of one batch shape, float32 or float64."""
    x, y = checks.as_float(x, "x"), checks.as_float(y, "y")
    checks.same_kind(y, "y", x, "x")
    for name, t, accepted in (("x", x, "(..., N, D)"), ("y", y, "(..., M, D)")):
        full = t.dim() >= 2 and 0 not in t.shape[-2:]
        checks.require(full, name, f"shape {tuple(t.shape)}", f"{accepted}, none of the two 0")
    checks.require(x.shape[-1] == y.shape[-1], "y", f"D = {y.shape[-1]}", f"D of x, {x.shape[-1]}")
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"y: got leading dimensions {tuple(y.shape[:-2])}; accepted: ones that broadcast "
            f"with those of x, {tuple(x.shape[:-2])}"
        ) from None
    return x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])


def _on_sphere(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points whose squared distance is the cosine cost: ``|u - v|^2 = 1 - <x, y> / (|x| |y|)``.

    The unit vectors over the square root of 2, and a direction of its own for the zero vectors of
    each side, which are then at 1 from everything.
    """

    def lifted(t: Tensor, own: int) -> Tensor:
        unit = normalised(t)
        zero = (unit == 0).all(-1, keepdim=True).to(t.dtype)
        other = torch.zeros_like(zero)
        pair = (zero, other) if own == 0 else (other, zero)
        return torch.cat([unit, *pair], -1) / math.sqrt(2)

    return lifted(x, 0), lifted(y, 1)
