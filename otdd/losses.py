"""Losses built on the ops, as `nn.Module`s."""

import torch
from torch import Tensor, nn

from otdd.backends import NAMES
from otdd.dataset_distance import DatasetDistance
from otdd.ops import METRICS, cost_matrix, sinkhorn, sinkhorn_divergence, sinkhorn_points
from otdd.ops.checks import (
    as_float,
    finite,
    number,
    positive,
    require,
    same_kind,
    solver_options,
    values_are_checked,
)
from otdd.ops.points import clouds_of, placed
from otdd.ops.sinkhorn import GRADS, MARGINALS

__all__ = ["DatasetDistance", "OTLogitLoss", "SinkhornLoss"]


class SinkhornLoss(nn.Module):
    """Entropic OT between point clouds, or the Sinkhorn divergence.

    With `debias`, `otdd.ops.sinkhorn_divergence`, which is zero at x = y and never negative;
    without, the dual value ``OT(x, y)`` of `otdd.ops.sinkhorn` with the KL regulariser. Costs are
    kept up to 2^22 in all, else made tile by tile.

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
    if None) -> ``(...)``.
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
        grad: str = "envelope",
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
        self.options = {"eps": eps, "max_iter": max_iter, "tol": tol, "rho_a": rho_a}
        self.options |= {"rho_b": rho_b, "grad": grad, "backend": backend}

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        if self.debias:
            return sinkhorn_divergence(x, y, a, b, metric=self.metric, **self.options).value
        x, y = clouds_of(x, y)
        backend, kept = placed("SinkhornLoss", x, y, self.options["backend"])
        options = self.options | {"backend": backend}
        if not kept:
            return sinkhorn_points(x, y, a, b, metric=self.metric, **options).value
        C = cost_matrix(x, y, self.metric, backend=backend)
        return sinkhorn(C, a, b, **options).value

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, eps={self.eps}, debias={self.debias}"


class OTLogitLoss(nn.Module):
    """Optimal transport between a batch of student and a batch of teacher predictions.

    ``C_ij = |softmax(s_i / tau) - softmax(t_j / tau)|_1`` in [0, 2] and the loss is ``<P, C>`` with
    the Sinkhorn plan over the batch (Cui et al., NeurIPS 2025, "OT logit matching"; cost and
    normalisation after SinKD, Cui et al., COLING 2024). The teacher is detached.

    Args:
        tau: Temperature > 0 of both softmaxes.
        eps: Regularisation strength > 0.
        max_iter: Sinkhorn iterations.
        reduction: ``mean`` (the plan has mass 1) or ``sum`` (mass B, SinKD's scale).
        marginals: ``measure`` or ``sinkd``, as in `otdd.ops.sinkhorn`.
        grad: ``envelope`` holds the plan fixed; ``unrolled`` differentiates the iterations too.
        backend: As in `otdd.ops.sinkhorn`.

    Shape: logits ``(..., B, K)`` both -> a scalar, the mean over leading dimensions.
    """

    def __init__(
        self,
        tau: float = 2.0,
        eps: float = 0.1,
        max_iter: int = 20,
        reduction: str = "mean",
        *,
        marginals: str = "measure",
        grad: str = "envelope",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        solver_options(
            max_iter,
            0.0,
            reduction=(reduction, ("mean", "sum")),
            marginals=(marginals, MARGINALS),
            grad=(grad, GRADS),
            backend=(backend, (None, *NAMES)),
        )
        number(tau, "tau")
        positive(eps, "eps", torch.float32)
        self.tau, self.eps, self.max_iter, self.reduction = tau, eps, max_iter, reduction
        self.marginals, self.grad, self.backend = marginals, grad, backend

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student = as_float(student_logits, "student_logits")
        teacher = as_float(teacher_logits, "teacher_logits").detach()
        same_kind(teacher, "teacher_logits", student, "student_logits")
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        require(
            student.shape == teacher.shape, "teacher_logits", shapes, "equal shapes (..., B, K)"
        )
        enough = student.dim() >= 2 and student.numel() > 0
        require(enough, "student_logits", f"shape {tuple(student.shape)}", "(..., B, K), not empty")
        p, q = (torch.softmax(logits / self.tau, -1) for logits in (student, teacher))
        if values_are_checked(p):  # of the softmax: a logit of -inf is fine
            finite(p, "student_logits, their softmax")
            finite(q, "teacher_logits, their softmax")
        C = cost_matrix(p, q, "l1", backend=self.backend)
        result = sinkhorn(
            C,
            eps=self.eps,
            max_iter=self.max_iter,
            grad=self.grad,
            marginals=self.marginals,
            backend=self.backend,
        )
        mass_of_plan = C.shape[-1] if self.marginals == "sinkd" else 1
        mass_wanted = C.shape[-1] if self.reduction == "sum" else 1
        return result.cost.mean() * (mass_wanted / mass_of_plan)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, eps={self.eps}, max_iter={self.max_iter}, {self.reduction}"
