"""Freed memory of the process, for the commands of `otdd`."""

from __future__ import annotations

import ctypes
import os
import sys

OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt in <malloc.h>
LARGE = 1 << 30  # bytes
ALLOWED = 32 << 20  # by older glibc for blocks that have a mapping of their own


def keep_freed() -> bool:
    """Freed blocks stay in the process to be used again; returns whether that was asked for.

    By default glibc hands large ones back to the system, so that each step of a student on the CPU
    has the pages of its activations mapped and cleared anew: a quarter of its time (NOTES, "What
    memory costs a student"). It is left as it is where the user has chosen (`OF_THE_USER`), and
    without glibc.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in OF_THE_USER):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return any(libc.mallopt(MMAP_THRESHOLD, size) for size in (LARGE, ALLOWED)) and bool(
        libc.mallopt(TRIM_THRESHOLD, LARGE)
    )
