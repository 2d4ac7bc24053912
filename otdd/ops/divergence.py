"""`sinkhorn_divergence`: entropic OT between point clouds without its bias, never negative."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.cost import METRICS, cost_matrix
from otdd.ops.sinkhorn import GRADS, Grad, SinkhornResult, sinkhorn
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
    Vialard, Trouve & Peyre 2019, definition 5). It is zero at x = y, and not negative after any
    number of iterations, up to rounding, which is cut off. For that, OT(x, x) is the dual at the
    mean p of its two potentials, OT(y, y) that at q, and the solve of x against y starts at
    (p, q). Its dual only grows from there, and exp(-C / eps) is a positive definite kernel K under
    every metric, so with u = a exp(p / eps) and v = b exp(q / eps)::

        S >= eps (<u, K u> / 2 + <v, K v> / 2 - <u, K v>) >= 0

    Args:
        x: Points ``(..., N, D)``.
        y: Points ``(..., M, D)``; leading dimensions broadcast against those of x.
        a: Weights of x, ``(..., N)``; uniform ``1 / N`` by default.
        b: Weights of y, ``(..., M)``. Without penalties their mass must be that of a.
        metric: Ground cost, as in `otdd.ops.cost_matrix`.
        eps: Regularisation strength > 0, in the units of the cost.
        max_iter: Iterations of each of the three solves.
        tol: L1 marginal error at which a solve stops by itself; 0 never.
        rho_a: Penalty > 0 on the marginal of x, as in `otdd.ops.sinkhorn`; None: met.
        rho_b: Penalty on the marginal of y.
        grad: As in `otdd.ops.sinkhorn`, for each of the three; what they start from is a constant.
        backend: As in `otdd.ops.sinkhorn`.

    Raises:
        ValueError: As `otdd.ops.cost_matrix` and `otdd.ops.sinkhorn`.
        TypeError: As these.
    """
    checks.solver_options(max_iter, tol, metric=(metric, METRICS), grad=(grad, GRADS))
    checks.require(not isinstance(eps, Tensor), "eps", "a tensor", "a number")
    checks.positive(eps, "eps", torch.float32)
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() >= 2 and y.dim() >= 2:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # of each of the three
        x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])

    def solve(x: Tensor, y: Tensor, *weights: Tensor | None, **options: object) -> SinkhornResult:
        C = cost_matrix(x, y, metric, backend=backend)
        shared = {"eps": eps, "max_iter": max_iter, "tol": tol, "grad": grad, "backend": backend}
        return sinkhorn(C, *weights, **shared, **options)

    within_x = solve(x, x, a, a, rho_a=rho_a, rho_b=rho_a)
    within_y = solve(y, y, b, b, rho_a=rho_b, rho_b=rho_b)
    soft = rho_a is not None or rho_b is not None
    half_x, p = _half(within_x, eps, rho_a, soft)
    half_y, q = _half(within_y, eps, rho_b, soft)
    between = solve(x, y, a, b, rho_a=rho_a, rho_b=rho_b, init=(p, q))
    value = between.value - half_x - half_y
    if soft:
        value = value + eps / 2 * (between.a.sum(-1) - between.b.sum(-1)).square()
    value = value - value.detach().clamp(max=0)  # its gradient stays
    return Divergence(value, between.f - p, between.g - q, between, (within_x, within_y))


def _half(
    solved: SinkhornResult, eps: float, rho: float | None, soft: bool
) -> tuple[Tensor, Tensor]:
    """Half of a cloud's transport to itself at the mean of its potentials, and that mean.

    It changes as half of the solve's own value does: the two are the same at convergence.
    """
    own = solved.value / 2
    with torch.no_grad():
        p = (solved.f + solved.g) / 2
        a, mass = solved.a, solved.a.sum(-1)
        plan = replace(solved, f=p, g=p, grad="envelope").plan
        rho = torch.full_like(mass, torch.inf if rho is None else rho)
        reached = mass.square() if soft else mass
        half = weighted(a, conjugate(p, rho)).sum(-1) - eps / 2 * (plan.sum((-1, -2)) - reached)
    return half + (own - own.detach()), p
