"""What `otdd env` tells: versions, backends and why some are missing, the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

from otdd import __version__

PACKAGES = (
    "torch",
    "numpy",
    "torchvision",
    "triton",
    "diffusers",
    "timm",
    "accelerate",
    "safetensors",
    "scikit-learn",
    "scikit-image",
    "POT",
    "geomloss",
)


def package_versions() -> dict[str, str | None]:
    """Return the version of every package otdd can use, None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Return everything `otdd env` prints, ready for JSON. A broken torch is told, not raised."""
    info: dict[str, Any] = {
        "otdd": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "cpu": {"cores": _cores()},
    }
    try:
        import torch

        from otdd import backends
    except (ImportError, OSError) as error:
        return info | {"error": f"torch does not load: {error}"}
    info["backends"] = backends.available()
    info["cpu"] |= {"threads": torch.get_num_threads()}
    variables = ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OTDD_BACKEND", "OTDD_CPU_ISA"]
    variables += ["TRITON_INTERPRET"]
    info["variables"] = {name: os.environ[name] for name in variables if name in os.environ}
    try:
        native = backends.native()
    except backends.BackendError as error:
        return info | {"native": None, "native_reason": str(error)}
    info["native"] = native.build_info()
    info["cpu"]["isa"] = native.cpu_isa()
    if hasattr(native, "cuda_devices"):
        info["cuda"] = native.cuda_devices()
    return info


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def report(info: dict[str, Any]) -> str:
    """Return `environment()` as text for a terminal."""
    lines = [f"otdd {info['otdd']}, Python {info['python']}, {info['platform']}"]
    if "error" in info:
        lines.append(info["error"])
    if "backends" in info:
        lines += ["", "Backends"]
        lines += [f"  {name:<10} {reason or 'yes'}" for name, reason in info["backends"].items()]
        cpu = info["cpu"]
        threads = f"{cpu['threads']} threads on {cpu['cores']} cores"
        lines += ["", f"CPU      {threads}, instruction set {cpu.get('isa', 'unknown')}"]
        lines += [f"         {name}={value}" for name, value in info["variables"].items()]
    if native := info.get("native"):
        built = f"CUDA {native['cuda']} for {native['cuda_archs']}"
        built = built if native["cuda"] else f"no CUDA ({native['cuda_reason']})"
        openmp = "OpenMP" if native["openmp"] == "yes" else "no OpenMP"
        lines.append(f"Native   {native['compiler']}; CPU {native['isas']}; {openmp}; {built}")
    if cuda := info.get("cuda"):
        lines.append(
            f"CUDA     driver {_cuda_version(cuda['driver'])}, "
            f"runtime {_cuda_version(cuda['runtime'])}"
        )
        lines += [
            f"         {index}: {device['name']}, compute capability "
            f"{'.'.join(map(str, device['capability']))}, {device['memory'] / 2**30:.0f} GiB"
            for index, device in enumerate(cuda["devices"])
        ]
        lines += [f"         {cuda['error']}"] if cuda["error"] else []
    lines += ["", "Packages"]
    lines += [f"  {name:<13} {version or '-'}" for name, version in info["packages"].items()]
    return "\n".join(lines)


def show(as_json: bool = False) -> None:
    """Print the environment."""
    info = environment()
    sys.stdout.write((json.dumps(info, indent=2) if as_json else report(info)) + "\n")
