"""Tile sizes measured on a device, kept on disk. Without them tiles go by registers alone.

    python -m otdd.ops.points.tuning    # on a GPU, once for each kind of it

Nothing is tuned in passing: a first call takes no longer than its kernels take to compile, and
results do not depend on what was timed when. The file is `tiles.json` in OTDD_CACHE, by default in
the user's cache folder; deleting it forgets everything.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from otdd.ops.points.reference import Clouds

SIZES = ("BLOCK_N", "BLOCK_M", "num_warps", "num_stages")
CANDIDATES = (
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (64, 64, 4, 3),
    (64, 128, 8, 2),
    (128, 64, 8, 2),
    (128, 128, 8, 2),
    (32, 64, 4, 2),
)
_forced: dict[str, int] | None = None


def kinds() -> dict[str, tuple[int, int, str]]:
    """Points, features and precision of what is timed: each way that this GPU makes costs."""
    products = {"product tf32x3": (8192, 32, "highest"), "product tf32": (8192, 64, "high")}
    if torch.version.hip is not None:
        products = {"product ieee": (8192, 32, "highest")}
    products["product bf16"] = (8192, 64, "medium")
    return {"differences": (8192, 3, "highest"), **products, "stored": (8192, 512, "highest")}


def cache() -> Path:
    """Where measured sizes are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("OTDD_CACHE") or Path(home) / "otdd") / "tiles.json"


def chosen(device: torch.device, dtype: torch.dtype, kind: str) -> dict[str, int]:
    """Sizes measured for a kind of costs on such a device; empty if there are none."""
    if _forced is not None:
        return _forced
    if device.type != "cuda" or dtype != torch.float32:
        return {}
    return _kept(torch.cuda.get_device_name(device)).get(kind, {})


@functools.cache
def _kept(name: str) -> dict[str, dict[str, int]]:
    path = cache()
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text()).get(name, {})
        sizes = {kind: {size: int(found[kind][size]) for size in SIZES} for kind in found}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} cannot be read and is left out: {error!r}", stacklevel=2)
        return {}
    return sizes


@contextlib.contextmanager
def forced(sizes: dict[str, int]) -> Iterator[None]:
    """Tiles of these sizes, whatever was measured."""
    global _forced
    before, _forced = _forced, sizes
    try:
        yield
    finally:
        _forced = before


def tune(name: str, timed: Callable[[str, dict[str, int]], float]) -> dict[str, dict[str, int]]:
    """The fastest sizes of each kind, put down for devices of this name.

    Args:
        name: Of the device.
        timed: Time of a kind with sizes; raises where the sizes do not fit the device.
    """
    best = {}
    for kind in kinds():
        times = {}
        for candidate in CANDIDATES:
            try:
                times[candidate] = timed(kind, dict(zip(SIZES, candidate, strict=True)))
            except Exception as error:  # of the compiler or the driver: these sizes are too large
                print(f"{kind} {candidate}: {type(error).__name__}", file=sys.stderr)
                continue
            print(f"{kind} {candidate}: {times[candidate]:.3f} ms", file=sys.stderr)
        if times:
            best[kind] = dict(zip(SIZES, min(times, key=times.__getitem__), strict=True))
    path = cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known | {name: best}, indent=1) + "\n")
    partial.replace(path)
    _kept.cache_clear()
    return best


def on_gpu(kind: str, sizes: dict[str, int]) -> float:
    """Milliseconds of 20 iterations on the current device."""
    from triton.testing import do_bench

    from otdd.ops.points.triton import points_triton

    N, D, precision = kinds()[kind]
    x = torch.randn(1, N, D, device="cuda")
    a, eps = x.new_full((1, N), 1 / N), x.new_full((1,), 1.0, dtype=torch.float64)
    hard = torch.full_like(eps, torch.inf)
    p = Clouds(x, x.flip(1), a, a, eps, hard, hard, None, None, None)
    with forced(sizes):
        run = functools.partial(points_triton, p, 0 * a, "sqeuclidean", 20, 0.0, precision)
        return float(do_bench(run, warmup=20, rep=60))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no GPU that torch sees: there is nothing to measure")
    print(json.dumps(tune(torch.cuda.get_device_name(), on_gpu), indent=1))
    print(f"kept in {cache()}")
