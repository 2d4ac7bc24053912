"""`barycentric`: where the plan sends each source, without keeping the plan."""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks, pointers
from otdd.ops.dispatch import custom_op, differentiable, no_derivative
from otdd.ops.matmul import product
from otdd.ops.partial import PartialResult
from otdd.ops.points.result import PointsResult
from otdd.ops.sinkhorn import SinkhornResult, problem_tensors
from otdd.ops.sinkhorn.implicit import over
from otdd.ops.sinkhorn.op import equal_weights, plan_op

_CHUNK = 1 << 20  # entries of the plan that exist at a time


def barycentric(
    potentials: SinkhornResult | tuple[Tensor, Tensor],
    y: Tensor,
    *,
    C: Tensor | None = None,
    eps: float | Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Barycentric projection ``T(x_i) = (1 / a_i) sum_j P_ij y_j``.

    ``P_ij / a_i = b_j exp((f_i + g_j - C_ij) / eps)`` is made some rows at a time, forward and
    backward. A row of weight zero is sent to 0.

    Args:
        potentials: A result of `otdd.ops.sinkhorn`, differentiable as its `plan` is; or potentials
            ``(f, g)`` with `C` and `eps`, differentiable in f, g, C and b.
        y: Values at the targets, ``(..., M, D)``, with the leading dimensions of the solve or
            broadcastable to them. Differentiable.
        C: Costs ``(..., N, M)``, for potentials only.
        eps: Regularisation strength, as in `otdd.ops.sinkhorn`, for potentials only.
        a: Row weights, for potentials only; they matter only where they are 0.
        b: Column weights, for potentials only.
        backend: As in `sinkhorn`; None for that of the solve, or the first that can.

    Returns:
        Images of the sources, ``(..., N, D)``.

    Raises:
        ValueError: Shapes that don't fit, another device, or C, eps, a or b beside a result.
        TypeError: `y` is not floating point or has another dtype than the solve.
    """
    if isinstance(potentials, SinkhornResult):
        given = [name for name, t in (("C", C), ("eps", eps), ("a", a), ("b", b)) if t is not None]
        checks.require(not given, "potentials", f"a result beside {given}", "one or the other")
        r, detach = potentials, potentials.grad == "envelope"
        C, f, g, a, b = (t.detach() if detach else t for t in (r.C, r.f, r.g, r.a, r.b))
        eps, backend = r.eps, backend or r.backend
    else:
        pair = isinstance(potentials, tuple | list) and not any(t is None for t in potentials)
        accepted = "a SinkhornResult, or tensors (f, g)"
        if isinstance(potentials, PointsResult):
            accepted += "; this result has it as its method: result.barycentric(y)"
        elif isinstance(potentials, PartialResult):
            accepted += "; here result.extended, with a row of y for the slack point too"
        checks.require(pair, "potentials", type(potentials).__name__, accepted)
        if C is None or eps is None:
            raise ValueError("C and eps: got None; accepted: both, with (f, g)")
        C, start, a, b, eps = problem_tensors(C, eps, potentials, a, b)
        f, g = cast(tuple[Tensor, Tensor], start)
        equal = equal_weights(C)
        a, b = equal[0] if a is None else a, equal[1] if b is None else b
    y = checks.as_float(y, "y")
    checks.same_kind(y, "y", f, "the solve")
    checks.require(y.dim() >= 2, "y", f"shape {tuple(y.shape)}", "(..., M, D)")
    *batch, _, M = C.shape
    try:
        y = y.expand(*batch, *y.shape[-2:])
        fits = y.shape[-2] == M
    except RuntimeError:
        fits = False
    checks.require(fits, "y", f"shape {tuple(y.shape)}", f"{(*batch, M)} + (D,) or broadcastable")
    chosen = backends.choose("barycentric", pointers.refusals(C), backend)
    C = pointers.as_read(C, chosen)
    return _barycentric(C, f, g, a, b, eps, y, chosen)


def _image(
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    y: Tensor,
    backend: str,
) -> Tensor:
    if checks.values_are_checked(y):
        for t, name in ((C, "C"), (f, "potentials f"), (g, "potentials g"), (y, "y")):
            checks.finite(t, name)
        checks.weights(a, "a")
        checks.weights(b, "b")
        checks.positive(eps, "eps", C.dtype)
    return images(C, f, g, a, b, eps, y, backend)


def images(
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    y: Tensor,
    backend: str,
) -> Tensor:
    """``T(x_i)``, ``(..., N, D)``, of values that were checked before; not differentiable."""
    image = y.new_empty(*C.shape[:-1], y.shape[-1])
    for rows, weights in _chunks(C, f, g, a, b, eps, backend):
        image[..., rows, :] = product(weights, y)
    return image


def _fake_image(C: Tensor, *others: Any) -> Tensor:
    y = others[5]
    return y.new_empty(*C.shape[:-1], y.shape[-1])


def _image_backward(
    grad: Tensor,
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    y: Tensor,
    through_plan: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of C, f, g, b (zeros unless `through_plan`) and y."""
    e = eps.to(f.dtype).unsqueeze(-1)
    dC = C.new_zeros(C.shape if through_plan else (*C.shape[:-1], 0))
    df, dg, dy = torch.zeros_like(f), torch.zeros_like(g), torch.zeros_like(y)
    for rows, weights in _chunks(C, f, g, a, b, eps, backend):
        dy += product(weights.mT, grad[..., rows, :])
        if through_plan:
            flow = weights * product(grad[..., rows, :], y.mT)
            dC[..., rows, :] = -flow / e.unsqueeze(-1)
            df[..., rows] = flow.sum(-1) / e
            dg += flow.sum(-2) / e
    return dC, df, dg, over(dg * e, b), dy


def _fake_image_backward(grad: Tensor, C: Tensor, *others: Any) -> tuple[Tensor, ...]:
    f, g, _, b, _, y, through_plan, _ = others
    dC = C.new_empty(C.shape if through_plan else (*C.shape[:-1], 0))
    return (
        dC,
        f.new_empty(f.shape),
        g.new_empty(g.shape),
        b.new_empty(b.shape),
        y.new_empty(y.shape),
    )


def _chunks(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, backend: str
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their ``b_j exp((f_i + g_j - C_ij) / eps)``."""
    *batch, N, M = C.shape
    step = max(1, _CHUNK // max(1, math.prod(batch) * M))
    mask = (a > 0).to(f.dtype)
    for i in range(0, N, step):
        rows = slice(i, i + step)
        part = C[..., rows, :], f[..., rows], g, mask[..., rows], b
        yield rows, plan_op(*part, eps, None, False, False, backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


@checks.outside_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    through_plan = any(ctx.needs_input_grad[:5])
    run = _once if torch.is_grad_enabled() else _image_backward_op
    dC, df, dg, db, dy = run(grad.contiguous(), *ctx.saved_tensors, through_plan, ctx.backend)
    if not through_plan:
        dC = df = dg = db = None
    return dC, df, dg, None, db, None, dy, None


_image_backward_op = custom_op("otdd::barycentric_backward", _image_backward, _fake_image_backward)
_once = differentiable(_image_backward_op, *no_derivative("barycentric has no second derivative"))
_image_op = custom_op("otdd::barycentric", _image, _fake_image)
_barycentric = differentiable(_image_op, _setup_context, _backward)
