"""Losses built on the ops, as `nn.Module`s."""

import math
from typing import Any

from torch import Tensor, nn

from otdd.backends import NAMES
from otdd.dataset_distance import DatasetDistance
from otdd.logit_losses import OTDistillationLoss, OTLogitLoss
from otdd.ops import METRICS, cost_matrix, sinkhorn, sinkhorn_divergence, sinkhorn_points
from otdd.ops.checks import number, solver_options
from otdd.ops.divergence import weighted_clouds
from otdd.ops.points import clouds_of, placed
from otdd.ops.sinkhorn import GRADS, Grad

__all__ = ["DatasetDistance", "OTDistillationLoss", "OTLogitLoss", "SinkhornLoss"]


class SinkhornLoss(nn.Module):
    """Entropic OT between point clouds, or the Sinkhorn divergence.

    With `debias`, `otdd.ops.sinkhorn_divergence`, which is never negative and, once it has
    converged, zero at x = y; without, the dual value ``OT(x, y)`` of `otdd.ops.sinkhorn` with the
    KL regulariser. Costs are kept up to 2^22 in all, else made tile by tile.

    Args:
        metric: Ground cost, as in `otdd.ops.cost_matrix`; ``sqeuclidean`` is ``|x - y|^2``, without
            GeomLoss's 1/2.
        eps: Regularisation strength > 0 in the units of the cost.
        debias: Subtract the self-transport terms.
        max_iter: Iterations of the solve of x against y.
        tol: L1 marginal error at which a problem stops by itself; 0 never.
        rho_a: KL penalty > 0 on the marginal of x, as in `otdd.ops.sinkhorn`; None: met.
        rho_b: KL penalty on the marginal of y.
        grad: ``envelope``, ``unrolled`` or ``implicit``, as in `otdd.ops.sinkhorn`.
        backend: As in `otdd.ops.sinkhorn`.

    Shape: x ``(..., N, D)``, y ``(..., M, D)``, weights a ``(..., N)`` and b ``(..., M)`` (uniform
    if None) -> ``(...)``. Without penalties the masses of a and b must be equal, to 1e-3.
    """

    def __init__(
        self,
        metric: str = "sqeuclidean",
        eps: float = 0.05,
        debias: bool = True,
        *,
        max_iter: int = 100,
        tol: float = 0.0,
        rho_a: float | None = None,
        rho_b: float | None = None,
        grad: Grad = "envelope",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        backends = (None, *NAMES)
        solver_options(
            max_iter, tol, metric=(metric, METRICS), grad=(grad, GRADS), backend=(backend, backends)
        )
        number(eps, "eps")
        for rho, name in ((rho_a, "rho_a"), (rho_b, "rho_b")):
            if rho is not None:
                number(rho, name, or_inf=True)
        self.metric, self.eps, self.debias = metric, eps, debias
        self.max_iter, self.tol, self.rho_a, self.rho_b = max_iter, tol, rho_a, rho_b
        self.grad, self.backend = grad, backend

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        options: dict[str, Any] = {"eps": self.eps, "max_iter": self.max_iter, "tol": self.tol}
        options |= {"rho_a": self.rho_a, "rho_b": self.rho_b, "grad": self.grad}
        options["backend"] = self.backend
        if self.debias:
            return sinkhorn_divergence(x, y, a, b, metric=self.metric, **options).value
        x, y = clouds_of(x, y)
        soft = any(rho is not None and rho < math.inf for rho in (self.rho_a, self.rho_b))
        _, a, b, _ = weighted_clouds(x, y, a, b, self.eps, soft)
        options["backend"], kept = placed("SinkhornLoss", x, y, self.backend)
        if not kept:
            return sinkhorn_points(x, y, a, b, metric=self.metric, **options).value
        C = cost_matrix(x, y, self.metric, backend=options["backend"])
        return sinkhorn(C, a, b, **options).value

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, eps={self.eps}, debias={self.debias}"
