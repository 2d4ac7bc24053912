"""`sinkhorn`: many entropic optimal-transport problems at once, safe and differentiable."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.sinkhorn.op import plan_op, sinkhorn_op
from otdd.ops.sinkhorn.reference import plan_from_potentials

Grad: TypeAlias = Literal["envelope", "unrolled", "implicit"]
Marginals: TypeAlias = Literal["measure", "sinkd"]
GRADS, MARGINALS = get_args(Grad), get_args(Marginals)


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
            P = plan_op(
                *flat, self.eps, flat[0].new_ones(()).expand(flat[0].shape[0]), self.backend
            )
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

    Sinkhorn's iteration in the log domain (Peyre & Cuturi 2019, eqs. 4.43-44), rows first::

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
            g, so only g is used. A constant for the gradient. A start that is far off, such as by
            1e4 eps, stays in f and g as a constant and costs float32 potentials digits.
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
    checks.solver_options(max_iter, tol, grad=(grad, GRADS), marginals=(marginals, MARGINALS))
    mass = 1.0 if marginals == "sinkd" else None
    (C, _, g, a, b), eps_flat = problem_tensors(C, eps, init, a, b, mass, "init")
    *batch, N, M = C.shape
    count = C.shape[:-2].numel()
    refusals = {"cpu": pointers.refusal(C), "reference": None}
    chosen = backends.choose("sinkhorn", refusals, backend)
    f, g, value, cost, marginal_error, n_iter, _ = sinkhorn_op(
        C.reshape(count, N, M),
        a.reshape(count, N),
        b.reshape(count, M),
        eps_flat,
        g.reshape(count, M),
        int(max_iter),
        float(tol),
        grad,
        marginals == "sinkd",
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
        a=a,
        b=b,
        eps=eps_flat,
        grad=grad,
        backend=chosen,
    )


def problem_tensors(
    C: Tensor,
    eps: float | Tensor,
    potentials: tuple[Tensor, Tensor] | SinkhornResult | None,
    a: Tensor | None,
    b: Tensor | None,
    mass: float | None = None,
    potentials_name: str = "potentials",
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Checks a problem's tensors and brings them to one batch shape and float32 or float64.

    Args:
        C: Costs, ``(..., N, M)``.
        eps: A number or a tensor over the batch.
        potentials: ``(f, g)``, a result, or None for zeros.
        a: Row weights, or None for equal ones.
        b: Column weights, or None for equal ones.
        mass: Default weight of a point; None for 1 over their number.
        potentials_name: What to call `potentials` in an error.

    Returns:
        ``(C, f, g, a, b)``, and eps flat over the batch in float64.
    """
    C = checks.as_float(C, "C")
    checks.require(C.dim() >= 2, "C", f"shape {tuple(C.shape)}", "(..., N, M)")
    checks.require(0 not in C.shape[-2:], "C", f"shape {tuple(C.shape)}", "N >= 1 and M >= 1")
    *batch, N, M = C.shape
    f, g = _potentials(potentials, potentials_name, C)
    return (
        C,
        f,
        g,
        _per_point(a, "a", C, (*batch, N), mass or 1.0 / N),
        _per_point(b, "b", C, (*batch, M), mass or 1.0 / M),
    ), _eps(eps, C, batch)


def _potentials(
    potentials: tuple[Tensor, Tensor] | SinkhornResult | None, name: str, C: Tensor
) -> tuple[Tensor, Tensor]:
    if isinstance(potentials, SinkhornResult):
        potentials = potentials.f, potentials.g
    elif potentials is None:
        potentials = None, None
    pair = isinstance(potentials, tuple | list) and len(potentials) == 2
    checks.require(pair, name, type(potentials).__name__, "(f, g) or a SinkhornResult")
    *batch, N, M = C.shape
    f, g = potentials
    return (
        _per_point(f, f"{name}, its f", C, (*batch, N), 0.0),
        _per_point(g, f"{name}, its g", C, (*batch, M), 0.0),
    )


def _per_point(
    t: Tensor | None, name: str, C: Tensor, shape: tuple[int, ...], default: float
) -> Tensor:
    """`t`, checked and expanded to `shape`, or `default` everywhere."""
    if t is None:
        return C.new_full((), default).expand(shape)
    t = checks.as_float(t, name)
    checks.same_kind(t, name, C, "C")
    fits = t.dim() >= 1 and t.shape[-1] == shape[-1]
    try:
        fits = fits and torch.broadcast_shapes(t.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    checks.require(fits, name, f"shape {tuple(t.shape)}", f"{shape} or broadcastable to it")
    return t.expand(shape)


def _eps(eps: float | Tensor, C: Tensor, batch: list[int]) -> Tensor:
    if not isinstance(eps, Tensor):
        checks.positive_eps(eps, C.dtype)
        return C.new_full((), eps, dtype=torch.float64).expand(C.shape[:-2].numel())
    real = not eps.is_complex() and eps.dtype != torch.bool
    checks.require(real, "eps", f"dtype {eps.dtype}", "real numbers")
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
