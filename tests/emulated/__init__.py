"""The CUDA kernels on the CPU: compiled with csrc/cuda/emulator.h instead of by nvcc."""

import functools
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ORDERS = {"forward": 0, "backward": 1, "random": 2}
FLAGS = "-O1 -std=c++17 -shared -fPIC -fvisibility=hidden -DOTDD_EMULATED -Wall -Werror"


@functools.cache
def module() -> ModuleType:
    """The module, compiled at the first call; kept in a temporary folder if sources are unchanged.

    Raises:
        RuntimeError: It does not compile; the message is the compiler's.
    """
    import pybind11

    sources = sorted(CSRC.rglob("*.h")) + sorted(CSRC.rglob("*.cu")) + [HERE / "module.cpp"]
    newest = max(source.stat().st_mtime_ns for source in sources)
    folder = Path(tempfile.gettempdir(), f"otdd_emulated_{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"otdd_emulated_{sys.implementation.cache_tag}_{newest}.so"
    if not target.exists():
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        folders = CSRC, sysconfig.get_path("include"), pybind11.get_include()
        flags = [*FLAGS.split(), *(f"-I{folder}" for folder in folders)]
        partial = target.with_suffix(f".{os.getpid()}")
        command = [*compiler, *flags, str(HERE / "module.cpp"), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-20000:]}")
        partial.rename(target)
    spec = importlib.util.spec_from_file_location("otdd_emulated", target)
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    return built


def in_every_order(module: ModuleType, run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What `run` gives, which must be the same to the last bit whichever thread goes first."""
    results = []
    for order in ORDERS.values():
        module.set_order(order)
        results.append(run())
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    return results[0]
