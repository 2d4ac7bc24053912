"""Helper of test_workers: several processes sample and train, some killed on the way.

Everything heavy is imported once; every process of a run is a fork of this one.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure  # noqa: F401
import tiny
import torch

torch.set_num_threads(1)

from otdd.distill import baselines, evaluate, relabel, sample  # noqa: E402, F401
from otdd.distill.data import load_data  # noqa: E402
from otdd.distill.fit import FitConfig, fit  # noqa: E402
from otdd.distill.pipeline import STAGES, run_stages  # noqa: E402
from otdd.distill.settings import merge, resolve  # noqa: E402

SETTINGS = {
    "ipc": 2,
    "sets": ["otg", "random", "unguided"],
    "sample": {
        "steps": 2,
        "batch_classes": 2,
        "judge": "latents",
        "guidance": {"reference_size": 8},
    },
}
GROUPS = "sets/otg/groups"
WHOLE_RUN = {
    "sets": ["random", "kmeans"],
    "seeds": 2,
    "relabel": {"teacher_epochs": 1},
    "train": {"epochs": 3, "checkpoint_every": 1, "losses": ["ce", "kl"]},
}


JUDGED = {"sets": ["otg"], "sample": {"judge": "teachers"}, "relabel": {"teacher_epochs": 1}}


def worker(
    out: Path, rank: int, size: int, port: int, kill_at: int | None, given: dict, stages: Sequence
) -> int:
    """Fork one process of a run, killed at its n-th flush to the disk; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        flushes, flush = 0, os.fsync

        def counted(handle: int) -> None:
            nonlocal flushes
            flushes += 1
            if flushes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(handle)

        os.fsync = counted
        if size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        generator, data = out.parent / "generator.safetensors", out.parent / "digits.npz"
        own = {"out": str(out), "generator": str(generator), "data": str(data)}
        run_stages(resolve(merge(merge(SETTINGS, own), given)), stages)
        code = 0
    except BaseException as error:
        out.with_name(f"{out.name}-{rank}.error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def run(
    out: Path,
    size: int,
    kill: tuple[int, int] | None = None,
    given: dict | None = None,
    stages: Sequence[str] = ("sample",),
) -> list[int]:
    """Run by `size` processes; `kill` is a rank and its flush. Exit codes, -9 where killed.

    `given` are changes of the settings.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kills = dict([kill] if kill else [])
    given = given or {}
    children = [
        worker(out, rank, size, port, kills.get(rank), given, stages) for rank in range(size)
    ]
    codes, deadline = dict.fromkeys(children), time.monotonic() + 60
    while None in codes.values() and time.monotonic() < deadline:
        for child in [c for c, code in codes.items() if code is None]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in [c for c, code in codes.items() if code is None]:  # it hangs: that is a failure
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        codes[child] = 99
    return list(codes.values())


def main(root: Path) -> None:
    config = FitConfig(width=32, layers=1, patch_size=4, steps=2)
    fit(load_data(tiny.few_digits(root)), config, root / "generator.safetensors")
    ways = {"one": [run(root / "one", 1)]}
    for size in (2, 3):
        ways[f"by-{size}"] = [run(root / f"by-{size}", size)]
    # Flush 3 of the second process is in its second group; flush 14 of the first, which also opens
    # the folder and lists its hashes, is in one of its own.
    for name, kill, then in (("lost", (1, 3), 2), ("alone", (1, 3), 1), ("head", (0, 14), 3)):
        out = root / name
        ways[name] = [run(out, 2, kill)]
        kept = sorted(p.name for p in (out / GROUPS).glob("0*"))
        (root / f"{name}.json").write_text(json.dumps(kept))
        ways[name].append(run(out, then))
    for size in (1, 3):
        ways[f"judged-{size}"] = [run(root / f"judged-{size}", size, given=JUDGED)]
    live = merge(WHOLE_RUN, {"relabel": {"store_labels": False}})
    for name, settings in (("stored", WHOLE_RUN), ("live", live)):
        for size in (1, 3):
            out = root / f"{name}-{size}"
            ways[out.name] = [run(out, size, None, settings, STAGES)]
    # The second process dies with its second student: two flushes a file, three files before that.
    out = root / "stored-lost"
    ways[out.name] = [run(out, 2, kill, WHOLE_RUN, STAGES) for kill in ((1, 14), None)]
    (root / "ways.json").write_text(json.dumps(ways))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
