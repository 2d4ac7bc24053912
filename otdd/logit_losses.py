"""Losses on the logits of a student and its teachers; `otdd.losses` has them too."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from otdd.backends import NAMES
from otdd.ops import cost_matrix, sinkhorn
from otdd.ops.checks import (
    as_float,
    finite,
    floating,
    number,
    require,
    same_kind,
    solver_options,
    values_are_checked,
)
from otdd.ops.logits import check_softmaxes, logit_transport
from otdd.ops.sinkhorn import GRADS, MARGINALS, Grad, Marginals

SOFT = ("mse", "kl")
# Weight of the transport term when none is given: the same for a batch of 100.
BETA_2 = {"mean": 0.08, "sum": 8e-4}


class OTLogitLoss(nn.Module):
    """Optimal transport between a batch of student and a batch of teacher predictions.

    ``C_ij = |softmax(s_i / tau) - softmax(t_j / tau)|_1`` in [0, 2] and the loss is ``<P, C>`` with
    the Sinkhorn plan over the batch (Cui et al., NeurIPS 2025, "OT logit matching"; cost and
    normalisation after SinKD, Cui et al., COLING 2024). The teacher is detached. A logit of -inf
    masks its class.

    Args:
        tau: Temperature > 0 of both softmaxes.
        eps: Regularisation strength > 0.
        max_iter: Sinkhorn iterations.
        reduction: ``mean`` (the plan has mass 1) or ``sum`` (mass B, SinKD's scale).
        marginals: ``measure`` or ``sinkd``, as in `otdd.ops.sinkhorn`.
        grad: ``envelope`` holds the plan fixed; ``unrolled`` differentiates the iterations too.
        backend: As in `otdd.ops.sinkhorn`. With `cuda` and ``envelope`` softmaxes, costs and solve
            are one native call, and so is the gradient.

    Shape: logits ``(..., B, K)`` both -> a scalar, the mean over leading dimensions.
    """

    def __init__(
        self,
        tau: float = 2.0,
        eps: float = 0.1,
        max_iter: int = 20,
        reduction: str = "mean",
        *,
        marginals: Marginals = "measure",
        grad: Grad = "envelope",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.tau, self.eps, self.max_iter, self.reduction = tau, eps, max_iter, reduction
        self.marginals, self.grad, self.backend = marginals, grad, backend
        self._check_options()

    def _check_options(self) -> None:
        """Raises for the first that is not accepted; in every call, as users set attributes."""
        solver_options(
            self.max_iter,
            0.0,
            reduction=(self.reduction, ("mean", "sum")),
            marginals=(self.marginals, MARGINALS),
            grad=(self.grad, GRADS),
            backend=(self.backend, (None, *NAMES)),
        )
        number(self.tau, "tau")
        number(self.eps, "eps")

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        self._check_options()
        student = floating(student_logits, "student_logits")
        teacher = floating(teacher_logits, "teacher_logits").detach()
        same_kind(teacher, "teacher_logits", student, "student_logits")
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        require(
            student.shape == teacher.shape, "teacher_logits", shapes, "equal shapes (..., B, K)"
        )
        enough = student.dim() >= 2 and student.numel() > 0
        require(enough, "student_logits", f"shape {tuple(student.shape)}", "(..., B, K), not empty")
        rows, sinkd = student.shape[-2], self.marginals == "sinkd"
        if self.grad == "envelope":
            cost = logit_transport(
                student,
                teacher,
                tau=self.tau,
                eps=self.eps,
                max_iter=self.max_iter,
                sinkd=sinkd,
                backend=self.backend,
            )
        else:
            cost = self._composed(student, teacher)
        factor = (rows if self.reduction == "sum" else 1) / (rows if sinkd else 1)
        mean = cost.mean() if cost.dim() else cost
        return mean if factor == 1 else mean * factor

    def _composed(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Costs of transport by the ops one by one, of which each has its own derivative."""
        p, q = (
            torch.softmax(as_float(logits, "logits") / self.tau, -1)
            for logits in (student, teacher)
        )
        check_softmaxes(p, q)
        C = cost_matrix(p, q, "l1", backend=self.backend)
        return sinkhorn(
            C,
            eps=self.eps,
            max_iter=self.max_iter,
            grad=self.grad,
            marginals=self.marginals,
            backend=self.backend,
        ).cost

    def extra_repr(self) -> str:
        return f"tau={self.tau}, eps={self.eps}, max_iter={self.max_iter}, {self.reduction}"


class OTDistillationLoss(nn.Module):
    """``kappa_1 CE + kappa_2 MSE + beta_2 OT``: a student between hard and soft labels.

    Cross-entropy to the hard labels, the mean squared difference from the teacher's logits (or a
    KL divergence), and `OTLogitLoss` over the batch. Terms of weight 0 are not computed. The
    default weights are EDC's (Shao et al., NeurIPS 2024) for the first two, and for the third an
    inference of ours: 0.08 where the plan has mass 1, 8e-4 where it has mass B.

    With `beta_2_share`, beta_2 is chosen anew for every batch so that, with respect to the
    student's logits, ``|beta_2 grad OT| = share * |grad(kappa_1 CE + kappa_2 MSE)|``. That takes a
    second backward through these terms, and no second forward of the student. beta_2 is a
    constant for the gradient, and 0 where OT has none.

    With `gather`, the transport is over the batches of all processes of the default process group,
    all of one size. Each process keeps the gradient of its own rows, times the number of
    processes, so that the mean over processes that DistributedDataParallel takes is the gradient
    of one process on the whole batch. A share is then that of the whole batch's norms. The sizes
    are compared in every call, for which a GPU is waited for.

    Args:
        kappa_1: Weight >= 0 of the cross-entropy.
        kappa_2: Weight >= 0 of the soft term.
        beta_2: Weight >= 0 of the transport; None: 0.08, or 8e-4 with ``reduction="sum"``.
        beta_2_share: Share > 0 of the gradient norm, in place of `beta_2`.
        soft: ``mse``, or ``kl``: ``T^2 KL(softmax(t/T) | softmax(s/T))``, mean over the batch.
        temperature: T > 0 of ``kl``; None: the tau of the transport.
        ot: The transport term with its options; None: `OTLogitLoss()`.
        gather: Transport over the batches of all processes.

    A logit of -inf masks its class, as in `OTLogitLoss`; but ``mse`` takes finite logits only.

    Shape: logits ``(B, K)`` both, labels ``(B,)`` int64 (None only if kappa_1 is 0) -> a scalar;
    with ``parts=True`` also a dict of the detached terms that were computed, unweighted, by name:
    ``ce``, ``mse`` or ``kl``, ``ot``, and the weight ``beta_2``.
    """

    def __init__(
        self,
        kappa_1: float = 0.025,
        kappa_2: float = 1.0,
        beta_2: float | None = None,
        *,
        beta_2_share: float | None = None,
        soft: str = "mse",
        temperature: float | None = None,
        ot: OTLogitLoss | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.ot = OTLogitLoss() if ot is None else ot
        if not isinstance(self.ot, OTLogitLoss):
            raise TypeError(f"ot: got {type(ot).__name__}; accepted: an OTLogitLoss or None")
        if beta_2_share is None and beta_2 is None:
            beta_2 = BETA_2[self.ot.reduction]
        self.kappa_1, self.kappa_2, self.beta_2 = kappa_1, kappa_2, beta_2
        self.beta_2_share, self.soft, self.gather = beta_2_share, soft, gather
        self.temperature = temperature
        self._check_options()

    def _check_options(self) -> None:
        """Raises for the first that is not accepted; in every call, as users set attributes."""
        require(self.soft in SOFT, "soft", repr(self.soft), ", ".join(SOFT))
        if self.temperature is not None:
            require(self.soft == "kl", "temperature", self.temperature, "None with soft='mse'")
            number(self.temperature, "temperature")
        if self.beta_2_share is not None:
            number(self.beta_2_share, "beta_2_share")
            require(self.beta_2 is None, "beta_2", self.beta_2, "None beside beta_2_share")
        weights = {"kappa_1": self.kappa_1, "kappa_2": self.kappa_2, "beta_2": self.beta_2}
        for name, weight in weights.items():
            if name != "beta_2" or self.beta_2_share is None:
                _weight(weight, name)
        if not (self.kappa_1 > 0 or self.kappa_2 > 0 or self.beta_2):
            given = f"{self.kappa_1}, {self.kappa_2}, {self.beta_2}"
            require(False, "kappa_1, kappa_2, beta_2", given, "one of them > 0")

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        parts: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        self._check_options()
        student = as_float(student_logits, "student_logits")
        teacher = as_float(teacher_logits, "teacher_logits").detach()
        self._check(student, teacher, labels)
        if self.beta_2_share is None or (student.requires_grad and torch.is_grad_enabled()):
            loss, terms = self._terms(student, teacher, labels)
        else:  # a validation loss: its beta_2 takes gradients all the same
            with torch.inference_mode(False), torch.enable_grad():
                own = student.detach().clone().requires_grad_()
                copies = (teacher.clone(), None if labels is None else labels.clone())
                loss, terms = self._terms(own, *copies)
            loss = loss.detach()
        return (loss, {k: v.detach() for k, v in terms.items()}) if parts else loss

    def _terms(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms: dict[str, Tensor] = {}
        weighted = []
        if self.kappa_1:
            assert labels is not None  # else `_check` has refused
            terms["ce"] = F.cross_entropy(student, labels)
            weighted.append(self.kappa_1 * terms["ce"])
        if self.kappa_2:
            terms[self.soft] = self._soft(student, teacher)
            weighted.append(self.kappa_2 * terms[self.soft])
        if self.beta_2 is None or self.beta_2 > 0:
            batch = _gathered(student, teacher) if self.gather else (student, teacher)
            ot = terms["ot"] = self.ot(*batch)
            beta = self.beta_2
            terms["beta_2"] = (
                self._share(sum(weighted[1:], weighted[0]), ot, student)
                if beta is None
                else torch.full((), beta, dtype=ot.dtype, device=ot.device)
            )
            weighted.append((terms["beta_2"] if beta is None else beta) * ot)
        return sum(weighted[1:], weighted[0]), terms

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.soft == "mse":
            return F.mse_loss(student, teacher)
        T = self.ot.tau if self.temperature is None else self.temperature
        target = F.log_softmax(teacher / T, dim=1)
        mine = F.log_softmax(student / T, dim=1)
        gone = target == -math.inf  # classes that the teacher masks: 0 log 0 is 0
        mine, target = (t.masked_fill(gone, 0) for t in (mine, target))
        divergence = F.kl_div(mine, target, reduction="batchmean", log_target=True)
        return T**2 * divergence

    def _share(self, others: Tensor, ot: Tensor, student: Tensor) -> Tensor:
        """The weight that gives the transport its share of the gradient norm."""
        grads = [torch.autograd.grad(t, student, retain_graph=True)[0] for t in (others, ot)]
        squares = torch.stack([grad.square().sum() for grad in grads])
        if self.gather:
            distributed.all_reduce(squares)
        wanted, seen = squares.sqrt()
        return torch.where(seen > 0, self.beta_2_share * wanted / seen, 0)

    def _check(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        same_kind(teacher, "teacher_logits", student, "student_logits")
        shape = tuple(student.shape)
        full = student.dim() == 2 and student.numel() > 0
        require(full, "student_logits", f"shape {shape}", "(B, K), not empty")
        seen = tuple(teacher.shape)
        require(seen == shape, "teacher_logits", f"shape {seen}", f"that of the student's, {shape}")
        if self.kappa_2 and self.soft == "mse" and values_are_checked(student):
            finite(student, "student_logits")
            finite(teacher, "teacher_logits")
        if labels is None:
            require(not self.kappa_1, "labels", "None", "(B,) int64 unless kappa_1 is 0")
            return
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            kind = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"labels: got {kind}; accepted: a tensor of int64")
        seen = tuple(labels.shape)
        require(seen == shape[:1], "labels", f"shape {seen}", f"(B,), here {shape[:1]}")
        if values_are_checked(labels):
            low, high = (int(bound) for bound in torch.aminmax(labels))
            wrong = low if low < 0 else high
            require(0 <= wrong < shape[1], "labels", wrong, f"classes from 0 to {shape[1] - 1}")

    def extra_repr(self) -> str:
        share = self.beta_2_share
        beta = f"beta_2={self.beta_2}" if share is None else f"beta_2_share={share}"
        return f"kappa_1={self.kappa_1}, kappa_2={self.kappa_2}, {beta}, soft={self.soft!r}"


def _weight(value: float | None, name: str) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; accepted: a number")
    require(0 <= value < math.inf, name, value, "a finite number >= 0")


def _gathered(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all processes in the order of their ranks; only this one's rows have a gradient."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("gather: got True without a process group; init_process_group first")
    world, rank = distributed.get_world_size(), distributed.get_rank()
    shape = torch.tensor(student.shape, device=student.device)
    shapes = [torch.empty_like(shape) for _ in range(world)]
    distributed.all_gather(shapes, shape)
    seen = [tuple(s.tolist()) for s in shapes]
    accepted = "one shape in all processes, as gather needs it"
    require(len(set(seen)) == 1, "student_logits", f"shapes {seen}", accepted)
    both = torch.stack([student.detach(), teacher])
    pairs = [torch.empty_like(both) for _ in range(world)]
    distributed.all_gather(pairs, both)
    rows = [pair[0] for pair in pairs]
    rows[rank] = student.view_as(student)
    if rows[rank].requires_grad:
        rows[rank].register_hook(lambda grad: world * grad)
    return torch.cat(rows), torch.cat([pair[1] for pair in pairs])
