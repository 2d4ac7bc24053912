"""The torch custom ops behind `otdd.ops.sinkhorn`: one schema, fake and backward for every backend.

All tensors are flat over the batch: ``C (B, N, M)``, ``a (B, N)``, ``b (B, M)``, ``eps (B,)`` in
float64, ``g (B, M)`` the potentials to start from.
"""

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.sinkhorn import cpu
from otdd.ops.sinkhorn.reference import (
    over,
    plan_from_potentials,
    potentials_backward_reference,
    sinkhorn_reference,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("otdd::sinkhorn", mutates_args=())
def sinkhorn_op(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    g: Tensor,
    max_iter: int,
    tol: float,
    grad: str,
    sinkd: bool,
    backend: str,
) -> Outputs:
    """One whole batch of solves -> f, g, value, cost, marginal_error, n_iter, history."""
    if checks.values_are_checked(C):
        if backend != "cpu":  # the native solver looks at C itself, while it reads it
            checks.finite(C, "C")
        checks.weights(a, "a", binary=sinkd)
        checks.weights(b, "b", binary=sinkd)
        checks.finite(g, "init")
        checks.positive_eps(eps, C.dtype)
    rest = g, max_iter, tol, grad == "unrolled"
    if backend == "cpu":
        hard = torch.full_like(eps, torch.inf)
        return tuple(cpu.sinkhorn_cpu(C, a, b, eps, hard, hard, *rest))
    return tuple(sinkhorn_reference(C, a, b, eps, *rest))


@sinkhorn_op.register_fake
def _(C, a, b, eps, g, max_iter, tol, grad, sinkd, backend):  # noqa: ANN001, ANN202
    B, N, M = C.shape
    history = (B, max_iter + 1, N + M) if grad == "unrolled" else (0,)
    return (
        C.new_empty(B, N),
        C.new_empty(B, M),
        C.new_empty(B),
        C.new_empty(B),
        C.new_empty(B),
        C.new_empty(B, dtype=torch.int64),
        C.new_empty(history, dtype=torch.float64),
    )


@torch.library.custom_op("otdd::sinkhorn_plan", mutates_args=())
def plan_op(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, scale: Tensor, backend: str
) -> Tensor:
    """``scale * P``, ``scale (B,)``: the envelope gradient with respect to the cost."""
    return plan_rows(C, f, g, a, b, eps, scale, backend)


@plan_op.register_fake
def _(C, f, g, a, b, eps, scale, backend):  # noqa: ANN001, ANN202
    return torch.empty_like(C, memory_format=torch.contiguous_format)


@torch.library.custom_op("otdd::sinkhorn_backward", mutates_args=())
def backward_op(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f: Tensor,
    g: Tensor,
    history: Tensor,
    n_iter: Tensor,
    df: Tensor,
    dg: Tensor,
    dcost: Tensor | None,
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of (f, g, cost) with respect to (C, a, b).

    ``cost = <P, C>`` depends on C directly, and through the plan on the potentials and weights.
    """
    if dcost is not None:
        # The columns of P sum to b: a constant k in C adds k sum(b) to the cost and nothing else.
        e, one = eps.to(C.dtype).unsqueeze(-1), torch.ones_like(dcost)
        P = plan_rows(C, f, g, a, b, eps, one, backend)
        k = (P * C).sum((-1, -2)) / P.sum((-1, -2))
        flow = P * dcost[:, None, None]
        weighted = flow * (C - k[:, None, None])
        to_rows, to_columns = weighted.sum(-1), weighted.sum(-2)
        df, dg = df + to_rows / e, dg + to_columns / e
    rest = f, g, history, n_iter, df, dg, mode
    if backend == "cpu":
        hard = torch.full_like(eps, torch.inf)
        dC, da, db = cpu.potentials_backward_cpu(C, a, b, eps, hard, hard, *rest)
    else:
        dC, da, db = potentials_backward_reference(C, a, b, eps, *rest)
    if dcost is not None:
        dC = dC + flow - weighted / e.unsqueeze(-1)
        da = da + over(to_rows, a)
        db = db + over(to_columns, b) + torch.where(b > 0, (k * dcost).unsqueeze(-1), 0)
    return dC, da, db


def plan_rows(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, scale: Tensor, backend: str
) -> Tensor:
    """``scale * P`` by `backend`, for all rows or some of them."""
    if backend == "cpu":
        return cpu.plan_cpu(C, f, g, a, b, eps, scale)
    return plan_from_potentials(C, f, g, a, b, eps) * scale[:, None, None]


@backward_op.register_fake
def _(C, a, b, eps, f, g, history, n_iter, df, dg, dcost, mode, backend):  # noqa: ANN001, ANN202
    B, N, M = C.shape
    return (
        torch.empty_like(C, memory_format=torch.contiguous_format),
        C.new_empty(B, N),
        C.new_empty(B, M),
    )


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    C, a, b, eps, _, _, _, ctx.grad, _, ctx.backend = inputs
    f, g, _, _, _, n_iter, history = output
    ctx.save_for_backward(C, a, b, eps, f, g, history, n_iter)
    ctx.mark_non_differentiable(n_iter, history, output[4])
    ctx.set_materialize_grads(False)


@checks.outside_autocast
def _backward(ctx, df, dg, dvalue, dcost, *_):  # noqa: ANN001, ANN002, ANN202
    C, a, b, eps, f, g, history, n_iter = ctx.saved_tensors
    none = (None,) * 7
    if ctx.grad == "envelope":
        f, g = f.detach(), g.detach()  # no second derivative rather than half of one
        scale = _sum(dvalue, dcost)
        dC = da = db = None
        if scale is not None and ctx.needs_input_grad[0]:
            dC = plan_op(C, f, g, a, b, eps, scale, ctx.backend)
    else:
        df = _sum(df, None if dvalue is None else dvalue[:, None] * a)
        dg = _sum(dg, None if dvalue is None else dvalue[:, None] * b)
        if df is None and dg is None and dcost is None:
            return None, None, None, *none
        df = torch.zeros_like(f) if df is None else df.contiguous()
        dg = torch.zeros_like(g) if dg is None else dg.contiguous()
        dC, da, db = backward_op(
            C, a, b, eps, f, g, history, n_iter, df, dg, dcost, ctx.grad, ctx.backend
        )
    if dvalue is not None:
        da = _sum(da, dvalue[:, None] * torch.where(a > 0, f, 0))
        db = _sum(db, dvalue[:, None] * torch.where(b > 0, g, 0))
    return dC, da, db, *none


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


sinkhorn_op.register_autograd(_backward, setup_context=_setup_context)
for _device in ("cpu", "cuda"):
    sinkhorn_op.register_autocast(_device, torch.float32)
