"""The ops behind `otdd.ops.sinkhorn`: one schema, fake and derivative for every backend.

``C (..., N, M)``; over the same batch ``a (..., N)`` and ``b (..., M)`` or None for equal weights,
``g (..., M)`` or None for zeros; ``eps (...)`` and the penalties ``rho_a``, ``rho_b (...)`` or None
in float64.
"""

import torch
from torch import Tensor

from otdd.ops import checks, pointers
from otdd.ops.dispatch import custom_op
from otdd.ops.sinkhorn import cpu, cuda
from otdd.ops.sinkhorn.reference import (
    Solution,
    kept,
    over,
    plan_from_potentials,
    potentials_backward_reference,
    sinkhorn_reference,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]

MOST_ENTRIES = 1 << 20  # of a problem, for one program of Triton


def equal_weights(C: Tensor, sinkd: bool = False) -> tuple[Tensor, Tensor]:
    """Weights of mass 1 in all, or of 1 each with ``sinkd``: ``(..., N)`` and ``(..., M)``."""
    *batch, N, M = C.shape
    dtype = checks.wide(C.dtype)
    one_a, one_b = (C.new_full((), 1.0 if sinkd else 1 / n, dtype=dtype) for n in (N, M))
    return one_a.expand(*batch, N), one_b.expand(*batch, M)


def triton_refusal(
    C: Tensor, grad: str, schedule: float | None = None, accelerate: str | None = None
) -> str | None:
    """What the Triton kernels have against these problems; triton is not imported."""
    if schedule is not None or accelerate is not None:
        return "the Triton kernels have neither schedule nor accelerate"
    if grad == "unrolled" and C.shape[-2:].numel() > MOST_ENTRIES:
        entries = C.shape[-2:].numel()
        return f"{entries} costs; the unrolled derivative takes {MOST_ENTRIES}, of one program"
    return None


def filled(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    sinkd: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The problem with a tensor for everything."""
    if a is None or b is None:
        equal = equal_weights(C, sinkd)
        a, b = equal[0] if a is None else a, equal[1] if b is None else b
    if rho_a is None or rho_b is None:
        hard = eps.new_full((), torch.inf).expand(eps.shape)
        rho_a, rho_b = hard if rho_a is None else rho_a, hard if rho_b is None else rho_b
    return C, a, b, eps, rho_a, rho_b


def _solve(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    g: Tensor | None,
    max_iter: int,
    tol: float,
    schedule: float,
    accelerate: str,
    grad: str,
    sinkd: bool,
    backend: str,
) -> Outputs:
    """One whole batch of solves -> f, g, value, cost, marginal_error, n_iter, history.

    The history is kept for ``unrolled``; the registered op has one of no step for others.
    """
    keep_history = grad == "unrolled"
    if backend == "cpu":
        if sinkd:
            checks.weights(a, "a", binary=True)
            checks.weights(b, "b", binary=True)
        options = max_iter, tol, keep_history, schedule, accelerate, sinkd
        return cpu.sinkhorn_cpu(C, a, b, eps, rho_a, rho_b, g, *options)
    if checks.values_are_checked(C):
        checks.problem(C, a, b, eps, rho_a, rho_b, g, sinkd)
    if backend == "cuda":
        return cuda.sinkhorn_cuda(C, a, b, eps, rho_a, rho_b, g, max_iter, tol, keep_history, sinkd)
    if backend == "triton":
        run = pointers.triton_kernels("sinkhorn").sinkhorn_triton
        return run(C, a, b, eps, rho_a, rho_b, g, max_iter, tol, keep_history, sinkd)
    problem = filled(C, a, b, eps, rho_a, rho_b, sinkd)
    g = torch.zeros_like(problem[2]) if g is None else g
    options = max_iter, tol, keep_history, schedule, accelerate
    return sinkhorn_reference(*problem, g, *options)


def _fake_solve(C: Tensor, a: Tensor, b: Tensor, eps: Tensor, *options: object) -> Outputs:
    *_, max_iter, _, _, _, grad, _, _ = options
    room = Solution.empty(C, a, b, eps, max_iter, grad == "unrolled")
    no_step = eps.new_empty(*C.shape[:-2], 0, sum(C.shape[-2:]))
    return tuple(torch.empty_like(no_step if t is None else t) for t in room)


def _plan(
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    scale: Tensor | None,
    sinkd: bool,
    as_C: bool,
    backend: str,
) -> Tensor:
    """``scale * P`` with ``scale (...)``, for all rows of a problem or some of them.

    A gradient of C is of its type, which may be half of what is computed in: `as_C`.
    """
    if backend == "cpu":
        return cpu.plan_cpu(C, f, g, a, b, eps, scale, sinkd)
    if backend == "cuda":
        return cuda.plan_cuda(C, f, g, a, b, eps, scale, sinkd, as_C)
    if backend == "triton":
        run = pointers.triton_kernels("sinkhorn").plan_triton
        return run(C, f, g, a, b, eps, scale, sinkd)
    C, a, b, *_ = filled(C, a, b, eps, eps, eps, sinkd)
    P = plan_from_potentials(C, f, g, a, b, eps)
    return P if scale is None else P * scale[..., None, None]


def _fake_plan(C, f, g, a, b, eps, scale, sinkd, as_C, backend):  # noqa: ANN001, ANN202
    return C.new_empty(C.shape, dtype=C.dtype if as_C else f.dtype)


solve_op = custom_op("otdd::sinkhorn", _solve, _fake_solve)
plan_op = custom_op("otdd::sinkhorn_plan", _plan, _fake_plan)


def _backward(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    f: Tensor,
    g: Tensor,
    history: Tensor | None,
    n_iter: Tensor | None,
    df: Tensor,
    dg: Tensor,
    dcost: Tensor | None,
    mode: str,
    sinkd: bool,
    backend: str,
) -> Gradients:
    """Vector-Jacobian product of (f, g, cost) with respect to (C, a, b), in the type of f.

    ``cost = <P, C>`` depends on C directly, and through the plan on the potentials and weights.
    """
    problem = C, a, b, eps, rho_a, rho_b = filled(C, a, b, eps, rho_a, rho_b, sinkd)
    if dcost is not None:
        # The columns of P sum to b exp(-g / rho_b), so what a constant k in C adds is known.
        e = eps.to(f.dtype).unsqueeze(-1)
        P = plan_op(C, f, g, a, b, eps, None, sinkd, False, backend)
        k = ((P * C).sum((-1, -2)) / P.sum((-1, -2))).unsqueeze(-1)
        flow = P * dcost[..., None, None]
        weighted = flow * (C - k.unsqueeze(-1))
        to_rows, to_columns = weighted.sum(-1), weighted.sum(-2)
        in_columns = k * dcost.unsqueeze(-1) * torch.where(b > 0, kept(g, rho_b), 0)
        df, dg = df + to_rows / e, dg + to_columns / e
        dg = dg - in_columns * b / rho_b.to(f.dtype).unsqueeze(-1)
    if backend == "triton":
        run = pointers.triton_kernels("sinkhorn").potentials_backward_triton
    else:
        run = {
            "cpu": cpu.potentials_backward_cpu,
            "cuda": cuda.potentials_backward_cuda,
            "reference": potentials_backward_reference,
        }[backend]
    dC, da, db = run(*problem, f, g, history, n_iter, df, dg, mode)
    if dcost is not None:
        dC = dC + flow - weighted / e.unsqueeze(-1)
        da = da + over(to_rows, a)
        db = db + over(to_columns, b) + in_columns
    return dC, da, db


def _fake_backward(C, a, b, eps, rho_a, rho_b, f, g, *_):  # noqa: ANN001, ANN002, ANN202
    return (
        C.new_empty(C.shape, dtype=f.dtype),
        torch.empty_like(f),
        torch.empty_like(g),
    )


backward_op = custom_op("otdd::sinkhorn_backward", _backward, _fake_backward)
