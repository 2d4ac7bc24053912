"""Arguments of the drop-ins: arrays in and out, options without a meaning here, names in errors."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from otdd.ops.checks import require

Array: TypeAlias = Tensor | np.ndarray | list[Any] | tuple[Any, ...]


def tensors(**arrays: Array | None) -> tuple[list[Tensor | None], Callable[[Tensor], Any]]:
    """Arrays as tensors, and what turns a result into their kind.

    Lists become arrays of the kind of the others, float64 without any; empty vectors become None. A
    NumPy result of shape () is a scalar.

    Raises:
        TypeError: Neither tensor, array nor list, tensors mixed with arrays, or no numbers.
    """
    seen = {name: t for name, t in arrays.items() if isinstance(t, Tensor | np.ndarray)}
    like = next(iter(seen.values()), np.zeros(0))
    kind = Tensor if isinstance(like, Tensor) else np.ndarray
    accepted = f"{'torch.Tensor' if kind is Tensor else 'numpy.ndarray'} as the others, or a list"
    for name, array in arrays.items():
        # A matrix keeps two dimensions and a mask would be lost.
        fits = not isinstance(array, np.matrix | np.ma.MaskedArray)
        if array is not None and not (fits and isinstance(array, kind | list | tuple)):
            raise TypeError(f"{name}: got {type(array).__name__}; accepted: {accepted}")
    made = {name: _tensor(t, name, like) for name, t in seen.items()}  # first: lists follow them
    made |= {name: _tensor(t, name, like) for name, t in arrays.items() if name not in seen}
    return [made[name] for name in arrays], _as_is if kind is Tensor else _numpy


def _tensor(array: Array | None, name: str, like: Tensor | np.ndarray) -> Tensor | None:
    if array is None or (isinstance(array, list | tuple) and not array):
        return None
    if isinstance(array, Tensor | np.ndarray) and array.ndim == 1 and len(array) == 0:
        return None
    if isinstance(array, Tensor):
        return array
    if not isinstance(array, np.ndarray):
        try:
            if isinstance(like, Tensor):
                return torch.tensor(array, dtype=like.dtype, device=like.device)
            array = np.asarray(array, like.dtype)
        except (RuntimeError, TypeError, ValueError):
            seen = f"a {type(array).__name__} that is no array of numbers"
            accepted = "numbers, in rows of one length"
            raise TypeError(f"{name}: got {seen}; accepted: {accepted}") from None
    native = array.dtype.newbyteorder("=")
    contiguous = np.ascontiguousarray(array, native).reshape(array.shape)
    try:
        return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())
    except TypeError:
        accepted = "float16, float32, float64"
        raise TypeError(f"{name}: got dtype {array.dtype}; accepted: {accepted}") from None


def _as_is(t: Tensor) -> Tensor:
    return t


def _numpy(t: Tensor) -> np.ndarray | np.generic:
    return t.detach().numpy()[()]


def without_meaning(where: str, **options: tuple[object, object]) -> None:
    """Raises ``ValueError`` for an option, name=(seen, default), that is not at its default."""
    for name, (seen, default) in options.items():
        same = seen is default or (type(seen) is type(default) and seen == default)
        kind, shape = type(seen).__name__, getattr(seen, "shape", None)
        said = repr(seen) if shape is None else f"{kind} of shape {tuple(shape)}"
        require(same, name, said, f"{default!r}: it has no meaning for {where}")


@contextmanager
def named(**names: str) -> Iterator[None]:
    """Errors of the ops raised inside name the caller's arguments: op's name=caller's name.

    At the start, and where the accepted is "that of" another argument.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        for op, caller in names.items():
            rest = re.sub(rf"\bthat of {op}\b", f"that of {caller}", rest)
        said = names.get(name, name) + colon + rest
        if said == str(error):
            raise
        raise type(error)(said) from None
