"""The `cpu` backend of `sinkhorn`: C++."""

import torch
from torch import Tensor

from otdd.ops import checks, pointers
from otdd.ops.sinkhorn.implicit import implicit_tolerance
from otdd.ops.sinkhorn.reference import Solution


def sinkhorn_cpu(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    g: Tensor | None,
    max_iter: int,
    tol: float,
    keep_history: bool,
    schedule: float,
    accelerate: str,
    sinkd: bool,
) -> Solution:
    """See `sinkhorn_reference`; the same iterates, by absorption. Looks at all values itself."""
    out = Solution.empty(C, a, b, eps, max_iter, keep_history)
    tensors = pointers.flat(C.dim() - 2, pointers.with_rows(C), a, b, eps, rho_a, rho_b, g)
    C, a, b, eps, rho_a, rho_b, g = tensors
    status = pointers.kernel("sinkhorn", C.dtype)(
        C,
        a,
        b,
        1.0 if sinkd else 0.0,
        eps,
        rho_a,
        rho_b,
        g,
        max_iter,
        tol,
        schedule,
        accelerate == "anderson",
        *out,
        pointers.threads(),
    )
    if status in (2, 4):
        checks.problem(*tensors, sinkd)
    pointers.check(status, "sinkhorn")
    return out


def plan_cpu(
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    scale: Tensor | None,
    sinkd: bool,
) -> Tensor:
    """``scale * P`` from the potentials."""
    P = torch.empty_like(C, memory_format=torch.contiguous_format)
    tensors = pointers.flat(C.dim() - 2, pointers.with_rows(C), f, g, a, b, eps, scale)
    C, f, g, a, b, eps, scale = tensors
    status = pointers.kernel("plan", C.dtype)(
        C,
        f,
        g,
        a,
        b,
        1.0 if sinkd else 0.0,
        eps,
        scale,
        P,
        pointers.threads(),
    )
    pointers.check(status, "sinkhorn's plan")
    return P


def potentials_backward_cpu(
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
    rtol: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `potentials_backward_reference`; the implicit system is solved in float64."""
    rtol = rtol or implicit_tolerance(C.dtype)
    if mode == "implicit" and C.dtype != torch.float64:
        C64, a64, b64, f64, g64, df64, dg64 = (t.double() for t in (C, a, b, f, g, df, dg))
        problem = C64, a64, b64, eps, rho_a, rho_b
        grads = potentials_backward_cpu(*problem, f64, g64, history, n_iter, df64, dg64, mode, rtol)
        return tuple(t.to(C.dtype) for t in grads)
    *batch, N, M = C.shape
    kept = (None if t is None else t.contiguous() for t in (history, n_iter))
    dC, da, db = C.new_empty(*batch, N, M), C.new_empty(*batch, N), C.new_empty(*batch, M)
    tensors = pointers.with_rows(C), a, b, eps, rho_a, rho_b, f, g, df, dg
    C, a, b, eps, rho_a, rho_b, f, g, df, dg = pointers.flat(len(batch), *tensors)
    status = pointers.kernel("backward", C.dtype)(
        mode == "unrolled",
        rtol,
        *(C, a, b, eps, rho_a, rho_b),
        *(f, g, *kept),
        *(df, dg),
        *(dC, da, db),
        pointers.threads(),
    )
    pointers.check(status, "sinkhorn's backward")
    return dC, da, db
