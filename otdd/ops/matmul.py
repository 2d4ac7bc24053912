"""`matmul`: a matrix product that keeps its precision inside ``torch.autocast``, backwards too."""

from torch import Tensor

from otdd.ops import checks
from otdd.ops.dispatch import differentiable


@checks.outside_autocast
def _matmul(p: Tensor, q: Tensor) -> Tensor:
    return p @ q


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):  # noqa: ANN001, ANN202
    p, q = ctx.saved_tensors
    need_p, need_q = ctx.needs_input_grad
    return matmul(grad, q.mT) if need_p else None, matmul(p.mT, grad) if need_q else None


matmul = differentiable(_matmul, _setup_context, _backward)
"""``p @ q`` of ``(..., N, M)`` and ``(..., M, K)`` with the same leading dimensions."""
