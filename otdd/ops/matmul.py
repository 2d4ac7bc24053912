"""Matrix products that keep the digits of their type, whatever the caller lets torch do.

``torch.set_float32_matmul_precision`` and the settings beside it let torch multiply float32 in TF32
or bfloat16, with three digits or two: enough for a network, not for a plan or its gradient.
"""

from typing import Any

import torch
from torch import Tensor

from otdd.ops.dispatch import custom_op, differentiable


def wide(t: Tensor) -> Tensor:
    """`t` in float64 where torch may multiply float32 with fewer digits; else as it is."""
    return t.double() if t.dtype == torch.float32 and _is_reduced(t.is_cuda) else t


def product(p: Tensor, q: Tensor) -> Tensor:
    """``p @ q`` with the digits of its type; for the bodies of ops."""
    return (wide(p) @ wide(q)).to(p.dtype)


def _is_reduced(on_gpu: bool) -> bool:
    backend = torch.backends.cuda if on_gpu else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("tf32", "bf16")


def _matmul(p: Tensor, q: Tensor) -> Tensor:
    return product(p, q)


def _fake_matmul(p: Tensor, q: Tensor) -> Tensor:
    return p.new_empty(*p.shape[:-1], q.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    p, q = ctx.saved_tensors
    need_p, need_q = ctx.needs_input_grad
    return matmul(grad, q.mT) if need_p else None, matmul(p.mT, grad) if need_q else None


matmul = differentiable(custom_op("otdd::matmul", _matmul, _fake_matmul), _setup_context, _backward)
"""``p @ q`` of ``(..., N, M)`` and ``(..., M, K)`` with the same leading dimensions.

It keeps its precision inside ``torch.autocast`` too, and backwards.
"""
