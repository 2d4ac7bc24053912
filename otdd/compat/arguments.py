"""Arguments of the drop-ins: arrays in and out, options without a meaning here, names in errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from otdd.ops.checks import require

Array: TypeAlias = Tensor | np.ndarray | list | tuple


def tensors(**arrays: Array | None) -> tuple[list[Tensor | None], Callable[[Tensor], Any]]:
    """Arrays as tensors, and what turns a result into their kind.

    Lists become arrays of the kind of the others, float64 without any; empty vectors become None. A
    NumPy result of shape () is a scalar.

    Raises:
        TypeError: Neither tensor, array nor list, or tensors mixed with arrays.
    """
    seen = {name: t for name, t in arrays.items() if isinstance(t, Tensor | np.ndarray)}
    like = next(iter(seen.values()), np.zeros(0))
    for name, array in arrays.items():
        if array is not None and not isinstance(array, type(like) | list | tuple):
            kind = "torch.Tensor" if isinstance(like, Tensor) else "numpy.ndarray"
            accepted = f"{kind} as the others, or a list"
            raise TypeError(f"{name}: got {type(array).__name__}; accepted: {accepted}")
    return [_tensor(t, like) for t in arrays.values()], _as_is if torch.is_tensor(like) else _numpy


def _tensor(array: Array | None, like: Tensor | np.ndarray) -> Tensor | None:
    if array is None or (np.ndim(array) == 1 and len(array) == 0):
        return None
    if isinstance(array, Tensor):
        return array
    if isinstance(like, Tensor):
        return torch.tensor(array, dtype=like.dtype, device=like.device)
    array = np.asarray(array, None if isinstance(array, np.ndarray) else like.dtype)
    native = array.dtype.newbyteorder("=")
    contiguous = np.ascontiguousarray(array, native).reshape(array.shape)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())


def _as_is(t: Tensor) -> Tensor:
    return t


def _numpy(t: Tensor) -> np.ndarray | np.generic:
    return t.detach().numpy()[()]


def without_meaning(where: str, **options: tuple[object, object]) -> None:
    """Raises ``ValueError`` for an option, name=(seen, default), that is not at its default."""
    for name, (seen, default) in options.items():
        same = seen is default or (type(seen) is type(default) and seen == default)
        require(same, name, repr(seen), f"{default!r}: it has no meaning for {where}")


@contextmanager
def named(**names: str) -> Iterator[None]:
    """Errors of the ops raised inside name the caller's arguments: op's name=caller's name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if name not in names:
            raise
        raise type(error)(names[name] + colon + rest) from None
