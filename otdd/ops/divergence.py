"""`sinkhorn_divergence`: entropic OT between point clouds without its bias, never negative."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.cost import METRICS, cost_matrix
from otdd.ops.sinkhorn import GRADS, Grad, SinkhornResult, problem_tensors, sinkhorn
from otdd.ops.sinkhorn.reference import conjugate, weighted


@dataclass(frozen=True, eq=False)
class Divergence:
    """Sinkhorn divergence of a batch of pairs of point clouds.

    Attributes:
        value: ``S(x, y) >= 0``, ``(...)``; differentiable.
        f: Debiased row potentials, ``(..., N)``: dS/da up to a constant between hard marginals.
        g: Debiased column potentials, ``(..., M)``.
        between: Solve of x against y.
        within: Solves of x and of y against themselves.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    between: SinkhornResult
    within: tuple[SinkhornResult, SinkhornResult]


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
    Vialard, Trouve & Peyre 2019, definition 5). It is zero at x = y, with penalties once it has
    converged and if they are equal. It is not negative after any number of iterations, up to
    rounding, which is cut off. For that, OT(x, x) is the dual at the
    mean p of its two potentials, OT(y, y) that at q, and the solve of x against y starts at
    (p, q). Its dual only grows from there, and exp(-C / eps) is a positive definite kernel K under
    every metric, so with u = a exp(p / eps) and v = b exp(q / eps)::

        S >= eps (<u, K u> / 2 + <v, K v> / 2 - <u, K v>) >= 0

    Args:
        x: Points ``(..., N, D)``.
        y: Points ``(..., M, D)``; leading dimensions broadcast against those of x.
        a: Weights of x, ``(..., N)``; uniform ``1 / N`` by default.
        b: Weights of y, ``(..., M)``. Without penalties their mass must be that of a, to 1e-3.
        metric: Ground cost, as in `otdd.ops.cost_matrix`.
        eps: Regularisation strength > 0, in the units of the cost.
        max_iter: Iterations of each of the three solves.
        tol: L1 marginal error at which a solve stops by itself; 0 never.
        rho_a: Penalty > 0 on the marginal of x, as in `otdd.ops.sinkhorn`; None or inf: met.
        rho_b: Penalty on the marginal of y.
        grad: As in `otdd.ops.sinkhorn`, for each of the three; what they start from is a constant.
        backend: As in `otdd.ops.sinkhorn`.

    Raises:
        ValueError: As `otdd.ops.cost_matrix` and `otdd.ops.sinkhorn`; masses that differ, without
            penalties (looked at on the CPU, elsewhere with ``OTDD_CHECKS=1``).
        TypeError: As these.
    """
    checks.solver_options(max_iter, tol, metric=(metric, METRICS), grad=(grad, GRADS))
    checks.require(not isinstance(eps, Tensor), "eps", "a tensor", "a number")
    checks.positive(eps, "eps", torch.float64)
    rho_a, rho_b = (None if rho == math.inf else rho for rho in (rho_a, rho_b))
    soft = rho_a is not None or rho_b is not None
    C = cost_matrix(x, y, metric, backend=backend)
    _, _, a, b, _ = problem_tensors(C, eps, None, a, b, like="x")
    if checks.values_are_checked(C):
        checks.weights(a, "a")
        checks.weights(b, "b")
        if not soft:
            _check_masses(a, b)
    x, y = x.expand(*C.shape[:-2], *x.shape[-2:]), y.expand(*C.shape[:-2], *y.shape[-2:])
    options = {"eps": eps, "max_iter": max_iter, "tol": tol, "grad": grad, "backend": backend}

    def within(x: Tensor, a: Tensor | None, rho: float | None) -> SinkhornResult:
        C = cost_matrix(x, x, metric, backend=backend)
        return sinkhorn(C, a, a, rho_a=rho, rho_b=rho, **options)

    within_x, within_y = within(x, a, rho_a), within(y, b, rho_b)
    half_x, p = _half(within_x, eps, rho_a, soft)
    half_y, q = _half(within_y, eps, rho_b, soft)
    between = sinkhorn(C, a, b, rho_a=rho_a, rho_b=rho_b, init=(p, q), **options)
    value = between.value - half_x - half_y
    if soft:
        value = value + eps / 2 * (between.a.sum(-1) - between.b.sum(-1)).square()
    value = value - value.detach().clamp(max=0)  # its gradient stays
    return Divergence(value, between.f - p, between.g - q, between, (within_x, within_y))


def _check_masses(a: Tensor | None, b: Tensor | None) -> None:
    if a is None and b is None:
        return
    one = torch.ones((), dtype=torch.float64)
    mass_a, mass_b = (one if w is None else w.detach().double().sum(-1).cpu() for w in (a, b))
    bad = (mass_a - mass_b).abs() > 1e-3 * torch.maximum(mass_a, mass_b)
    if bool(bad.any()):
        seen = [m.expand(bad.shape)[bad][0].item() for m in (mass_a, mass_b)]
        accepted = "equal masses, or penalties rho_a, rho_b"
        checks.require(False, "a and b", f"masses of {seen[0]:.6g} and {seen[1]:.6g}", accepted)


def _half(
    solved: SinkhornResult, eps: float, rho: float | None, soft: bool
) -> tuple[Tensor, Tensor]:
    """Half of a cloud's transport to itself at the mean of its potentials, and that mean.

    It changes as half of the solve's own value does: the two are the same at convergence. With a
    penalty on the other cloud only, it is the limit of a penalty on this one, in which the mass
    counts too.
    """
    own = solved.value / 2
    if soft and rho is None:
        mass = solved.a.sum(-1)
        by_mass = 1 if solved.grad == "envelope" else 0.5  # of which the value's slopes know or not
        own = own + eps * (mass.square() / 2 - by_mass * mass)
    with torch.no_grad():
        p = (solved.f + solved.g) / 2
        a, mass = solved.a, solved.a.sum(-1)
        plan = replace(solved, f=p, g=p, grad="envelope").plan
        rho = torch.full_like(mass, torch.inf if rho is None else rho)
        reached = mass.square() if soft else mass
        half = weighted(a, conjugate(p, rho)).sum(-1) - eps / 2 * (plan.sum((-1, -2)) - reached)
    return half + (own - own.detach()), p
