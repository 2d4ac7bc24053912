"""`sinkhorn`: many entropic optimal-transport problems, solved at once, safely and differentiably."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.sinkhorn.op import plan_op, sinkhorn_op
from otdd.ops.sinkhorn.reference import plan_from_potentials

Grad: TypeAlias = Literal["envelope", "unrolled", "implicit"]
Marginals: TypeAlias = Literal["measure", "sinkd"]


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """Solution of a batch of entropic OT problems.

    ``value`` and ``cost`` are differentiable in C, a and b under every gradient mode; ``f``, ``g``
    and ``plan`` under ``unrolled`` and ``implicit`` (constants under ``envelope``).

    Attributes:
        value: Dual objective ``<a, f> + <b, g>``, ``(...)``.
        cost: Transport cost ``<P, C>``, ``(...)``.
        f: Row potentials, ``(..., N)``, in the units of C; finite at masked rows too.
        g: Column potentials, ``(..., M)``.
        n_iter: Iterations done, int64 ``(...)``.
        marginal_error: ``sum_i |sum_j P_ij - a_i|``, ``(...)``; columns are met exactly.
        converged: ``marginal_error <= tol``, bool ``(...)``; False for a problem that holds a NaN.
    """

    value: Tensor
    cost: Tensor
    f: Tensor
    g: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    converged: Tensor
    C: Tensor
    a: Tensor
    b: Tensor
    eps: Tensor
    grad: str
    backend: str

    @property
    def plan(self) -> Tensor:
        """Transport plan ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``, made at each access.

        ``(..., N, M)``; rows and columns of weight zero are exactly zero.
        """
        shape = self.C.shape
        flat = (
            self.C.reshape(-1, *shape[-2:]),
            self.f.reshape(-1, shape[-2]),
            self.g.reshape(-1, shape[-1]),
            self.a.reshape(-1, shape[-2]),
            self.b.reshape(-1, shape[-1]),
        )
        if self.grad == "envelope":
            flat = tuple(t.detach() for t in flat)
            P = plan_op(*flat, self.eps, flat[0].new_ones(()).expand(flat[0].shape[0]), self.backend)
        else:
            P = plan_from_potentials(*flat, self.eps)
        return P.reshape(shape)


def sinkhorn(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    max_iter: int = 100,
    tol: float = 0.0,
    init: tuple[Tensor, Tensor] | SinkhornResult | None = None,
    grad: Grad = "envelope",
    marginals: Marginals = "measure",
    backend: str | None = None,
) -> SinkhornResult:
    """Solves ``min_P <P, C> + eps KL(P | a x b)`` for every problem of a batch.

    Sinkhorn's iteration in the log domain (Cuturi 2013; Peyre & Cuturi 2019, eq. 4.44), rows first::

        f_i = -eps LSE_j(log b_j + (g_j - C_ij) / eps)
        g_j = -eps LSE_i(log a_i + (f_i - C_ij) / eps)

    Gradients:

    - ``envelope``: ``dvalue/dC = P``, ``dvalue/da = f``, ``dvalue/db = g`` (up to a constant);
      ``dcost/dC = P``, the plan held fixed. Exact for `value` at convergence; no history.
    - ``unrolled``: the exact derivative of the iterations done, for value, cost, plan, f and g,
      from a history of ``(max_iter + 1)(N + M)`` float64 numbers a problem.
    - ``implicit``: the derivative of the fixed point, for the same; exact at convergence.

    Args:
        C: Costs, ``(..., N, M)``. float16 and bfloat16 are computed, and results given, in float32.
        a: Row weights, ``(..., N)`` or broadcastable to it; uniform ``1 / N`` by default. Zero
            masks a row: its plan is exactly 0, its gradient 0. Masses are not normalised: if those
            of a and b differ, no plan meets both and `marginal_error` says by how much.
        b: Column weights, ``(..., M)``, likewise.
        eps: Regularisation strength > 0 in the units of C; a number, or a tensor that broadcasts to
            the batch ``(...)``. Not differentiable.
        max_iter: Iterations at most, >= 1.
        tol: If > 0, each problem stops by itself once its `marginal_error` (L1) is at most this.
        init: Potentials to start from, ``(f, g)`` or an earlier result (warm start); f is made from
            g, so only g is used. A constant for the gradient.
        grad: ``envelope``, ``unrolled`` or ``implicit``.
        marginals: ``measure``, or ``sinkd``: rows, then columns scaled to sum 1 as in SinKD (COLING
            2024), that is weights of 1; a and b may then only be masks of 0 and 1.
        backend: ``reference``, ``cpu``, or None for the first that can.

    Raises:
        ValueError: A bad option, shapes that don't fit, different devices, no rows or columns,
            eps <= 0, and on the CPU (elsewhere with ``OTDD_CHECKS=1``) NaN or inf, negative weights
            or a problem with only zero weights.
        TypeError: Not floating point, or different dtypes.
        otdd.backends.BackendError: The backend asked for cannot run here.
    """
    C = checks.as_float(C, "C")
    checks.require(C.dim() >= 2, "C", f"shape {tuple(C.shape)}", "(..., N, M)")
    checks.require(0 not in C.shape[-2:], "C", f"shape {tuple(C.shape)}", "N >= 1 and M >= 1")
    checks.require(grad in ("envelope", "unrolled", "implicit"), "grad", repr(grad), "envelope, unrolled, implicit")
    checks.require(marginals in ("measure", "sinkd"), "marginals", repr(marginals), "measure, sinkd")
    checks.require(
        isinstance(max_iter, int) and max_iter >= 1, "max_iter", max_iter, "a whole number >= 1"
    )
    checks.require(0 <= tol < float("inf"), "tol", tol, "a finite number >= 0")
    *batch, N, M = C.shape
    count = C.shape[:-2].numel()
    sinkd = marginals == "sinkd"
    a_full = _weights(a, "a", C, (*batch, N), 1.0 if sinkd else 1.0 / N)
    b_full = _weights(b, "b", C, (*batch, M), 1.0 if sinkd else 1.0 / M)
    eps_flat = _eps(eps, C, batch)
    g = _start(init, C, (*batch, M))
    C3 = C.reshape(count, N, M)
    chosen = backends.choose("sinkhorn", {"cpu": pointers.refusal(C3), "reference": None}, backend)
    f, g, value, cost, marginal_error, n_iter, _ = sinkhorn_op(
        C3,
        a_full.reshape(count, N),
        b_full.reshape(count, M),
        eps_flat,
        g.reshape(count, M),
        max_iter,
        float(tol),
        grad,
        sinkd,
        chosen,
    )
    if grad == "envelope":
        f, g = f.detach(), g.detach()
    return SinkhornResult(
        value=value.reshape(batch),
        cost=cost.reshape(batch),
        f=f.reshape(*batch, N),
        g=g.reshape(*batch, M),
        n_iter=n_iter.reshape(batch),
        marginal_error=marginal_error.reshape(batch),
        converged=(marginal_error <= tol).reshape(batch),
        C=C,
        a=a_full,
        b=b_full,
        eps=eps_flat,
        grad=grad,
        backend=chosen,
    )


def _weights(
    w: Tensor | None, name: str, C: Tensor, shape: tuple[int, ...], default: float
) -> Tensor:
    if w is None:
        return C.new_full((), default).expand(shape)
    w = checks.as_float(w, name)
    checks.same_kind(w, name, C, "C")
    return _broadcast(w, name, shape)


def _broadcast(t: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    last_fits = t.dim() >= 1 and t.shape[-1] == shape[-1]
    try:
        fits = last_fits and torch.broadcast_shapes(t.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    checks.require(fits, name, f"shape {tuple(t.shape)}", f"{shape} or broadcastable to it")
    return t.expand(shape)


def _eps(eps: float | Tensor, C: Tensor, batch: list[int]) -> Tensor:
    if not isinstance(eps, Tensor):
        checks.positive_eps(eps)
        return C.new_full((), eps, dtype=torch.float64).expand(C.shape[:-2].numel())
    checks.require(not eps.requires_grad, "eps", "a tensor that requires grad", "a constant")
    checks.require(eps.device == C.device, "eps", f"device {eps.device}", f"that of C, {C.device}")
    try:
        eps = eps.double().expand(batch)
    except RuntimeError:
        raise ValueError(
            f"eps: got shape {tuple(eps.shape)}; accepted: a number or a tensor that broadcasts to "
            f"the batch {tuple(batch)}"
        ) from None
    return eps.reshape(-1)


def _start(
    init: tuple[Tensor, Tensor] | SinkhornResult | None, C: Tensor, shape: tuple[int, ...]
) -> Tensor:
    if init is None:
        return C.new_zeros(()).expand(shape)
    g = init.g if isinstance(init, SinkhornResult) else init[1]
    g = checks.as_float(g, "init").detach()
    checks.same_kind(g, "init", C, "C")
    return _broadcast(g, "init", shape)
