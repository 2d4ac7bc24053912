"""`sinkhorn_divergence`: entropic OT between point clouds without its bias, never negative."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.cost import METRICS
from otdd.ops.points import clouds_of, on_sphere, placed, solve_clouds
from otdd.ops.points.gradients import solve as solve_points
from otdd.ops.points.reference import Clouds
from otdd.ops.points.result import PointsResult, costs_of
from otdd.ops.sinkhorn import GRADS, Grad, _per_problem, problem_tensors
from otdd.ops.sinkhorn.gradients import solve as solve_costs
from otdd.ops.sinkhorn.op import plan_op
from otdd.ops.sinkhorn.reference import conjugate, weighted


@dataclass(frozen=True, eq=False)
class Divergence:
    """Sinkhorn divergence of a batch of pairs of point clouds.

    Attributes:
        value: ``S(x, y) >= 0``, ``(...)``; differentiable.
        f: Debiased row potentials, ``(..., N)``: dS/da up to a constant between hard marginals.
        g: Debiased column potentials, ``(..., M)``.
        between: Solve of x against y.
        within: Solves of x and of y against themselves: their second half, after both halves'
            iterations.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    between: PointsResult
    within: tuple[PointsResult, PointsResult]

    def __repr__(self) -> str:
        return checks.described(self)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str = "sqeuclidean",
    eps: float,
    max_iter: int = 100,
    tol: float = 0.0,
    rho_a: float | None = None,
    rho_b: float | None = None,
    grad: Grad = "envelope",
    backend: str | None = None,
) -> Divergence:
    """``S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2`` (Feydy et al., AISTATS 2019, eq. 3).

    With penalties, the unbalanced divergence, ``+ eps (sum(a) - sum(b))^2 / 2`` (Sejourne, Feydy,
    Vialard, Trouve & Peyre 2019, definition 5). It is zero at x = y once it has converged, with
    penalties if they are equal. It is not negative after any number of iterations, up to
    rounding, which is cut off. For that, OT(x, x) is the dual at the mean p of its two potentials,
    OT(y, y) that at q, and the solve of x against y starts at (p, q). Its dual only grows from
    there, and exp(-C / eps) is a positive definite kernel K under every metric, so with
    u = a exp(p / eps) and v = b exp(q / eps)::

        S >= eps (<u, K u> / 2 + <v, K v> / 2 - <u, K v>) >= 0

    A transport of a cloud to itself does one and the same thing in both half-steps, so it takes
    half of `max_iter`: a quarter, and from the mean of the potentials another. That is mostly
    nearer to the fixed point than `max_iter` iterations are; all three are about two solves.

    Costs are kept while those of the larger cloud to itself are at most 2^22 in all, and by
    ``cuda``; else they are made tile by tile, in memory for the points. `value` has second
    derivatives under ``envelope``.

    Args:
        x: Points ``(..., N, D)``.
        y: Points ``(..., M, D)``; leading dimensions broadcast against those of x.
        a: Weights of x, ``(..., N)``; uniform ``1 / N`` by default.
        b: Weights of y, ``(..., M)``. Without penalties their mass must be that of a, to 1e-3.
        metric: Ground cost, as in `otdd.ops.cost_matrix`.
        eps: Regularisation strength > 0, in the units of the cost.
        max_iter: Iterations of the solve of x against y.
        tol: If > 0, L1 marginal error at which each of the three solves stops by itself, at the
            latest after `max_iter`.
        rho_a: Penalty > 0 on the marginal of x, as in `otdd.ops.sinkhorn`; None or inf: met.
        rho_b: Penalty on the marginal of y.
        grad: As in `otdd.ops.sinkhorn`, for each of the three; what they start from is a constant.
        backend: ``reference``, ``cpu``, ``cuda``, ``triton``, or None for the first that can.

    Raises:
        ValueError: As `otdd.ops.cost_matrix` and `otdd.ops.sinkhorn`; masses that differ, without
            penalties (looked at on the CPU, elsewhere with ``OTDD_CHECKS=1``).
        TypeError: As these.
    """
    checks.solver_options(max_iter, tol, metric=(metric, METRICS), grad=(grad, GRADS))
    checks.number(eps, "eps", torch.float64)
    rho_a, rho_b = _penalty(rho_a, "rho_a"), _penalty(rho_b, "rho_b")
    soft = rho_a is not None or rho_b is not None
    x, y = clouds_of(x, y)
    shape, a, b, strength = weighted_clouds(x, y, a, b, eps, soft)
    rho_x, rho_y = (
        None if rho is None else _per_problem(rho, name, shape, or_inf=True)
        for rho, name in ((rho_a, "rho_a"), (rho_b, "rho_b"))
    )
    pairs = [(x, y), (x, x.expand(x.shape)), (y, y.expand(y.shape))]
    if metric == "cosine":
        pairs, metric = [on_sphere(*pair) for pair in pairs], "sqeuclidean"
    longer = x if x.shape[-2] > y.shape[-2] else y
    chosen, kept = placed("sinkhorn_divergence", longer, longer, backend)
    limits: dict[str, Any] = {"max_iter": max_iter, "tol": tol, "schedule": None, "grad": grad}
    rest: tuple[Any, ...] = soft, metric, chosen, kept, limits
    of_x, of_y = pairs[1:]
    clouds = Clouds(*pairs[0], a, b, strength, rho_x, rho_y, None, None, None)
    C = None
    if kept:  # first, since its check of values names the sides
        C = costs_of(clouds, metric, chosen)
    elif checks.values_are_checked(x):
        checks.finite(x, "x")
        checks.finite(y, "y")
    within_x, half_x, p = _within(*of_x, a, strength, rho_x, *rest)
    within_y, half_y, q = _within(*of_y, b, strength, rho_y, *rest)
    between = solve_clouds(clouds, q, metric, "highest", chosen, limits, C)
    value = between.value - half_x - half_y
    if soft:
        value = value + eps / 2 * (between.a.sum(-1) - between.b.sum(-1)).square()
    value = value - value.detach().clamp(max=0)  # its gradient stays
    return Divergence(value, between.f - p, between.g - q, between, (within_x, within_y))


def _penalty(rho: float | None, name: str) -> float | None:
    """A penalty for the whole batch; None if the marginal is met."""
    checks.require(not isinstance(rho, Tensor), name, "a tensor", "a number, inf or None")
    return None if rho == math.inf else rho


def _within(
    x: Tensor,
    copy: Tensor,
    a: Tensor | None,
    eps: Tensor,
    rho: Tensor | None,
    soft: bool,
    metric: str,
    backend: str,
    kept: bool,
    limits: dict[str, Any],
) -> tuple[PointsResult, Tensor, Tensor]:
    """A cloud's transport to itself, half of its value, and the mean of its potentials.

    A half-step along a direction of the potentials multiplies it by some -t in [-1, 0], the same
    one in rows and columns, so that the mean of the two potentials keeps ``t^(2n - 1) (1 - t) / 2``
    of it after n iterations: little where t is near 1, which is what iterations alone are slow at.
    """
    cloud = Clouds(x, copy, a, _again(a), eps, rho, _again(rho), None, None, None)
    C = costs_of(cloud, metric, backend) if kept else None
    tol, quarter = limits["tol"], -(-limits["max_iter"] // 4)
    with torch.no_grad():
        if kept:
            some = None, quarter, tol, 0.0, "", "envelope", False
            f, g, *_, n_iter, _ = solve_costs(C, *cloud[2:7], *some, backend)
        else:
            how = None, metric, quarter, tol, 0.0, "highest"
            f, g, *_, n_iter = solve_points(*cloud, *how, backend)
        start = (f + g) / 2
    rest = max(1, limits["max_iter"] - quarter) if tol else quarter
    limits = limits | {"max_iter": rest}
    solved = solve_clouds(cloud, start, metric, "highest", backend, limits, C, n_iter)
    return solved, *half_within(solved, rho, soft, C)


def _again(t: Tensor | None) -> Tensor | None:
    """The same once more: Dynamo refuses one tensor in two places of an op."""
    return None if t is None else t.expand(t.shape)


def weighted_clouds(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, eps: float, soft: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """A tensor of the shape of the costs of x to y; weights and eps over the batch, checked.

    Raises:
        ValueError: As `sinkhorn_divergence`; masses that differ where no marginal is `soft`.
        TypeError: As these.
    """
    shape = x.new_empty(()).expand(*x.shape[:-1], y.shape[-2])
    _, _, a, b, strength = problem_tensors(shape, eps, None, a, b, like="x")
    if checks.values_are_checked(x):
        checks.weights(a, "a")
        checks.weights(b, "b")
        if not soft:
            check_masses(a, b, "equal masses, or penalties rho_a, rho_b")
    return shape, a, b, strength


def check_masses(a: Tensor | None, b: Tensor | None, accepted: str) -> None:
    """Raises unless the weights of each problem have one mass, to 1e-3; None is of mass 1."""
    if a is None and b is None:
        return
    one = torch.ones((), dtype=torch.float64)
    mass_a, mass_b = (one if w is None else w.detach().double().sum(-1).cpu() for w in (a, b))
    bad = (mass_a - mass_b).abs() > 1e-3 * torch.maximum(mass_a, mass_b)
    if bool(bad.any()):
        seen = [m.expand(bad.shape)[bad][0].item() for m in (mass_a, mass_b)]
        checks.require(False, "a and b", f"masses of {seen[0]:.6g} and {seen[1]:.6g}", accepted)


def half_within(
    solved: PointsResult,
    rho: Tensor | None = None,
    soft: bool = False,
    C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Half of a cloud's transport to itself at the mean of its potentials, and that mean.

    It changes as half of the solve's own value does: the two are the same at convergence. With a
    penalty on the other cloud only, it is the limit of a penalty on this one, in which the mass
    counts too.
    """
    own, eps = solved.value / 2, solved.eps.to(solved.value.dtype)
    if soft and rho is None:
        mass = solved.a.sum(-1)
        by_mass = 1 if solved.grad == "envelope" else 0.5  # of which the value's slopes know or not
        own = own + eps * (mass.square() / 2 - by_mass * mass)
    with torch.no_grad():
        p = (solved.f + solved.g) / 2
        a, mass = solved.a, solved.a.sum(-1)
        if C is None:
            at_mean = replace(solved, f=p, g=p.expand(p.shape), grad="envelope")
            total = at_mean.apply(p.new_ones(p.shape[-1], 1)).sum((-1, -2))
        else:
            total = plan_op(C, p, p, a, a, solved.eps, None, False, False, solved.backend).sum(
                (-1, -2)
            )
        rho = torch.full_like(mass, torch.inf) if rho is None else rho
        reached = mass.square() if soft else mass
        half = weighted(a, conjugate(p, rho)).sum(-1) - eps / 2 * (total - reached)
    return half + (own - own.detach()), p
