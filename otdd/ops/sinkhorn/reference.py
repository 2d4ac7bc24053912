"""Entropic OT in plain PyTorch: the specification of `otdd.ops.sinkhorn`, on any device.

``C (..., N, M)``, ``a (..., N)``, ``b (..., M)``; ``eps``, ``rho_a`` and ``rho_b`` ``(...)`` in
float64, rho infinite where a marginal is to be met exactly. A weight of zero is ``-inf`` in the log
domain: its row or column takes no part, and its own potential is the soft c-transform of the other
side, finite.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.sinkhorn.accelerate import LEVEL_ERROR, LEVEL_ITERATIONS, Anderson, cost_range, levels
from otdd.ops.sinkhorn.implicit import adjoint, implicit_tolerance, over


class Solution(NamedTuple):
    """What one solve returns.

    ``history`` holds (f, g) after 0..T iterations, ``(..., T + 1, N + M)`` in float64, if kept.
    """

    f: Tensor
    g: Tensor
    value: Tensor
    cost: Tensor
    marginal_error: Tensor
    n_iter: Tensor
    history: Tensor | None

    @classmethod
    def empty(
        cls,
        C: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        eps: Tensor,
        max_iter: int,
        keep_history: bool,
    ) -> "Solution":
        """Room for the solution; an early stop leaves some of a history unwritten: zeros."""
        *batch, N, M = C.shape
        like, contiguous = torch.empty_like, torch.contiguous_format
        # As other tensors are, wherever there are plain ones: half the time of reading sizes.
        if type(eps) is Tensor:
            value = like(eps, dtype=checks.wide(C.dtype), memory_format=contiguous)
        else:
            value = C.new_empty(batch, dtype=checks.wide(C.dtype))

        def points(w: Tensor | None, count: int) -> Tensor:
            if type(w) is Tensor:
                return like(w, memory_format=contiguous)
            return value.new_empty((*batch, count))

        return cls(
            points(a, N),
            points(b, M),
            value,
            like(value),
            like(value),
            like(value, dtype=torch.int64),
            value.new_zeros((*batch, max_iter + 1, N + M), dtype=torch.float64)
            if keep_history
            else None,
        )


def soft_rows(C: Tensor, g: Tensor, log_b: Tensor, eps: Tensor) -> Tensor:
    """``f_i = -eps LSE_j(log b_j + (g_j - C_ij) / eps)``, finite."""
    logits = (log_b + g / eps).unsqueeze(-2) - C / eps.unsqueeze(-1)
    # What masks costs may be so large that over eps it is not finite.
    logits = torch.where(log_b.unsqueeze(-2) > -torch.inf, logits, -torch.inf)
    most = torch.finfo(C.dtype).max
    return (-eps * torch.logsumexp(logits, -1)).clamp(-most, most)


def log_density(C: Tensor, f: Tensor, g: Tensor, eps: Tensor) -> Tensor:
    """``(f_i + g_j - C_ij) / eps``, log of the plan over ``a x b``."""
    return (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps.unsqueeze(-1)


def plan_from_potentials(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor
) -> Tensor:
    """``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``, exactly 0 where a weight is 0."""
    used = (a != 0).unsqueeze(-1) & (b != 0).unsqueeze(-2)
    eps = eps.to(f.dtype).unsqueeze(-1)
    logits = torch.where(used, log_density(C, f, g, eps), -torch.inf)
    return logits.exp() * a.unsqueeze(-1) * b.unsqueeze(-2)


def damping(rho: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """``rho / (rho + eps)``, ``(..., 1)``: 1 for a hard marginal, towards 0 for a free one.

    What a KL penalty on a marginal makes of the step of its potential (Chizat, Peyre, Schmitzer &
    Vialard, Math. Comp. 2018, section 4).
    """
    return (1 / (1 + eps / rho)).to(dtype).unsqueeze(-1)


def kept(f: Tensor, rho: Tensor) -> Tensor:
    """``exp(-f_i / rho)``: the part of its weight that a point keeps; 1 for a hard marginal."""
    return torch.exp(-f / rho.to(f.dtype).unsqueeze(-1))


def weighted(w: Tensor, x: Tensor) -> Tensor:
    """``w x``, exactly 0 where w is 0, whatever x is."""
    return torch.where(w != 0, w * x, 0)


def conjugate(f: Tensor, rho: Tensor) -> Tensor:
    """``rho (1 - exp(-f_i / rho))``, what a marginal adds to the dual; f for a hard one."""
    rho = rho.to(f.dtype).unsqueeze(-1)
    hard = torch.isinf(rho)
    finite = torch.where(hard, 1, rho)
    return torch.where(hard, f, -finite * torch.expm1(-f / finite))


def dual_value(
    f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho_a: Tensor, rho_b: Tensor
) -> Tensor:
    """``<a, f> + <b, g>``; with a soft marginal, the dual of Chizat et al. (2018, eq. 4.5).

    That is ``<a, conjugate(f)> + <b, conjugate(g)> - eps (sum_ij P_ij - sum(a) sum(b))``, where the
    columns of P sum to ``b exp(-g / rho_b)`` as they do after every step.
    """
    value = weighted(a, conjugate(f, rho_a)).sum(-1) + weighted(b, conjugate(g, rho_b)).sum(-1)
    mass = weighted(b, kept(g, rho_b)).sum(-1) - a.sum(-1) * b.sum(-1)
    soft = torch.isfinite(rho_a) | torch.isfinite(rho_b)
    return value - torch.where(soft, eps.to(a.dtype) * mass, 0)


def sinkhorn_reference(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    rho_b: Tensor,
    g: Tensor,
    max_iter: int,
    tol: float,
    keep_history: bool,
    schedule: float = 0.0,
    accelerate: str = "",
) -> Solution:
    """Alternates the two soft c-transforms of METHOD ``max_iter`` times, rows first.

    A problem whose marginal error is at most ``tol`` keeps its potentials from then on. With a
    ``schedule``, a ratio, g comes from a few iterations at every level of eps above `eps`; with
    ``accelerate`` some iterations start elsewhere than the one before ended (`Anderson`).
    """
    weights, rho = (a, b), (rho_a, rho_b)
    n_iter = torch.zeros(C.shape[:-2], dtype=torch.int64, device=C.device)
    for level, active in levels(C, a, b, eps, schedule) if schedule else ():
        limit = LEVEL_ITERATIONS, LEVEL_ERROR * a.sum(-1)
        _, g, n, _ = _iterate(C, *weights, level, *rho, g, *limit, active, accelerate)
        n_iter += n
    everyone, goal = torch.ones_like(n_iter, dtype=torch.bool), a.new_full((), tol)
    f, g, n, history = _iterate(
        C, *weights, eps, *rho, g, max_iter, goal, everyone, accelerate, keep_history
    )
    return Solution(
        f=f,
        g=g,
        value=dual_value(f, g, a, b, eps, rho_a, rho_b),
        cost=(plan_from_potentials(C, f, g, a, b, eps) * C).sum((-1, -2)),
        marginal_error=_marginal_error(C, f, g, a, b, eps, rho_a),
        n_iter=n_iter + n,
        history=torch.stack(history, -2) if history else None,
    )


def _marginal_error(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho_a: Tensor
) -> Tensor:
    rows = plan_from_potentials(C, f, g, a, b, eps).sum(-1)
    return (rows - weighted(a, kept(f, rho_a))).abs().sum(-1)


def _iterate(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    rho_b: Tensor,
    g: Tensor,
    max_iter: int,
    tol: Tensor,
    active: Tensor,
    accelerate: str = "",
    keep_history: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Iterations of the problems that are `active`: f, g, how many were done, and their history."""
    log_a, log_b = a.log(), b.log()
    e = eps.to(C.dtype).unsqueeze(-1)
    damp_a, damp_b = damping(rho_a, eps, C.dtype), damping(rho_b, eps, C.dtype)
    f = torch.zeros_like(a, memory_format=torch.contiguous_format)
    n_iter = torch.zeros_like(active, dtype=torch.int64)
    history = [torch.cat([f, g], -1).double()] if keep_history else []
    met = torch.isinf(rho_a) & torch.isinf(rho_b)
    anderson = Anderson(g, b, cost_range(C, a, b), met) if accelerate else None
    jumped, start, stops = torch.zeros_like(active), g, bool((tol > 0).any())
    for left in range(max_iter - 1, -1, -1):
        f_next = damp_a * soft_rows(C, start, log_b, e)
        g_next = damp_b * soft_rows(C.mT, f_next, log_a, e)
        n_iter += active
        taken = active
        if anderson:
            value = dual_value(f_next, g_next, a, b, eps, rho_a, rho_b)
            size = weighted(a, f_next).abs().sum(-1) + weighted(b, g_next).abs().sum(-1)
            slack = 32 * torch.finfo(C.dtype).eps * (size + eps * a.sum(-1))
            good, jumped, jump = anderson.step(g_next, value, slack, tol * eps, left > 0)
            taken = active & good
        f = torch.where(taken.unsqueeze(-1), f_next, f)
        g = torch.where(taken.unsqueeze(-1), g_next, g)
        start = torch.where(jumped.unsqueeze(-1), jump, g) if anderson else g
        if keep_history:
            history.append(torch.cat([f, g], -1).double())
        if stops:
            met = _marginal_error(C, f, g, a, b, eps, rho_a) <= tol
            active = active & (jumped | ~met)
            if not bool(active.any()):
                break
    if keep_history:
        history += history[-1:] * (max_iter + 1 - len(history))
    return f, g, n_iter, history


def potentials_backward_reference(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    rho_b: Tensor,
    f: Tensor,
    g: Tensor,
    history: Tensor | None,
    n_iter: Tensor | None,
    df: Tensor,
    dg: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of the potentials (f, g) with respect to (C, a, b).

    ``unrolled`` walks the recorded potentials backwards, ``implicit`` solves the fixed point's
    linear system at (f, g).
    """
    e = eps.to(C.dtype).unsqueeze(-1)
    damp_a, damp_b = damping(rho_a, eps, C.dtype), damping(rho_b, eps, C.dtype)
    df, dg = torch.where(a > 0, df, 0), torch.where(b > 0, dg, 0)
    if mode == "unrolled":
        return _unrolled(C, a, b, e, damp_a, damp_b, history, n_iter, df, dg)
    return _implicit(plan_from_potentials(C, f, g, a, b, eps), a, b, e, damp_a, damp_b, df, dg)


def _unrolled(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    damp_a: Tensor,
    damp_b: Tensor,
    history: Tensor,
    n_iter: Tensor,
    df: Tensor,
    dg: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse of `sinkhorn_reference`'s loop, each step's plan made anew from its potentials."""
    n = a.shape[-1]
    used = (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    log_a, log_b = a.log().unsqueeze(-1), b.log().unsqueeze(-2)
    dC = torch.zeros_like(C)
    da, db = torch.zeros_like(C[..., 0]), torch.zeros_like(C[..., 0, :])
    for t in range(history.shape[-2] - 1, 0, -1):
        ran = (n_iter >= t).unsqueeze(-1)
        f, g = history[..., t, :n].to(C.dtype), history[..., t, n:].to(C.dtype)
        g_before = history[..., t - 1, n:].to(C.dtype)
        # g = -damp_b eps LSE_i(log a_i + (f_i - C_ij) / eps)
        logits = torch.where(used, log_density(C, f, g / damp_b, e) + log_a, -torch.inf)
        flow = logits.exp() * (damp_b * dg * ran).unsqueeze(-2)
        dC += flow
        da -= over(e * flow.sum(-1), a)
        df = df - flow.sum(-1)
        # f = -damp_a eps LSE_j(log b_j + (g_before_j - C_ij) / eps)
        logits = torch.where(used, log_density(C, f / damp_a, g_before, e) + log_b, -torch.inf)
        flow = logits.exp() * (damp_a * df * ran).unsqueeze(-1)
        dC += flow
        db -= over(e * flow.sum(-2), b)
        dg = torch.where(ran, -flow.sum(-2), dg)
        df = torch.where(ran, 0, df)
    return dC, da, db


def _implicit(
    plan: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    damp_a: Tensor,
    damp_b: Tensor,
    df: Tensor,
    dg: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fixed point's derivative, in float64; see `adjoint`."""
    dtype, plan = plan.dtype, plan.double()
    k, h, to_rows, to_columns = adjoint(
        lambda h: torch.einsum("...nm,...m->...n", plan, h),
        lambda k: torch.einsum("...nm,...n->...m", plan, k),
        damp_a,
        damp_b,
        df.double(),
        dg.double(),
        implicit_tolerance(dtype),
    )
    dC = plan * (h.unsqueeze(-2) + k.unsqueeze(-1))
    da, db = -over(e * to_rows, a), -over(e * to_columns, b)
    return dC.to(dtype), da.to(dtype), db.to(dtype)
