"""`sinkhorn`: many entropic optimal-transport problems at once, safe and differentiable."""

import numbers
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.sinkhorn.cuda import refusal as cuda_refusal
from otdd.ops.sinkhorn.gradients import solve
from otdd.ops.sinkhorn.op import equal_weights, plan_op, triton_refusal
from otdd.ops.sinkhorn.reference import plan_from_potentials

Grad: TypeAlias = Literal["envelope", "unrolled", "implicit"]
Marginals: TypeAlias = Literal["measure", "sinkd"]
Accelerate: TypeAlias = Literal["anderson"]
GRADS, MARGINALS, ACCELERATIONS = get_args(Grad), get_args(Marginals), get_args(Accelerate)


@dataclass(frozen=True, eq=False, slots=True)
class SinkhornResult:
    """Solution of a batch of entropic OT problems.

    ``value`` and ``cost`` are differentiable in C, a and b under every gradient mode; ``f``, ``g``
    and ``plan`` under ``unrolled`` and ``implicit`` (constants under ``envelope``).

    Attributes:
        value: Dual objective, ``(...)``: ``<a, f> + <b, g>`` between hard marginals.
        cost: Transport cost ``<P, C>``, ``(...)``.
        f: Row potentials, ``(..., N)``, in the units of C; finite at masked rows too.
        g: Column potentials, ``(..., M)``.
        n_iter: Iterations done, those of a schedule and those taken back too, int64 ``(...)``.
        marginal_error: ``sum_i |sum_j P_ij - a_i exp(-f_i / rho_a)|``, ``(...)``, how far the rows
            are from their optimality condition; columns are met exactly.
        C: Costs, ``(..., N, M)``; in half precision only by `cuda`, whose kernels read it so.
        eps: Regularisation strength, float64 ``(...)``.
        tol: Marginal error that was asked for.
        grad: Gradient mode.
        backend: Backend that solved it.
    """

    value: Tensor
    cost: Tensor
    f: Tensor
    g: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    C: Tensor
    eps: Tensor
    tol: float
    grad: str
    backend: str
    _a: Tensor | None
    _b: Tensor | None
    _sinkd: bool

    def __repr__(self) -> str:
        return checks.described(self)

    @property
    def converged(self) -> Tensor:
        """``marginal_error <= tol``, bool ``(...)``; False for a problem that holds a NaN."""
        return self.marginal_error <= self.tol

    @property
    def a(self) -> Tensor:
        """Row weights, ``(..., N)``."""
        return equal_weights(self.C, self._sinkd)[0] if self._a is None else self._a

    @property
    def b(self) -> Tensor:
        """Column weights, ``(..., M)``."""
        return equal_weights(self.C, self._sinkd)[1] if self._b is None else self._b

    @property
    def plan(self) -> Tensor:
        """Transport plan ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``, made at each access.

        ``(..., N, M)``; rows and columns of weight zero are exactly zero. It is that of C,
        the weights and `eps` as they are then: tensors that were given are not copied.
        """
        tensors = self.C, self.f, self.g, self.a, self.b
        if self.grad == "envelope":
            return plan_op(
                *(t.detach() for t in tensors), self.eps, None, False, False, self.backend
            )
        return plan_from_potentials(*tensors, self.eps)


def sinkhorn(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    max_iter: int = 100,
    tol: float = 0.0,
    init: tuple[Tensor | None, Tensor] | SinkhornResult | None = None,
    grad: Grad = "envelope",
    marginals: Marginals = "measure",
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    schedule: float | None = None,
    accelerate: Accelerate | None = None,
    backend: str | None = None,
) -> SinkhornResult:
    """Solves ``min_P <P, C> + eps KL(P | a x b)`` for every problem of a batch.

    The marginals of P are a and b, or with `rho_a`, `rho_b` pay ``rho_a KL(P 1 | a)``,
    ``rho_b KL(P' 1 | b)`` for being others. Sinkhorn's iteration in the log domain (Peyre & Cuturi
    2019, eqs. 4.43-44; Chizat et al. 2018, section 4), rows first::

        f_i = -eps rho_a / (rho_a + eps) LSE_j(log b_j + (g_j - C_ij) / eps)
        g_j = -eps rho_b / (rho_b + eps) LSE_i(log a_i + (f_i - C_ij) / eps)

    Then ``value = rho_a <a, 1 - exp(-f / rho_a)> + rho_b <b, 1 - exp(-g / rho_b)>
    - eps (sum(P) - sum(a) sum(b))``; without penalties ``<a, f> + <b, g>``.

    Gradients:

    - ``envelope``: ``dvalue/dC = P``, ``dvalue/da = f``, ``dvalue/db = g`` (up to a constant);
      ``dcost/dC = P``, the plan held fixed. Exact for `value` at convergence; no history. `value`
      has second derivatives, those of the fixed point.
    - ``unrolled``: the exact derivative of the iterations done, for value, cost, plan, f and g,
      from a history of ``(max_iter + 1)(N + M)`` float64 numbers a problem.
    - ``implicit``: the derivative of the fixed point, for the same; exact at convergence.

    Args:
        C: Costs, ``(..., N, M)``. float16 and bfloat16 are computed, and results given, in float32.
            On ``triton`` C / eps is to be finite, of masked points too.
        a: Row weights, ``(..., N)``, whose batch broadcasts; uniform ``1 / N`` by default. Zero
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
        rho_a: Penalty > 0 on the row marginal, in the units of C, as `eps`; None or inf: met.
        rho_b: Penalty on the column marginal, likewise. One of the two is semi-unbalanced OT.
        schedule: None, or a ratio in (0, 1) by which eps falls from the range of C to `eps`
            (epsilon scaling). Each level above `eps` ends at a marginal error of 1 % of the mass,
            at the latest after 100 iterations, and only makes the start of the next: what `init`
            gave is soon forgotten. Pays, with `accelerate`, where eps is below 1 % of std(C).
        accelerate: None, or ``anderson``: every third iteration starts where Anderson acceleration,
            with a guard, puts it, so that fewer meet `tol`. The result is still that of an
            iteration: columns are met exactly. Neither this nor `schedule` goes with ``unrolled``.
        backend: ``reference``, ``cpu``, ``cuda``, ``triton``, or None for the first that can;
            ``cuda`` and ``triton`` have neither `schedule` nor `accelerate`.

    Raises:
        ValueError: A bad option, shapes that don't fit, different devices, no rows or columns,
            eps or rho <= 0, and on the CPU (elsewhere with ``OTDD_CHECKS=1``) NaN or inf, negative
            weights or a problem with only zero weights.
        TypeError: Not floating point, or different dtypes.
        otdd.backends.BackendError: The backend asked for cannot run here.
    """
    checks.solver_options(max_iter, tol, grad=(grad, GRADS), marginals=(marginals, MARGINALS))
    if schedule is not None or accelerate is not None:
        check_shortcuts(schedule, accelerate, grad)
    sinkd = marginals == "sinkd"
    C, (_, g), a, b, eps = problem_tensors(C, eps, init, a, b, "init")
    if rho_a is not None or rho_b is not None:
        checks.require(not sinkd, "rho_a and rho_b", "one beside marginals='sinkd'", "None")
        rho_a, rho_b = (
            None if rho is None else _per_problem(rho, name, C, or_inf=True)
            for rho, name in ((rho_a, "rho_a"), (rho_b, "rho_b"))
        )
    refusals = pointers.refusals(
        C, cuda_refusal(schedule, accelerate), triton_refusal(C, grad, schedule, accelerate)
    )
    chosen = backends.choose("sinkhorn", refusals, backend)
    C = pointers.as_read(C, chosen)
    f, g, value, cost, marginal_error, n_iter, _ = solve(
        C,
        a,
        b,
        eps,
        rho_a,
        rho_b,
        g,
        int(max_iter),
        float(tol),
        float(schedule or 0),
        accelerate or "",
        grad,
        sinkd,
        chosen,
    )
    return SinkhornResult(
        value, cost, f, g, n_iter, marginal_error, C, eps, float(tol), grad, chosen, a, b, sinkd
    )


def check_shortcuts(schedule: float | None, accelerate: str | None, grad: str) -> None:
    number = isinstance(schedule, numbers.Real) and not isinstance(schedule, bool)
    if schedule is not None and not (number and 0 < schedule < 1):
        checks.require(False, "schedule", repr(schedule), "None, or a ratio in (0, 1)")
    if accelerate not in (None, *ACCELERATIONS):
        checks.require(False, "accelerate", repr(accelerate), f"None, {', '.join(ACCELERATIONS)}")
    checks.require(
        grad != "unrolled",
        "grad",
        "'unrolled' beside schedule or accelerate, whose iterations have no history",
        "envelope, implicit, or their result as init of a solve with neither",
    )


def problem_tensors(
    C: Tensor,
    eps: float | Tensor,
    potentials: tuple[Tensor | None, Tensor] | SinkhornResult | None,
    a: Tensor | None,
    b: Tensor | None,
    potentials_name: str = "potentials",
    like: str = "C",
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], Tensor | None, Tensor | None, Tensor]:
    """Checks a problem's tensors and brings them to one batch shape and float32 or float64, but C.

    `like` names what the caller gave for C, where others are to be as that.

    Returns:
        C as given; the potentials, weights a and b where given; eps in float64.
    """
    C = checks.floating(C, "C")
    shape = tuple(C.shape)
    if len(shape) < 2 or 0 in shape[-2:]:
        checks.require(len(shape) >= 2, "C", f"shape {shape}", "(..., N, M)")
        checks.require(False, "C", f"shape {shape}", "N >= 1 and M >= 1")
    rows, columns = shape[:-1], (*shape[:-2], shape[-1])
    f = g = None
    if potentials is not None:
        f, g = _pair(potentials, potentials_name)
        f = _per_point(f, f"{potentials_name}, its f", C, rows, like)
        g = _per_point(g, f"{potentials_name}, its g", C, columns, like)
    a, b = _per_point(a, "a", C, rows, like), _per_point(b, "b", C, columns, like)
    return C, (f, g), a, b, _per_problem(eps, "eps", C)


def _pair(
    potentials: tuple[Tensor | None, Tensor] | SinkhornResult, name: str
) -> tuple[Tensor | None, Tensor]:
    if isinstance(potentials, SinkhornResult):
        return potentials.f, potentials.g
    pair = isinstance(potentials, tuple | list) and len(potentials) == 2
    checks.require(
        pair, name, type(potentials).__name__, "(f, g), or the result of an earlier solve"
    )
    checks.require(potentials[1] is not None, f"{name}, its g", None, "a tensor; f may be None")
    return potentials


def _per_point(
    t: Tensor | None, name: str, C: Tensor, shape: tuple[int, ...], like: str
) -> Tensor | None:
    """`t`, checked and expanded to `shape`, if it is given."""
    if t is None:
        return None
    t = checks.as_float(t, name)
    checks.same_kind(t, name, C, like)
    if t.shape == shape:
        return t
    fits = t.dim() >= 1 and t.shape[-1] == shape[-1]
    try:
        fits = fits and torch.broadcast_shapes(t.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        accepted = f"{shape}, or (..., {shape[-1]}) that broadcasts to it"
        checks.require(False, name, f"shape {tuple(t.shape)}", accepted)
    return t.expand(shape)


def _per_problem(value: float | Tensor, name: str, C: Tensor, *, or_inf: bool = False) -> Tensor:
    """A number > 0 for each problem, ``(...)`` in float64; not differentiable."""
    batch = C.shape[:-2]
    if not isinstance(value, Tensor):
        checks.positive(value, name, C.dtype, or_inf=or_inf)
        return torch.full(batch, float(value), dtype=torch.float64, device=C.device)
    real = not value.is_complex() and value.dtype != torch.bool
    checks.require(real, name, f"dtype {value.dtype}", "real numbers")
    checks.require(not value.requires_grad, name, "a tensor that requires grad", "a constant")
    same = value.device == C.device
    checks.require(same, name, f"device {value.device}", f"that of C, {C.device}")
    try:
        return checks.resolved(value.double()).expand(batch)
    except RuntimeError:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; accepted: a number or a tensor that "
            f"broadcasts to the batch {tuple(batch)}"
        ) from None
