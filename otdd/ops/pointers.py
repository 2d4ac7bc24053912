"""What the backends of every op share: what they refuse, how native code is called, statuses."""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from otdd import backends
from otdd.ops import checks

# Stands in for the native module, and CPU tensors for CUDA ones, where tests run emulated kernels.
emulated: ModuleType | None = None


def refusals(
    t: Tensor, cuda: str | None = None, triton: str | None = None
) -> dict[str, str | None]:
    """For `backends.choose`: what the backends of an op have against `t`, best first.

    Whether they are there is not looked at here. `cuda` and `triton` are what the op's kernels have
    against anything else. The CPU comes before Triton, whose interpreter takes the same tensors.
    """
    return {
        "cuda": cuda_refusal(t) or cuda,
        "cpu": cpu_refusal(t),
        "triton": triton_refusal(t) or triton,
        "reference": None,
    }


def as_read(C: Tensor, backend: str) -> Tensor:
    """Costs for the solves of a backend: only the CUDA kernels read half precision."""
    return C if backend == "cuda" else checks.widened(C)


def cpu_refusal(t: Tensor) -> str | None:
    return None if t.is_cpu else f"the inputs are on {t.device}, not on the CPU"


def cuda_refusal(t: Tensor) -> str | None:
    if emulated is not None or t.is_cuda:
        return None
    return f"the inputs are on {_device(t)}, not on a CUDA device"


def triton_refusal(t: Tensor) -> str | None:
    if t.is_cpu if backends.INTERPRETED else t.is_cuda:  # ROCm's are `cuda` too
        return None
    where = "on the CPU, where TRITON_INTERPRET=1 runs" if backends.INTERPRETED else "on a GPU"
    return f"the inputs are on {_device(t)}, not {where}"


def _device(t: Tensor) -> str | torch.device:
    """For a message; that of the CPU is not asked for, which takes longer than all else here."""
    return "cpu" if t.is_cpu else t.device


@functools.cache
def triton_kernels(op: str) -> ModuleType:
    """`otdd.ops.<op>.triton`; only a use imports triton, which takes long."""
    return importlib.import_module(f"otdd.ops.{op}.triton")


def on_device(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of `t`."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


# What is computed in; numbers of half precision never come here as if they were these.
_COMPUTED = {torch.float32: "f32", torch.float64: "f64"}


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Callable[..., int]:
    return getattr(backends.native(), f"{name}_{_COMPUTED[dtype]}")


def cuda_kernel(name: str, dtype: torch.dtype) -> Callable[..., int]:
    return getattr(emulated or backends.native(), f"cuda_{name}_{_COMPUTED[dtype]}")


def place(t: Tensor) -> tuple[int, int]:
    """Device and current stream for a kernel over `t`."""
    if emulated is not None:
        of_emulator: tuple[int, int] = emulated.place()
        return of_emulator
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def workspace(t: Tensor, name: str, *sizes: int) -> Tensor:
    """Memory that a kernel wants beside its arguments, uint8."""
    device, _ = place(t)
    bytes_ = cuda_kernel(f"{name}_workspace", t.dtype)(device, *sizes)
    if bytes_ < 0:
        check_cuda(5, name)
    return t.new_empty(bytes_, dtype=torch.uint8)


def check_cuda(status: int, op: str) -> None:
    """Raises for what a CUDA kernel answers but 0; the numbers are those of csrc/cuda/problem.h."""
    if status == 0:
        return
    error = (emulated or backends.native()).cuda_last_error()
    if status == 1:
        raise torch.OutOfMemoryError(f"{op}: {error}")
    raise RuntimeError(f"{op}: CUDA says: {error}")


def flat(batch_dims: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors with one batch dimension, or none as before: what native code takes."""
    if batch_dims <= 1:
        return tensors
    return tuple(None if t is None else t.flatten(0, batch_dims - 1) for t in tensors)


def with_rows(t: Tensor) -> Tensor:
    """`t`, or a copy, with contiguous rows."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


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
