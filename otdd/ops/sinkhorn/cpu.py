"""The `cpu` backend of `sinkhorn`: C++ over raw pointers."""

import torch
from torch import Tensor

from otdd.ops import checks, pointers
from otdd.ops.sinkhorn.reference import Solution, implicit_tolerance


def sinkhorn_cpu(
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
) -> Solution:
    """See `sinkhorn_reference`; the same iterates, by absorption."""
    B, N, M = C.shape
    C, C_rows = pointers.rows(C)
    history = (B, max_iter + 1, N + M) if keep_history else (0,)
    out = Solution(
        f=C.new_empty(B, N),
        g=C.new_empty(B, M),
        value=C.new_empty(B),
        cost=C.new_empty(B),
        marginal_error=C.new_empty(B),
        n_iter=C.new_empty(B, dtype=torch.int64),
        history=C.new_zeros(history, dtype=torch.float64),
    )
    status = pointers.kernel("sinkhorn", C.dtype)(
        B,
        N,
        M,
        C_rows,
        pointers.vectors(a),
        pointers.vectors(b),
        pointers.vectors(eps),
        pointers.vectors(rho_a),
        pointers.vectors(rho_b),
        pointers.vectors(g),
        max_iter,
        tol,
        out.f.data_ptr(),
        out.g.data_ptr(),
        out.value.data_ptr(),
        out.cost.data_ptr(),
        out.marginal_error.data_ptr(),
        out.n_iter.data_ptr(),
        out.history.data_ptr() if keep_history else 0,
        pointers.threads(),
    )
    if status == 2:
        checks.finite(C, "C")
    pointers.check(status, "sinkhorn")
    return out


def plan_cpu(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, scale: Tensor
) -> Tensor:
    """``scale * P`` from the potentials."""
    B, N, M = C.shape
    C, C_rows = pointers.rows(C)
    P = C.new_empty(B, N, M)
    vectors = [pointers.vectors(t) for t in (f, g, a, b, eps, scale)]
    run = pointers.kernel("plan", C.dtype)
    run(B, N, M, C_rows, *vectors, P.data_ptr(), pointers.threads())
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
    history: Tensor,
    n_iter: Tensor,
    df: Tensor,
    dg: Tensor,
    mode: str,
    rtol: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `potentials_backward_reference`; the implicit system is solved in float64."""
    rtol = rtol or implicit_tolerance(C.dtype)
    if mode == "implicit" and C.dtype != torch.float64:
        wide = (t.double() for t in (C, a, b))
        rest = (t.double() for t in (f, g))
        last = (t.double() for t in (df, dg))
        rho = rho_a, rho_b
        grads = potentials_backward_cpu(*wide, eps, *rho, *rest, history, n_iter, *last, mode, rtol)
        return tuple(t.to(C.dtype) for t in grads)
    B, N, M = C.shape
    C, C_rows = pointers.rows(C)
    dC, da, db = C.new_empty(B, N, M), C.new_empty(B, N), C.new_empty(B, M)
    status = pointers.kernel("backward", C.dtype)(
        mode == "unrolled",
        rtol,
        B,
        N,
        M,
        history.shape[1] if mode == "unrolled" else 0,
        C_rows,
        *(pointers.vectors(t) for t in (a, b, eps, rho_a, rho_b, f, g)),
        history.data_ptr(),
        n_iter.data_ptr(),
        pointers.vectors(df),
        pointers.vectors(dg),
        dC.data_ptr(),
        da.data_ptr(),
        db.data_ptr(),
        pointers.threads(),
    )
    pointers.check(status, "sinkhorn's backward")
    return dC, da, db
