"""`partial`: transport of a given part of the mass, the rest left where it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.sinkhorn import Accelerate, Grad, SinkhornResult, problem_tensors, sinkhorn
from otdd.ops.sinkhorn.op import equal_weights

# Times eps, beyond every cost: the plan between the slack points is exp(-100) or so.
_FORBIDDEN = 100


@dataclass(frozen=True, eq=False)
class PartialResult:
    """Solution of a batch of partial OT problems.

    Attributes:
        extended: The balanced problem that was solved, ``(..., N + 1, M + 1)``: its last row and
            column are the slack points.
    """

    extended: SinkhornResult

    def __repr__(self) -> str:
        return checks.described(self)

    @property
    def plan(self) -> Tensor:
        """What is transported, ``(..., N, M)``; its entries sum to the mass asked for."""
        return self.extended.plan[..., :-1, :-1]

    @property
    def cost(self) -> Tensor:
        """``<P, C>`` of the transported mass, ``(...)``; differentiable as in `sinkhorn`."""
        return self.extended.cost

    @property
    def value(self) -> Tensor:
        """Dual objective of the extended problem, ``(...)``; differentiable as in `sinkhorn`.

        The mass of the extended problem changes with those of a and b, and the value by -eps times
        as much, which the envelope's slopes (f, g) leave out: they are for a given mass.
        """
        if self.extended.grad != "envelope":
            return self.extended.value
        mass = self.extended.a.sum(-1)
        return self.extended.value - self.extended.eps.to(mass.dtype) * (mass - mass.detach())

    @property
    def n_iter(self) -> Tensor:
        """Iterations done, int64 ``(...)``."""
        return self.extended.n_iter

    @property
    def marginal_error(self) -> Tensor:
        """How far the rows, slack included, are from their weights, in L1, ``(...)``."""
        return self.extended.marginal_error

    @property
    def converged(self) -> Tensor:
        """``marginal_error <= tol``, bool ``(...)``."""
        return self.extended.converged


def partial(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    mass: float | Tensor,
    eps: float | Tensor,
    max_iter: int = 100,
    tol: float = 0.0,
    grad: Grad = "envelope",
    schedule: float | None = None,
    accelerate: Accelerate | None = None,
    backend: str | None = None,
) -> PartialResult:
    """Transports `mass` in all, at most a_i from a row and b_j to a column, at least cost.

    Each side gets a slack point for what stays, at cost 0 to every point and forbidden to the other
    slack point (Caffarelli & McCann 2010; Chapel, Alaya & Gasso, NeurIPS 2020, proposition 1), and
    the balanced problem is solved by `sinkhorn`. The regulariser is that of the extended problem:
    it counts what stays, too.

    Args:
        C: Costs, ``(..., N, M)``.
        a: Row weights, ``(..., N)``, whose batch broadcasts; uniform ``1 / N`` by default.
        b: Column weights, ``(..., M)``, likewise.
        mass: What to transport, > 0 and at most the smaller of sum(a) and sum(b); a number or a
            tensor that broadcasts to the batch. Not differentiable.
        eps: Regularisation strength, as in `sinkhorn`.
        max_iter: As in `sinkhorn`.
        tol: As in `sinkhorn`; to be small beside `mass`, of which as much may be missing.
        grad: As in `sinkhorn`; gradients flow to C, a and b.
        schedule: As in `sinkhorn`.
        accelerate: As in `sinkhorn`. The potential of what stays moves by about eps an iteration,
            so that a small `mass` needs acceleration, and a small eps a schedule besides.
        backend: As in `sinkhorn`.

    Raises:
        ValueError: As `sinkhorn`; or mass <= 0 or more than one side has (values are looked at on
            the CPU, elsewhere with ``OTDD_CHECKS=1``).
        TypeError: As `sinkhorn`.
    """
    C, _, a, b, eps = problem_tensors(checks.as_float(C, "C"), eps, None, a, b)
    equal = equal_weights(C)
    a, b = equal[0] if a is None else a, equal[1] if b is None else b
    if checks.values_are_checked(C):
        checks.finite(C, "C")
        checks.weights(a, "a")
        checks.weights(b, "b")
    mass = _mass(mass, a, b)
    left_a, left_b = (w.sum(-1, keepdim=True) - mass.unsqueeze(-1) for w in (a, b))
    *batch, N, M = C.shape
    far = 2 * C.detach().abs().amax((-1, -2), keepdim=True) + _FORBIDDEN * eps[..., None, None]
    extended = torch.cat(
        [
            torch.cat([C, C.new_zeros(*batch, N, 1)], -1),
            torch.cat([C.new_zeros(*batch, 1, M), far.to(C.dtype)], -1),
        ],
        -2,
    )
    return PartialResult(
        sinkhorn(
            extended,
            torch.cat([a, left_b.clamp(min=0)], -1),
            torch.cat([b, left_a.clamp(min=0)], -1),
            eps=eps,
            max_iter=max_iter,
            tol=tol,
            grad=grad,
            schedule=schedule,
            accelerate=accelerate,
            backend=backend,
        )
    )


def _mass(mass: float | Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The mass of each problem, ``(...)``, checked against what both sides have."""
    if isinstance(mass, Tensor):
        real = not mass.is_complex() and mass.dtype != torch.bool
        checks.require(real, "mass", f"dtype {mass.dtype}", "real numbers")
        checks.require(not mass.requires_grad, "mass", "a tensor that requires grad", "a constant")
        try:
            mass = mass.to(a).expand(a.shape[:-1])
        except RuntimeError:
            batch = tuple(a.shape[:-1])
            accepted = f"a number or a tensor that broadcasts to the batch {batch}"
            checks.require(False, "mass", f"shape {tuple(mass.shape)}", accepted)
    else:
        checks.positive(mass, "mass", a.dtype)
        mass = a.new_full((), mass).expand(a.shape[:-1])
    if checks.values_are_checked(a) and mass.numel() > 0:
        most = torch.minimum(a.sum(-1), b.sum(-1)).detach()
        slack = 10 * torch.finfo(a.dtype).eps * most  # sums of weights are only so exact
        bad = ~((mass > 0) & (mass <= most + slack))
        if bool(bad.any()):
            limit = f"numbers > 0 and at most the mass of each side, here {most[bad][0].item():.6g}"
            checks.require(False, "mass", mass[bad][0].item(), limit)
    return mass
