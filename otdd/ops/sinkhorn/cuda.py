"""The `cuda` backend of `sinkhorn`: CUDA C++ over raw pointers, in the current stream."""

import math

import torch
from torch import Tensor

from otdd.ops import pointers
from otdd.ops.pointers import matrices, per_point, per_problem
from otdd.ops.sinkhorn.reference import Solution


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
    steps = max_iter + 1 if keep_history else 0
    history = C.new_zeros if keep_history else C.new_empty  # an early stop leaves some unwritten
    out = Solution(
        C.new_empty(*batch, N),
        C.new_empty(*batch, M),
        C.new_empty(batch),
        C.new_empty(batch),
        C.new_empty(batch),
        C.new_empty(batch, dtype=torch.int64),
        history(*batch, steps, N + M, dtype=torch.float64),
    )
    tensors = pointers.flat(len(batch), pointers.with_rows(C), a, b, eps, rho_a, rho_b, g)
    C, a, b, eps, rho_a, rho_b, g = tensors
    device, stream = pointers.place(C)
    space = pointers.workspace(C, "sinkhorn", B, N, M)
    status = pointers.cuda_kernel("sinkhorn", C.dtype)(
        device,
        stream,
        B,
        N,
        M,
        matrices(C),
        pointers.number(C),
        per_point(a),
        per_point(b),
        1.0 if sinkd else 0.0,
        per_problem(eps),
        per_problem(rho_a),
        per_problem(rho_b),
        per_point(g),
        max_iter,
        tol,
        out.f.data_ptr(),
        out.g.data_ptr(),
        out.value.data_ptr(),
        out.cost.data_ptr(),
        out.marginal_error.data_ptr(),
        out.n_iter.data_ptr(),
        out.history.data_ptr() if keep_history else 0,
        space.data_ptr(),
        space.numel(),
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
) -> Tensor:
    """``scale * P`` from the potentials."""
    *batch, N, M = C.shape
    P = C.new_empty(C.shape)
    tensors = pointers.flat(len(batch), pointers.with_rows(C), f, g, a, b, eps, scale)
    C, f, g, a, b, eps, scale = tensors
    device, stream = pointers.place(C)
    status = pointers.cuda_kernel("plan", C.dtype)(
        device,
        stream,
        math.prod(batch),
        N,
        M,
        matrices(C),
        pointers.number(C),
        per_point(f),
        per_point(g),
        per_point(a),
        per_point(b),
        1.0 if sinkd else 0.0,
        per_problem(eps),
        per_problem(scale),
        P.data_ptr(),
    )
    pointers.check_cuda(status, "sinkhorn's plan")
    return P
