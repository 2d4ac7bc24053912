"""Helper of test_fit: a training that is killed at a flush to the disk, in a process of its own.

Arguments: the file to write, the signal, and the flush at which it comes.
"""

import os
import signal
import sys
from pathlib import Path

import tiny
import torch

from otdd.distill.fit import FitConfig, fit

CONFIG = FitConfig(width=32, layers=1, steps=6, batch=8, checkpoint_every=2, grid_every=3)


def main(out: Path, sign: signal.Signals, at: int) -> None:
    torch.set_num_threads(1)
    flush, seen = os.fsync, 0

    def counted(handle: int) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), sign)
        flush(handle)

    os.fsync = counted
    fit(tiny.images(), CONFIG, out)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), signal.Signals(int(sys.argv[2])), int(sys.argv[3]))
    except KeyboardInterrupt as stop:
        sys.exit(f"stopped: {stop}")
