"""Entropic optimal transport for PyTorch, and generative dataset distillation built on it.

`otdd.ops` holds the differentiable operations, `otdd.losses` the modules made of them and
`otdd.distill` the pipeline; `otdd.load` reads a distilled set. They load on first use, so that
`import otdd` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otdd import distill, losses, ops
    from otdd.distill.artefact import load

__version__ = "0.1.0"
__all__ = ["__version__", "distill", "load", "losses", "ops"]

_LAZY = ("distill", "losses", "ops")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "load":
        return importlib.import_module(f"{__name__}.distill.artefact").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
