"""What the `cpu` backend of every op shares: tensors as raw addresses, statuses as errors."""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from otdd import backends

Strided = tuple[int, int, int]


def refusal(t: Tensor) -> str | None:
    """Why native CPU code cannot take `t`, or None; whether it is built is not looked at here."""
    return None if t.device.type == "cpu" else f"the inputs are on {t.device}, not on the CPU"


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Callable[..., int]:
    return getattr(backends.native(), f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")


def flat(batch_dims: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors with one batch dimension, or none as before: what native code takes.

    They may be copies, to be kept until the native call is over.
    """
    if batch_dims <= 1:
        return tensors
    return tuple(None if t is None else t.flatten(0, batch_dims - 1) for t in tensors)


def with_rows(t: Tensor) -> Tensor:
    """`t`, or a copy, with contiguous rows."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def matrices(t: Tensor) -> Strided:
    """``(N, D)`` or ``(B, N, D)`` with contiguous rows."""
    return t.data_ptr(), t.stride(0) if t.dim() == 3 else 0, t.stride(-2)


def per_point(t: Tensor | None) -> Strided:
    """``(N,)`` or ``(B, N)`` with any strides, or nothing."""
    if t is None:
        return 0, 0, 0
    return t.data_ptr(), t.stride(0) if t.dim() == 2 else 0, t.stride(-1)


def per_problem(t: Tensor | None) -> Strided:
    """``()`` or ``(B,)``, or nothing."""
    if t is None:
        return 0, 0, 0
    return t.data_ptr(), t.stride(0) if t.dim() == 1 else 0, 0


def rows(t: Tensor) -> tuple[Tensor, Strided]:
    """``(B, N, D)`` with contiguous rows: the tensor to keep alive, and (address, strides)."""
    t = with_rows(t)
    return t, matrices(t)


def vectors(t: Tensor) -> Strided:
    """``(B, N)`` with any strides, or ``(B,)``."""
    return t.data_ptr(), t.stride(0), t.stride(1) if t.dim() == 2 else 0


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Threads for a call. One in a forked child: libgomp waits for ever for those of its parent."""
    return 1 if _forked else torch.get_num_threads()


def check(status: int, op: str) -> None:
    """Raises for what a kernel answers but 0; the numbers are those of csrc/cpu/problem.h."""
    if status == 1:
        raise MemoryError(f"{op}: no memory for the working copy of the costs")
    if status != 0:
        raise ValueError(f"{op}: got values that the kernel refuses (status {status})")
