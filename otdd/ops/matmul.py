"""`matmul`: a matrix product that keeps its precision inside ``torch.autocast``, backwards too."""

from typing import Any

from torch import Tensor

from otdd.ops import checks
from otdd.ops.dispatch import differentiable


@checks.outside_autocast
def _matmul(p: Tensor, q: Tensor) -> Tensor:
    return p @ q


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    p, q = ctx.saved_tensors
    need_p, need_q = ctx.needs_input_grad
    return matmul(grad, q.mT) if need_p else None, matmul(p.mT, grad) if need_q else None


matmul = differentiable(_matmul, _setup_context, _backward)
"""``p @ q`` of ``(..., N, M)`` and ``(..., M, K)`` with the same leading dimensions."""
