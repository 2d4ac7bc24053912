"""The `cuda` backend of `sinkhorn`: CUDA C++, in the current stream."""

import math

import torch
from torch import Tensor

from otdd.ops import pointers
from otdd.ops.sinkhorn.implicit import implicit_tolerance
from otdd.ops.sinkhorn.reference import Solution


def refusal(schedule: float | None, accelerate: str | None) -> str | None:
    """What the kernels have against a solve, wherever it is."""
    if schedule is None and accelerate is None:
        return None
    return "the CUDA kernels have neither schedule nor accelerate"


def sinkhorn_cuda(
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
    sinkd: bool,
) -> Solution:
    """See `sinkhorn_reference`; the same iterates, by absorption, in one launch."""
    *batch, N, M = C.shape
    B = math.prod(batch)
    out = Solution.empty(C, a, b, eps, max_iter, keep_history)
    tensors = pointers.flat(len(batch), pointers.with_rows(C), a, b, eps, rho_a, rho_b, g)
    C, a, b, eps, rho_a, rho_b, g = tensors
    device, stream = pointers.place(C)
    space = pointers.workspace(out.f, "sinkhorn", B, N, M)
    status = pointers.cuda_kernel("sinkhorn", out.f.dtype)(
        device,
        stream,
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
        *out,
        space,
    )
    pointers.check_cuda(status, "sinkhorn")
    return out


def plan_cuda(
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    scale: Tensor | None,
    sinkd: bool,
    as_C: bool,
) -> Tensor:
    """``scale * P`` from the potentials, in their type or in that of C."""
    P = C.new_empty(C.shape, dtype=C.dtype if as_C else f.dtype)
    tensors = pointers.flat(C.dim() - 2, pointers.with_rows(C), f, g, a, b, eps, scale)
    C, f, g, a, b, eps, scale = tensors
    device, stream = pointers.place(C)
    status = pointers.cuda_kernel("plan", f.dtype)(
        device,
        stream,
        C,
        f,
        g,
        a,
        b,
        1.0 if sinkd else 0.0,
        eps,
        scale,
        P,
    )
    pointers.check_cuda(status, "sinkhorn's plan")
    return P


def potentials_backward_cuda(
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
    """See `potentials_backward_reference`; the implicit system is solved in float64."""
    *batch, N, M = C.shape
    B, unrolled = math.prod(batch), mode == "unrolled"
    given, dtype = f.dtype, f.dtype if unrolled else torch.float64
    a, b, f, g, df, dg = (t.to(dtype) for t in (a, b, f, g, df, dg))
    history, n_iter = (None if t is None else t.contiguous() for t in (history, n_iter))
    steps = 0 if history is None else history.shape[-2]
    shapes = C.shape, C.shape[:-1], (*batch, M)
    dC, da, db = (C.new_empty(shape, dtype=dtype) for shape in shapes)
    tensors = pointers.with_rows(C), a, b, eps, rho_a, rho_b, f, g, df, dg
    C, a, b, eps, rho_a, rho_b, f, g, df, dg = pointers.flat(len(batch), *tensors)
    device, stream = pointers.place(C)
    space = pointers.workspace(dC, "backward", unrolled, B, N, M, steps)
    status = pointers.cuda_kernel("backward", dtype)(
        device,
        stream,
        unrolled,
        implicit_tolerance(given),
        *(C, a, b, eps, rho_a, rho_b),
        *(f, g, history, n_iter),
        *(df, dg),
        *(dC, da, db),
        space,
    )
    pointers.check_cuda(status, "sinkhorn's backward")
    return dC.to(given), da.to(given), db.to(given)
