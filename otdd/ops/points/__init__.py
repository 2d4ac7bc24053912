"""`sinkhorn_points`: entropic OT between point clouds, without their cost matrix."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.cost import METRICS, cost_matrix
from otdd.ops.cost.reference import normalised
from otdd.ops.matmul import matmul
from otdd.ops.points.dense import cuda_refusal
from otdd.ops.points.op import filled, solve, transport
from otdd.ops.points.reference import Clouds, label_costs
from otdd.ops.sinkhorn import (
    GRADS,
    Grad,
    SinkhornResult,
    _per_problem,
    check_shortcuts,
    problem_tensors,
    sinkhorn,
)
from otdd.ops.sinkhorn.reference import over, plan_from_potentials

# Entries of the largest batch of costs kept for a derivative through the iterations.
DENSE = 1 << 25

Precision = Literal["highest", "high", "medium"]
PRECISIONS = ("highest", "high", "medium")


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
        precision: Of the products between points.
        backend: Backend that solved it.
        labels: None, or labels of the rows and of the columns, int64 ``(..., N)``, ``(..., M)``,
            and the cost between labels, ``(..., K, L)``.
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
    precision: str
    backend: str
    labels: tuple[Tensor, Tensor, Tensor] | None = None

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
        p, f, g = self._problem()
        C = _costs(p, self.metric, self.backend)
        return plan_from_potentials(C, f, g, p.a, p.b, self.eps)

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
        p, f, g = self._problem()
        if transpose:
            p, f, g = p.swapped(), g, f
        return transport(z, *p, f, g, self.metric, self.precision, self.backend)

    def barycentric(self, z: Tensor) -> Tensor:
        """Barycentric projection ``(1 / a_i) sum_j P_ij z_j``; a row of weight zero is sent to 0.

        Args:
            z: Values at the columns, ``(..., M, K)``, as in `apply`.

        Returns:
            ``(..., N, K)``.
        """
        return over(self.apply(z), self._problem()[0].a.unsqueeze(-1))

    def _problem(self) -> tuple[Clouds, Tensor, Tensor]:
        """The problem and its potentials; constants under ``envelope``."""
        labels = self.labels or (None, None, None)
        points = self.x, self.y, self.a, self.b, self.eps, None, None, *labels
        tensors = *points, self.f, self.g
        if self.grad == "envelope":
            tensors = (None if t is None else t.detach() for t in tensors)
        *problem, f, g = tensors
        return Clouds(*problem), f, g


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
    schedule: float | None = None,
    labels_x: Tensor | None = None,
    labels_y: Tensor | None = None,
    label_cost: Tensor | None = None,
    precision: Precision = "highest",
    backend: str | None = None,
) -> PointsResult:
    """Solves ``min_P <P, C> + eps KL(P | a x b)`` with ``C_ij = c(x_i, y_j)``.

    With labels, ``C_ij = c(x_i, y_j) + label_cost[labels_x_i, labels_y_j]``, the ground cost of
    distances between labelled data sets (Alvarez-Melis & Fusi, NeurIPS 2020, eq. 4).

    The iterates of ``sinkhorn(cost_matrix(x, y, metric), a, b, ...)``, in memory for ``(N + M) D``
    numbers: costs are made tile by tile in each iteration, from differences of coordinates, so that
    clouds far from the origin keep their digits. A cost matrix that is small is kept all the same
    where that is faster. (With labels, ``K M + L N`` numbers more on the CPU.)

    Gradients:

    - ``envelope``: ``dvalue/dx_i = sum_j P_ij dc(x_i, y_j)/dx_i``, ``dvalue/da = f`` (up to a
      constant), y and b alike, ``dvalue/dlabel_cost`` the mass between labels, and `cost` with the
      plan held fixed; streamed as well. No second derivatives.
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
        schedule: None, or a ratio in (0, 1) by which eps falls to `eps` (epsilon scaling), as in
            `otdd.ops.sinkhorn`; from the largest cost in the box around the points.
        labels_x: Labels of the sources, int64 ``(..., N)`` or broadcastable to it; the labels go
            with `label_cost`, all three or none.
        labels_y: Labels of the targets, ``(..., M)``.
        label_cost: Cost between labels, ``(..., K, L)`` of the dtype of x; differentiable.
        precision: How accurate the products between points have to be at least, in the words of
            `torch.set_float32_matmul_precision`: ``highest``, the dtype's own; ``high``, that of
            TF32 (10 bits); ``medium``, that of bfloat16 (7 bits). What is allowed is not always
            done: all backends but ``triton`` compute every product at its best.
        backend: ``reference``, ``cpu``, or None for the first that can.

    Raises:
        ValueError: A bad option, shapes that don't fit, different devices, D = 0, N or M = 0,
            eps or rho <= 0, more than 2^25 costs without ``envelope``, one or two of the three
            arguments for labels, and on the CPU (elsewhere with ``OTDD_CHECKS=1``) NaN or inf,
            costs that overflow, negative weights, a problem with only zero weights, or labels that
            `label_cost` does not have.
        TypeError: Not floating point, labels that are not int64, or different dtypes.
        otdd.backends.BackendError: The backend asked for cannot run here.
    """
    choices = {"metric": (metric, METRICS), "precision": (precision, PRECISIONS)}
    checks.solver_options(max_iter, tol, grad=(grad, GRADS), **choices)
    if schedule is not None:
        check_shortcuts(schedule, None, grad)
    x, y = _clouds(x, y)
    shape = x.new_empty(()).expand(*x.shape[:-1], y.shape[-2])  # of the cost that is not made
    labels = _labels(labels_x, labels_y, label_cost, x, shape)
    if metric == "cosine":
        x, y, metric = *_on_sphere(x, y), "sqeuclidean"
    if isinstance(init, PointsResult):
        init = init.f, init.g
    _, (_, g), a, b, eps = problem_tensors(shape, eps, init, a, b, "init", like="x")
    rho_a, rho_b = (
        None if rho is None else _per_problem(rho, name, shape, or_inf=True)
        for rho, name in ((rho_a, "rho_a"), (rho_b, "rho_b"))
    )
    problem = x, y, a, b, eps, rho_a, rho_b, *labels
    if grad != "envelope":
        accepted = "grad='envelope' above 2^25 costs in all"
        checks.require(shape.numel() <= DENSE, "grad", f"{grad!r} for {shape.numel()}", accepted)
        options = {"max_iter": max_iter, "tol": tol, "schedule": schedule, "grad": grad}
        return _dense(Clouds(*problem), g, metric, precision, backend, options)
    *_, N, M = shape.shape
    refusals = pointers.refusals(x, cuda_refusal(x, N, M, schedule))
    chosen = backends.choose("sinkhorn_points", refusals, backend)
    options = int(max_iter), float(tol), float(schedule or 0), precision
    f, g, value, cost, marginal_error, n_iter = solve(*problem, g, metric, *options, chosen)
    a, b = filled(*problem)[2:4]
    solved = value, cost, f, g, n_iter, marginal_error, x, y, a, b, eps
    how = metric, float(tol), grad, precision, chosen
    return PointsResult(*solved, *how, None if label_cost is None else labels)


def _dense(
    p: Clouds, g: Tensor | None, metric: str, precision: str, backend: str | None, options: dict
) -> PointsResult:
    """The solve with its cost matrix, for derivatives of the iterations."""
    C = _costs(p, metric, backend)
    penalties = {"rho_a": p.rho_a, "rho_b": p.rho_b, "backend": backend}
    r = sinkhorn(C, p.a, p.b, eps=p.eps, init=(None, g), **penalties, **options)
    solved = r.value, r.cost, r.f, r.g, r.n_iter, r.marginal_error, p.x, p.y, r.a, r.b, p.eps
    labels = None if p.label_cost is None else (p.labels_x, p.labels_y, p.label_cost)
    return PointsResult(*solved, metric, r.tol, r.grad, precision, r.backend, labels)


def _costs(p: Clouds, metric: str, backend: str | None) -> Tensor:
    C = cost_matrix(p.x, p.y, metric, backend=backend)
    return C if p.label_cost is None else C + label_costs(p, slice(None))


def _labels(
    labels_x: Tensor | None,
    labels_y: Tensor | None,
    label_cost: Tensor | None,
    x: Tensor,
    shape: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Labels and their costs over the batch, checked."""
    given = {"labels_x": labels_x, "labels_y": labels_y, "label_cost": label_cost}
    missing = [name for name, t in given.items() if t is None]
    if len(missing) == 3:
        return None, None, None
    together = "labels_x, labels_y and label_cost, all or none"
    checks.require(not missing, missing[0] if missing else "", "None beside the others", together)
    label_cost = checks.as_float(label_cost, "label_cost")
    checks.same_kind(label_cost, "label_cost", x, "x")
    *batch, N, M = shape.shape
    full = label_cost.dim() >= 2 and 0 not in label_cost.shape[-2:]
    checks.require(full, "label_cost", f"shape {tuple(label_cost.shape)}", "(..., K, L)")
    label_cost = _expanded(label_cost, "label_cost", (*batch, *label_cost.shape[-2:]))
    sides = []
    for labels, name, n in ((labels_x, "labels_x", N), (labels_y, "labels_y", M)):
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            seen = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"{name}: got {seen}; accepted: a tensor of int64")
        same = labels.device == x.device
        checks.require(same, name, f"device {labels.device}", f"that of x, {x.device}")
        sides.append(_expanded(labels, name, (*batch, n)))
    return *sides, label_cost


def _expanded(t: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    try:
        return t.expand(shape)
    except RuntimeError:
        accepted = f"{shape} or broadcastable to it"
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; accepted: {accepted}") from None


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
