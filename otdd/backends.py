"""Which backends can run on this machine, why others cannot, and the choice among them.

A backend is how an op runs: `cuda` and `cpu` are native code, `triton` is compiled from Python for
the GPU at hand and `reference` is plain PyTorch. An op names those it has, best first, each with
its own reason to refuse these inputs (None if it has none), and gets back the name to use::

    name = choose("sinkhorn", {"cpu": refusal_or_None, "reference": None}, backend)

The environment variable OTDD_BACKEND stands in for a `backend` argument that is not given. With
TRITON_INTERPRET=1, set before otdd is imported, `triton` runs on the CPU, step by step in Python:
slow, to check its kernels where there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch  # before the native module, so that both share torch's OpenMP threads

NAMES = ("cuda", "cpu", "triton", "reference")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class BackendError(RuntimeError):
    """The backend asked for cannot run this op here; the message says why."""


def native() -> ModuleType:
    """Return `otdd._native`.

    Raises:
        BackendError: The native module is not there or does not load.
    """
    if importlib.util.find_spec("otdd._native") is None:
        raise BackendError(
            f"{Path(__file__).parent} has no native module: otdd was installed with OTDD_NATIVE=0, "
            "or its sources are used without being built (pip install again)"
        )
    try:
        return importlib.import_module("otdd._native")
    except ImportError as error:
        raise BackendError(f"the native module does not load: {error}") from error


def _why_not_cpu() -> str | None:
    try:
        native()
    except BackendError as error:
        return str(error)
    return None


def _why_not_cuda() -> str | None:
    try:
        module = native()
    except BackendError:
        return "no native module"
    if not hasattr(module, "cuda_devices"):
        return f"built without CUDA ({module.build_info()['cuda_reason']})"
    found = module.cuda_devices()
    if not found["devices"]:
        return f"no CUDA device ({found['error'] or 'none found'})"
    return None


def _why_not_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # Asked of NVML or amdsmi where there is one, which leaves the GPU alone.
    if not INTERPRETED and torch.cuda.device_count() == 0:
        return "no GPU that torch sees (TRITON_INTERPRET=1 checks the kernels on the CPU, slowly)"
    return None


# Found out on import, so that torch.compile can trace `choose` as a look-up.
_REASONS: dict[str, str | None] = {
    "cuda": _why_not_cuda(),
    "cpu": _why_not_cpu(),
    "triton": _why_not_triton(),
    "reference": None,
}


def available() -> dict[str, str | None]:
    """Return every backend with None if it can run on this machine, else the reason why not."""
    return dict(_REASONS)


def choose(op: str, candidates: Mapping[str, str | None], backend: str | None = None) -> str:
    """Choose the backend that runs an op.

    Args:
        op: Name of the op, for messages.
        candidates: Backends the op has, best first, each with the op's reason to refuse these
            inputs or None. What `available` says is added here.
        backend: Backend asked for; None stands for OTDD_BACKEND if that is set, else for the first
            candidate without a reason to refuse.

    Raises:
        ValueError: `backend` is no backend at all.
        BackendError: `backend`, or every candidate, has a reason to refuse.
    """
    wanted = backend if backend is not None else os.environ.get("OTDD_BACKEND") or None
    if wanted is None:
        for name, refusal in candidates.items():
            if refusal is None and _REASONS[name] is None:
                return name
    else:
        source = "backend" if backend is not None else "OTDD_BACKEND"
        if wanted not in NAMES:
            raise ValueError(f"unknown {source}={wanted!r}; choose from {', '.join(NAMES)}")
        missing = None if wanted in candidates else "the op has no such backend"
        reason = _REASONS[wanted] or missing or candidates[wanted]
        if reason is not None:
            raise BackendError(f"{op}: {source}={wanted!r} cannot be used: {reason}")
        return wanted
    told = "; ".join(f"{name}: {_REASONS[name] or r}" for name, r in candidates.items())
    raise BackendError(f"{op}: no backend can run this ({told})")
