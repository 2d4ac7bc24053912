"""The `cuda` backend of `transport_moves`: one call of few launches."""

import math

from torch import Tensor

from otdd.ops import pointers


def moves_cuda(
    x: Tensor,
    y: Tensor,
    C: Tensor | None,
    a: Tensor,
    b: Tensor,
    given: Tensor | None,
    start: Tensor | None,
    lambda_1: float,
    metric: str,
    max_iter: int,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient in x, plan, f, g and eps; the gradient only of ``l1``.

    Costs ``l1`` and ``sqeuclidean`` are made here, `C` has those of other kinds. The plan, of the
    moving points, is over the rows' weights unless it is for a gradient; what of the two is not
    made is empty.
    """
    *batch, N, D = x.shape
    M, in_one = y.shape[-2], C is None
    L = 0 if given is None else given.shape[-2]
    B, signed = math.prod(batch), gradient and in_one and metric == "l1"
    made = (x.shape, (0,)) if signed else ((0,), (*batch, N, M))
    of_x, plan, f, g, eps = (x.new_empty(t) for t in (*made, a.shape, b.shape, batch))
    C = x.new_empty(*batch, N, M) if C is None else C.contiguous()
    given = None if given is None or L == 0 else given.contiguous()
    x, y, a, b, start = pointers.flat(len(batch), x, y, a, b, start)
    x, y = pointers.with_rows(x), pointers.with_rows(y)
    device, stream = pointers.place(x)
    space = pointers.workspace(x, "moves", B, N, L, M, D)
    status = pointers.cuda_kernel("moves", x.dtype)(
        device,
        stream,
        x,
        y,
        in_one,
        metric == "sqeuclidean",
        C,
        given,
        *(a, b, start),
        lambda_1,
        max_iter,
        *(f, g, eps),
        of_x if signed else None,
        None if signed else plan,
        not gradient,
        space,
    )
    pointers.check_cuda(status, "transport_moves")
    return of_x, plan, f, g, eps
