"""How many images one call of the denoiser can take: tried out, not guessed.

The denoiser is run on 1, 2, 4, ... images and its peak memory read, until the next would take more
than the budget, or long. Memory grows linearly in the images, so the last two peaks tell how many
fit. The peak is that of torch's allocator on a GPU, and that of the process on the CPU, where Linux
can set it back.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from otdd.distill.config import ConfigError, SampleConfig

if TYPE_CHECKING:
    from otdd.distill.generator import Generator

GIB = 1 << 30
FREE_SHARE = 0.8  # of the free memory; the rest is for guidance, decoding and fragmentation
LONG = 5.0  # seconds of one trial, after which no larger one is made
LIBC = ctypes.CDLL(None)
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def find_batch(generator: Generator, config: SampleConfig, most: int, *, grad: bool) -> int:
    """The largest number of images, up to `most`, whose denoising fits the budget.

    Args:
        generator: on the device, in the precision of the run.
        config: `memory` (GiB; None for a share of what is free) and `guidance_scale` are used.
        most: images in flight; more are not tried.
        grad: whether gradients go through the denoiser.

    Raises:
        ConfigError: not even one image fits, or this system does not tell the peak.
    """
    device = generator.device
    if device.type == "cpu" and not (CLEAR.exists() and hasattr(LIBC, "malloc_trim")):
        raise ConfigError("sample.batch_images: 'auto' needs a GPU, or Linux with glibc")
    budget = free_bytes(device) * FREE_SHARE if config.memory is None else config.memory * GIB
    tried, count = [(0, 0.0)], 1
    while True:
        start = time.monotonic()
        need = trial_bytes(generator, count, config.guidance_scale, grad=grad)
        if need > budget and count == 1:
            raise ConfigError(
                f"sample.memory: one image takes {need / GIB:.3f} GiB, of {budget / GIB:.3f} GiB "
                f"that are {'free' if config.memory is None else 'given'}"
            )
        tried.append((count, need))
        if count == most or time.monotonic() - start > LONG or 2 * need > budget:
            break
        count = min(2 * count, most)
    fewer, less = tried[-2]
    each = max((need - less) / (count - fewer), 1.0)
    return max(1, min(most, count + int((budget - need) // each)))


def trial_bytes(generator: Generator, count: int, guidance_scale: float, *, grad: bool) -> float:
    """Bytes that denoising `count` images takes at its peak, above what is taken already."""
    device = generator.device
    z = torch.zeros(count, *generator.latent_shape, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    before = _reset_peak(device)
    with torch.set_grad_enabled(grad):
        z.requires_grad_(grad)
        out, _ = generator.denoiser.predict(z, 1, labels, guidance_scale)
        if grad:
            torch.autograd.grad(out.float().sum(), z)
    return max(0.0, _peak(device) - before)


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a GPU, or for this process on the machine or in its container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(most) - int(used.read_text())))
    return float(free)


def _reset_peak(device: torch.device) -> float:
    """Sets the peak back; returns what is in use, bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    LIBC.malloc_trim(0)  # what was freed before would hide what is taken now
    CLEAR.write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next(1024.0 * int(words[1]) for words in lines if words[0] == f"{name}:")
