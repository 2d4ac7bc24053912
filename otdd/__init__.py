"""Entropic optimal transport for PyTorch, and generative dataset distillation built on it.

`otdd.ops` holds the differentiable operations, `otdd.losses` the modules made of them and
`otdd.distill` the pipeline. They load on first use, so that `import otdd` stays quick.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otdd import distill, losses, ops

__version__ = "0.1.0"
__all__ = ["__version__", "distill", "losses", "ops"]

_LAZY = ("distill", "losses", "ops")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
