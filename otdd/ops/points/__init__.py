"""`sinkhorn_points`: entropic OT between point clouds, without their cost matrix."""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.cost import METRICS
from otdd.ops.cost.reference import normalised
from otdd.ops.points.dense import cuda_refusal
from otdd.ops.points.gradients import solve, solve_implicit
from otdd.ops.points.op import equal_weights
from otdd.ops.points.reference import Clouds
from otdd.ops.points.result import Labels, PointsResult, costs_of
from otdd.ops.sinkhorn import (
    GRADS,
    Grad,
    SinkhornResult,
    _per_problem,
    check_shortcuts,
    problem_tensors,
    sinkhorn,
)
from otdd.ops.sinkhorn.gradients import solve as solve_costs

# Entries of the largest batch of costs kept for a derivative through the iterations.
DENSE = 1 << 25
KEPT = 1 << 22  # where an op that may keep its costs does

Precision = Literal["highest", "high", "medium"]
PRECISIONS = ("highest", "high", "medium")


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
    init: tuple[Tensor | None, Tensor] | SinkhornResult | PointsResult | None = None,
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
    numbers: costs are made tile by tile in each iteration, from differences of coordinates, or on
    ``triton`` from products of centred points, so that clouds far from the origin keep their
    digits. Costs that are few are kept all the same where that is faster: up to 2^23 on the CPU and
    of a problem by ``cuda``, up to 2^16 of a problem and 1 GiB of many features by ``triton``
    (whose C / eps is to be finite, of masked points too).
    (With labels, ``K M + L N`` numbers more on the CPU.)

    Gradients:

    - ``envelope``: ``dvalue/dx_i = sum_j P_ij dc(x_i, y_j)/dx_i``, ``dvalue/da = f`` (up to a
      constant), y and b alike, ``dvalue/dlabel_cost`` the mass between labels, and `cost` with the
      plan held fixed: one sum over the plan for each cloud. `value` has second derivatives, those
      of the fixed point, but under ``l1`` none in x and y: two passes over the plan by blocks of
      rows, and the linear system of ``implicit``.
    - ``implicit``: the derivative of the fixed point, for value, cost, f, g, `PointsResult.apply`
      and `barycentric`; exact at convergence. Conjugate gradients in float64, two products with the
      plan a step, which is kept while it has at most 2^22 entries, and one sum for each cloud.
    - ``unrolled``: that of the iterations done, as in `otdd.ops.sinkhorn`, whose cost matrix it
      keeps: for at most 2^25 costs in all.

    Beyond these, nothing but ``unrolled`` and `PointsResult.plan` takes memory for N x M numbers.

    Args:
        x: Sources, ``(..., N, D)``; float16 and bfloat16 are computed, and results given, in
            float32.
        y: Targets, ``(..., M, D)``; leading dimensions broadcast against those of `x`.
        a: Row weights, ``(..., N)``, whose batch broadcasts; uniform ``1 / N`` by default. Zero
            masks a row: its gradient is 0.
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
            done: all backends but ``triton`` compute every product at its best, as do all of them
            for gradients and images, whatever that setting of torch is. What it costs in accuracy
            is in benchmarks/NOTES.md.
        backend: ``reference``, ``cpu``, ``cuda`` (up to 2^23 costs a problem, no `schedule`),
            ``triton``, or None for the first that can.

    Raises:
        ValueError: A bad option, shapes that don't fit, different devices, D = 0, N or M = 0,
            eps or rho <= 0, more than 2^25 costs under ``unrolled``, one or two of the three
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
    x, y = clouds_of(x, y)
    shape = x.new_empty(()).expand(*x.shape[:-1], y.shape[-2])  # of the cost that is not made
    labels = _labels(labels_x, labels_y, label_cost, x, shape)
    if metric == "cosine":
        x, y, metric = *on_sphere(x, y), "sqeuclidean"
    if isinstance(init, PointsResult):
        init = init.f, init.g
    _, (_, g), a, b, eps = problem_tensors(shape, eps, init, a, b, "init", like="x")
    rho_a, rho_b = (
        None if rho is None else _per_problem(rho, name, shape, or_inf=True)
        for rho, name in ((rho_a, "rho_a"), (rho_b, "rho_b"))
    )
    p = Clouds(x, y, a, b, eps, rho_a, rho_b, *labels)
    options = {"max_iter": max_iter, "tol": tol, "schedule": schedule, "grad": grad}
    return solve_clouds(p, g, metric, precision, backend, options)


def solve_clouds(
    p: Clouds,
    g: Tensor | None,
    metric: str,
    precision: str,
    backend: str | None,
    options: dict[str, Any],
    C: Tensor | None = None,
    done: Tensor | int = 0,
) -> PointsResult:
    """A solve whose arguments are checked, with its cost matrix or without.

    Args:
        p: The problems; a, b, rho_a, rho_b and the labels may be None.
        g: Column potentials to start from, or None.
        metric: Ground cost between points; not ``cosine``.
        precision: Of products between points.
        backend: As in `sinkhorn_points`; beside C, the one that solves.
        options: max_iter, tol, schedule and grad.
        C: The costs where they are kept; for ``unrolled`` they are in any case.
        done: Iterations that came before.
    """
    tol, grad = float(options["tol"]), options["grad"]
    limits = int(options["max_iter"]), tol, float(options["schedule"] or 0)
    if grad == "unrolled" and C is None:
        costs = p.eps.numel() * p.x.shape[-2] * p.y.shape[-2]
        if costs > DENSE:
            accepted = "another mode above 2^25 in all"
            checks.require(False, "grad", f"{grad!r} for {costs} costs", accepted)
        start = None if g is None else (None, g)
        C, given = costs_of(p, metric, backend), {"init": start, "backend": backend, **options}
        r = sinkhorn(C, p.a, p.b, eps=p.eps, rho_a=p.rho_a, rho_b=p.rho_b, **given)
        out, backend = (r.f, r.g, r.value, r.cost, r.marginal_error, r.n_iter), r.backend
    elif C is not None:
        assert backend is not None
        out = solve_costs(C, *p[2:7], g, *limits, "", grad, False, backend)
    else:
        found = refusals(p.x, p.y, options["schedule"])
        backend = backends.choose("sinkhorn_points", found, backend)
        run = solve_implicit if grad == "implicit" else solve
        out = run(*p, g, metric, *limits, precision, backend)
    f, g, value, cost, marginal_error, n_iter = out[:6]
    labels = None if p.label_cost is None else cast(Labels, p[-3:])
    solved = value, cost, f, g, n_iter + done, marginal_error, p.x, p.y
    a, b = equal_weights(*p[:4])
    return PointsResult(*solved, a, b, p.eps, metric, tol, grad, precision, backend, labels)


def placed(op: str, x: Tensor, y: Tensor, backend: str | None) -> tuple[str, bool]:
    """The backend of an op that may keep the costs between clouds, and whether it keeps them."""
    few = math.prod(x.shape[:-1]) * y.shape[-2] <= KEPT  # numel() would fix them in an export
    chosen = backends.choose(op, refusals(x, y, None), backend)
    return chosen, few and chosen != "triton"


def refusals(x: Tensor, y: Tensor, schedule: float | None) -> dict[str, str | None]:
    """For `backends.choose`: what each backend of `sinkhorn_points` has against a problem."""
    return pointers.refusals(x, cuda_refusal(x, x.shape[-2], y.shape[-2], schedule))


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
    if labels_x is None or labels_y is None or label_cost is None:
        together = "labels_x, labels_y and label_cost, all or none"
        raise ValueError(f"{missing[0]}: got None beside the others; accepted: {together}")
    label_cost = checks.as_float(label_cost, "label_cost")
    checks.same_kind(label_cost, "label_cost", x, "x")
    *batch, N, M = shape.shape
    full = label_cost.dim() >= 2 and 0 not in label_cost.shape[-2:]
    checks.require(full, "label_cost", f"shape {tuple(label_cost.shape)}", "(..., K, L)")
    label_cost = _expanded(label_cost, "label_cost", (*batch, *label_cost.shape[-2:]))
    return (
        labels_of_points(labels_x, "labels_x", (*batch, N), x.device),
        labels_of_points(labels_y, "labels_y", (*batch, M), x.device),
        label_cost,
    )


def labels_of_points(
    labels: Tensor, name: str, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Labels of the shape of their points, checked."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        seen = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: got {seen}; accepted: a tensor of int64")
    same = labels.device == device
    checks.require(same, name, f"device {labels.device}", f"that of the points, {device}")
    return _expanded(labels, name, shape)


def _expanded(t: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    try:
        return t.expand(shape)
    except RuntimeError:
        accepted = f"{shape} or broadcastable to it"
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; accepted: {accepted}") from None


def clouds_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points of one batch shape, float32 or float64."""
    x, y = checks.as_float(x, "x"), checks.as_float(y, "y")
    checks.same_kind(y, "y", x, "x")
    for name, t, accepted in (("x", x, "(..., N, D)"), ("y", y, "(..., M, D)")):
        full = t.dim() >= 2 and 0 not in t.shape[-2:]
        checks.require(full, name, f"shape {tuple(t.shape)}", f"{accepted}, none of the two 0")
    if x.shape[-1] != y.shape[-1]:
        checks.require(False, "y", f"D = {y.shape[-1]}", f"D of x, {x.shape[-1]}")
    if x.shape[:-2] == y.shape[:-2]:
        return x.expand(x.shape), y.expand(y.shape)  # not one tensor twice: Dynamo refuses that
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"y: got leading dimensions {tuple(y.shape[:-2])}; accepted: ones that broadcast "
            f"with those of x, {tuple(x.shape[:-2])}"
        ) from None
    return x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])


def on_sphere(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
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
