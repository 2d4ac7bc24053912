"""Helper of test_interruption: runs a tiny configuration, killed at chosen points, then resumed.

Everything heavy is imported once; every run is a fork of this process.
"""

import json
import os
import signal
import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401
import tiny
import torch

torch.set_num_threads(1)

from otdd.distill import baselines, evaluate, relabel, sample  # noqa: E402, F401
from otdd.distill.data import load_data  # noqa: E402
from otdd.distill.fit import FitConfig, fit  # noqa: E402
from otdd.distill.pipeline import run  # noqa: E402
from otdd.distill.settings import resolve  # noqa: E402

SETTINGS = {
    "ipc": 2,
    "seeds": 1,
    "sets": ["otg", "unguided", "kmeans"],
    "sample": {"steps": 2, "batch_classes": 4, "guidance": {"reference_size": 8}},
    "relabel": {"teacher_epochs": 1},
    "train": {"epochs": 3, "checkpoint_every": 1, "losses": ["ce", "otm"]},
}


def forked(out: Path, kill_at: int | None, sign: signal.Signals) -> tuple[int, int]:
    """Run in a child, sent `sign` at its n-th flush to the disk; exit status and flushes."""
    count_file = out.with_suffix(".count")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            flushes = 0
            flush = os.fsync

            def counted(handle: int) -> None:
                nonlocal flushes
                flushes += 1
                if flushes == kill_at:
                    os.kill(os.getpid(), sign)
                flush(handle)

            os.fsync = counted
            generator, data = out.parent / "generator.safetensors", out.parent / "digits.npz"
            own = {"out": str(out), "generator": str(generator), "data": str(data)}
            run(resolve({**SETTINGS, **own}))
            count_file.write_text(str(flushes))
            code = 0
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return status, int(count_file.read_text()) if count_file.exists() else 0


def main(root: Path) -> None:
    config = FitConfig(width=32, layers=1, patch_size=4, steps=2)
    fit(load_data(tiny.few_digits(root)), config, root / "generator.safetensors")
    status, total = forked(root / "whole", None, signal.SIGKILL)
    assert status == 0
    ways = {}
    for part, sign in [(0.02, 9), (0.1, 9), (0.3, 9), (0.5, 2), (0.8, 2), (0.97, 9)]:
        out, sign = root / f"killed-{part}", signal.Signals(sign)
        first, _ = forked(out, max(1, round(part * total)), sign)
        ended = os.WTERMSIG(first) if os.WIFSIGNALED(first) else os.WEXITSTATUS(first)
        second, _ = forked(out, None, sign)
        ways[out.name] = [ended, second]
    # Killed again and again, a few files further each time.
    chain, deaths = root / "killed-often", 0
    while forked(chain, 60, signal.SIGKILL)[0] != 0:
        deaths += 1
        assert deaths < 100
    ways[chain.name] = [deaths, 0]
    (root / "ways.json").write_text(json.dumps(ways))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
