"""The lock of a folder. The kernel gives it back when its holder ends, however that happens.

What is written in the file only tells a person who holds it; a file that was left behind, with the
number of a process that is gone, used again or of another machine, locks nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which is removed at the end."""
    handle = acquire(path)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


class Held(Exception):
    """Another process holds the lock; the text says which."""


def acquire(path: Path) -> int | None:
    """Take the lock of this file.

    Returns:
        The handle that holds it, or None where the system has no such locks: atomic writes alone
        keep a folder sound there.

    Raises:
        Held: by another process.
        OSError: the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace")
        os.close(handle)
        raise Held(" ".join(holder.split()) or "unknown") from None
    except OSError:  # file systems without locks
        os.close(handle)
        return None
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle
