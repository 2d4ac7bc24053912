"""Checks of op arguments: clear errors before any work.

Shapes, dtypes and devices are read from tensor metadata, so they are always checked. Values would
force a GPU to synchronise, so they are checked inside the op on the CPU, and on other devices only
when the environment variable ``OTDD_CHECKS=1`` is set.
"""

import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_HALF = (torch.float16, torch.bfloat16)
_FULL = (torch.float32, torch.float64)
_FLOATING = (*_FULL, *_HALF)
_WHOLE, _REAL = (int, numbers.Integral), (int, float, numbers.Real)  # the usual ones first: fast
# The smallest normal number and the largest one; asking torch each time takes as long as a check.
_BOUNDS = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in _FULL}
_BOUNDS |= dict.fromkeys(_HALF, _BOUNDS[torch.float32])  # as they are computed


def require(condition: bool, name: str, seen: object, accepted: str) -> None:
    """Raises ``ValueError`` naming the argument, the value seen and what is accepted.

    A text with a size in it (not a whole shape) fixes that size where torch.compile follows it, so
    such a text is made only once the condition has failed.
    """
    if not condition:
        raise ValueError(f"{name}: got {seen}; accepted: {accepted}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32 for half precision."""
    return torch.float32 if dtype in _HALF else dtype


def as_float(t: Tensor, name: str) -> Tensor:
    """Half-precision inputs are computed in float32; integer and complex ones are refused.

    Raises:
        TypeError: ``t`` is not a floating-point tensor.
    """
    return widened(floating(t, name))


def widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in _HALF else t


def floating(t: Tensor, name: str) -> Tensor:
    """`t` of its own type, where `as_float` takes it."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}; accepted: torch.Tensor")
    if t.layout is not torch.strided or t.is_nested:
        seen = "a nested tensor" if t.is_nested else f"a tensor of layout {t.layout}"
        raise TypeError(f"{name}: got {seen}; accepted: dense tensors")
    if t.dtype not in _FLOATING:
        raise TypeError(
            f"{name}: got dtype {t.dtype}; accepted: float16, bfloat16, float32, float64"
        )
    return resolved(t)


def resolved(t: Tensor) -> Tensor:
    """`t` with its numbers in memory, which native code reads.

    The imaginary part of a conjugate has there those of the other sign.
    """
    # Traced calls go through torch's dispatcher, which does the same.
    return t if torch.compiler.is_compiling() or not t.is_neg() else t.resolve_neg()


def same_kind(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Raises unless ``t`` has the device and the dtype of ``like``, both widened."""
    if t.dtype != like.dtype and wide(t.dtype) != wide(like.dtype):
        accepted = f"that of {like_name}, {wide(like.dtype)}"
        raise TypeError(f"{name}: got dtype {t.dtype}; accepted: {accepted}")
    if t.device != like.device:
        raise ValueError(
            f"{name}: got device {t.device}; accepted: that of {like_name}, {like.device}"
        )


def values_are_checked(t: Tensor) -> bool:
    """Whether values may be looked at here: it is cheap, or asked for, and they are there."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if t.is_meta:
        return False
    return t.device.type == "cpu" or os.environ.get("OTDD_CHECKS") == "1"


def finite(t: Tensor, name: str) -> None:
    """Raises ``ValueError`` with the first offending index if ``t`` holds NaN or inf."""
    if math.isfinite(_one(t).sum().item()):  # NaN and inf survive in a sum
        return
    bad = ~torch.isfinite(t)
    if bool(bad.any()):  # else the sum itself overflowed
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}: got {t[where].item()} at index {where} of shape {tuple(t.shape)} "
            f"({int(bad.sum())} non-finite in all); accepted: finite numbers"
        )


def problem(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    g: Tensor | None,
    sinkd: bool,
) -> None:
    """Raises for the first value of a solve's arguments that is not accepted."""
    finite(C, "C")
    weights(a, "a", binary=sinkd)
    weights(b, "b", binary=sinkd)
    positive(eps, "eps", C.dtype)
    for rho, name in ((rho_a, "rho_a"), (rho_b, "rho_b")):
        if rho is not None:
            positive(rho, name, C.dtype, or_inf=True)
    if g is not None:
        finite(g, "init")


def weights(w: Tensor | None, name: str, binary: bool = False) -> None:
    """Raises unless every row of ``w`` ``(..., N)`` is non-negative and has a mass.

    That is a finite sum, and a weight that is a normal number: the native code takes others for 0.
    """
    if w is None or w.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(_one(w)))  # NaN survives
    if not (math.isfinite(low) and math.isfinite(high)):
        finite(w, name)
    require(low >= 0, name, f"a negative weight, {low}", "weights >= 0")
    tiny = torch.finfo(w.dtype).tiny
    if low < tiny and not bool((w.amax(-1) >= tiny).all()):
        top = w.amax(-1).min().item()
        seen = (
            f"weights of at most {top:.3g} in one problem"
            if top
            else "only zero weights in one problem"
        )
        require(False, name, seen, f"one weight > 0, and at least {tiny:.3g}")
    if high > torch.finfo(w.dtype).max / w.shape[-1]:
        mass = w.double().sum(-1)
        accepted = "weights whose sum is a finite number"
        require(bool(mass.isfinite().all()), name, f"weights of up to {high:.3g}", accepted)
    if binary and not bool(((w == 0) | (w == 1)).all()):
        accepted = "0 or 1 (a mask) with marginals='sinkd'"
        require(False, name, "weights other than 0 and 1", accepted)


def _one(t: Tensor) -> Tensor:
    """A single entry of a tensor that is one number expanded; else the tensor itself."""
    expanded = t.numel() > 0 and not any(t.stride())
    return t[(0,) * t.dim()] if expanded else t


def positive(value: float | Tensor, name: str, dtype: torch.dtype, *, or_inf: bool = False) -> None:
    """Raises unless `value` is > 0 and a normal number of `dtype`, widened (a tensor: each)."""
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return
        seen = [bound.item() for bound in torch.aminmax(_one(value))]  # NaN survives
    elif _is_number(value, _REAL):
        # A NumPy number would take the bounds to its own type, where they overflow.
        seen = [value if type(value) in _REAL else float(value)]
    else:
        raise TypeError(f"{name}: got {type(value).__name__}; accepted: a number or a torch.Tensor")
    lowest, highest = _BOUNDS[dtype]
    highest = math.inf if or_inf else highest
    for number in seen:
        if not lowest <= number <= highest:
            accepted = f"numbers > 0 within {wide(dtype)}, {lowest:.3g} to {highest:.3g}"
            require(False, name, number, accepted)


def _is_number(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def number(
    value: float, name: str, dtype: torch.dtype = torch.float32, *, or_inf: bool = False
) -> None:
    """Raises unless `value` is a number > 0 of `dtype`; a tensor is none."""
    if not _is_number(value, _REAL):
        raise TypeError(f"{name}: got {type(value).__name__}; accepted: a number")
    positive(value, name, dtype, or_inf=or_inf)


def solver_options(
    max_iter: int, tol: float, **choices: tuple[object, tuple[str | None, ...]]
) -> None:
    """Raises unless the options of a solve are accepted; choices are name=(seen, accepted)."""
    for name, (seen, accepted) in choices.items():
        if seen not in accepted:
            require(False, name, repr(seen), ", ".join(map(str, accepted)))
    whole = _is_number(max_iter, _WHOLE)
    if not (whole and 1 <= max_iter < 2**31):  # Dynamo has no repr of a number it follows
        require(False, "max_iter", repr(max_iter), "a whole number >= 1, and below 2^31")
    real = _is_number(tol, _REAL)
    if not (real and 0 <= tol < math.inf):
        require(False, "tol", repr(tol), "a finite number >= 0")


def outside_autocast(body: Callable[P, R]) -> Callable[P, R]:
    """An op's body, or its backward, that keeps its precision inside ``torch.autocast``."""

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled():
            return body(*args, **kwargs)
        device = next((t.device.type for t in args if isinstance(t, Tensor)), "cpu")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return body(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return body(*args, **kwargs)

    return run


def described(result: Any) -> str:
    """A result in a line: the shapes and types of its tensors, and its settings."""
    shown = []
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if field.name.startswith("_"):
            continue
        if isinstance(value, Tensor | np.ndarray | np.generic):
            value = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        elif isinstance(value, tuple):
            kinds = {Tensor: "tensors", np.ndarray: "arrays"}
            value = f"{len(value)} {kinds.get(type(value[0]), 'results')}"
        shown.append(f"{field.name}={value}")
    return f"{type(result).__name__}({', '.join(shown)})"
