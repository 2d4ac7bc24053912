"""A tiny run of every stage by the command, in forks of this process, with faults put into it.

Helper of test_faults and of benchmarks/faults.py. Everything heavy is imported once.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from otdd import cli
from otdd.distill import relabel

CLASSES = ("cats & dogs", "été")
FIT = "--width 32 --layers 1 --patch-size 4 --steps 3 --batch 4 --checkpoint-every 1".split()
SURROGATE = "--arch convnet --epochs 2 --checkpoints 2 --batch 8".split()
RUN = [
    *("--data photos --ipc 2 --seeds 1 --sets otg unguided kmeans --out run".split()),
    *("--generator g.safetensors --latents latents".split()),
    *("--sample.steps 2 --sample.batch-classes 1 --sample.starts 2".split()),
    *("--sample.guidance.reference-size 4 --sample.influence.strength 0.1".split()),
    *("--sample.influence.surrogate surrogate --sample.modes.strength 0.1".split()),
    *("--relabel.teacher-epochs 1 --train.epochs 2 --train.losses ce kl --train.batch 4".split()),
]
STAGES = {
    "fit": ["fit", "--data", "photos", "--out", "g.safetensors", *FIT],
    "fit-surrogate": ["fit-surrogate", "--data", "photos", "--out", "surrogate", *SURROGATE],
    "encode": [
        *("encode --data photos --out latents --generator g.safetensors".split()),
        *("--shard 8 --batch 4 --support 2".split()),
    ],
    "sample": ["sample", *RUN],
    "relabel": ["relabel", *RUN],
    "train": ["train", *RUN],
    "evaluate": ["run", *RUN],
    "export": ["export", "run", "--to", "hf", "--out", "hf"],
}
ENDS = {"export": "hf"}  # made once: what is there is left alone
TIMED = ("metrics.json", "otdd.json")  # hold seconds under `timings`, and are compared without
DATA = "photos"
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}
CODES = {"full": errno.ENOSPC, "read-only": errno.EROFS}


def photos(folder: Path) -> None:
    """A data folder: two classes of 9 and 12 training images, and test images."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 4)):
        for number, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for index in range(count + 3 * number):
                pixels = draw.integers(0, 128, (8, 8), dtype=np.uint8) + 100 * number
                path = folder / part / name / f"{index:02d}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)


class Fault:
    """Counts what a process does, and does something to it at the n-th time.

    Args:
        root: writes under this folder count.
        at: number of the event; 0 for none.
        kind: `kill` and `interrupt` send a signal; `full` and `read-only` fail from then on as such
            a disk does; under `limit` no file may have more than n bytes.
    """

    def __init__(self, root: Path, at: int = 0, kind: str = "kill") -> None:
        self.root, self.at, self.kind, self.count = str(root), at, kind, 0
        self.stage, self.stages, self.over = "", [], False

    def install(self) -> None:
        flush = os.fsync

        def fsync(handle: int) -> None:
            self.event()
            flush(handle)

        os.fsync = fsync
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at, resource.RLIM_INFINITY))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple) -> None:
        if self.over:
            return
        if event == "open":
            path, mode, flags = args
            write = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
            if not write:
                return
        elif event not in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        else:
            path = args[0]
        if os.path.abspath(os.fsdecode(path) if not isinstance(path, int) else "").startswith(
            self.root
        ):
            self.event(frees=event in ("os.remove", "os.rmdir"))

    def event(self, frees: bool = False) -> None:
        """One thing more that the process does; `frees` if it would work on a full disk."""
        if frees and self.kind in ("full", "limit"):
            return
        self.count += 1
        self.stages.append(self.stage)
        if self.kind in CODES and 0 < self.at <= self.count:
            raise OSError(CODES[self.kind], os.strerror(CODES[self.kind]))
        if self.count == self.at and self.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.kind])


def forked(
    root: Path,
    stages=tuple(STAGES),
    fault: Fault | None = None,
    commands=STAGES,
    answer: Path | None = None,
) -> dict:
    """The stages in a child, up to the first that fails.

    Returns:
        code of the last command (-9 if it was killed), its stage, what it said on standard error,
        and the stage of every event.
    """
    answer = answer or root.with_name(f"{root.name}.answer")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        end = 3
        try:
            with open(answer, "w") as file:
                json.dump(_commands(root, stages, fault, commands), file)
            end = 0
        finally:
            os._exit(end)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return json.loads(answer.read_text())
    return {"code": status, "stage": "", "said": "", "stages": []}


def _commands(root: Path, stages, fault: Fault | None, commands) -> dict:
    torch.set_num_threads(1)
    relabel.SHARD_BYTES = 1  # labels of every epoch in a shard of their own
    os.chdir(root)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fault = fault or Fault(root)
    fault.install()
    code, said = 0, io.StringIO()
    for stage in stages:
        fault.stage = stage
        if commands is STAGES and stage in ENDS and Path(ENDS[stage]).exists():
            continue
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli._guarded(commands[stage])
        if code:
            break
    fault.over = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return {"code": code, "stage": stage, "said": said.getvalue(), "stages": fault.stages}


def complaint(said: str) -> list[str]:
    """Lines on standard error but for those of progress."""
    progress = ("done  ", "fit: ", "encode: ", "check: ", "statistics: ")
    return [line for line in said.splitlines() if line and not line.startswith(progress)]


def one_line(done: dict) -> bool:
    """Whether a command ended with one line that says what is wrong, and a right exit code."""
    lines = complaint(done["said"])
    return done["code"] in (1, 2, 3, 4) and len(lines) == 1 and lines[0].startswith("otdd: ")


def contents(root: Path) -> dict[str, str]:
    """Hash of every file but the data; without the seconds of `metrics.json`, `otdd.json`, logs."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or name.startswith(DATA) or path.name == ".otdd.lock":
            continue
        found[name] = hashlib.sha256(_lasting(path)).hexdigest()
    return found


def _lasting(path: Path) -> bytes:
    """Content of a file, without seconds and without the whole paths of inputs."""
    data = path.read_bytes()
    if path.name == "SHA256SUMS":
        other = (*TIMED, "config.json")
        lines = data.decode(errors="replace").splitlines()
        timed = lambda line: line.endswith(other) or "  logs/" in line  # noqa: E731
        return "\n".join(line for line in lines if not timed(line)).encode()
    if path.suffix == ".csv":  # seconds are the last column
        return b"\n".join(line.rpartition(b",")[0] for line in data.splitlines())
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # of a damaged file
        if path.name in TIMED:
            value = json.loads(data)
            value.pop("timings", None)
            return json.dumps(value).encode()
        if path.name == "config.json":
            value = json.loads(data)
            groups = (value, "data"), (value, "generator"), (value, "latents")
            for group, key in (*groups, (value["sample"]["influence"], "surrogate")):
                group[key] = Path(group[key]).name
            return json.dumps(value).encode()
    return data


def finished(root: Path) -> Path:
    """A root in which every stage has ended, once everything heavy is imported here."""
    import pyarrow.parquet  # noqa: F401
    import rich.progress  # noqa: F401

    import otdd.terminal
    import otdd.tools  # noqa: F401
    from otdd.distill import baselines, dit, encode, evaluate, export, fit, hf, plots  # noqa: F401

    root.mkdir(parents=True)
    photos(root / DATA)
    done = forked(root)
    assert done["code"] == 0, done
    return root


def copied(whole: Path, root: Path) -> Path:
    """A copy of a finished root, links to its data."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    return root


def fresh(whole: Path, root: Path) -> Path:
    """A root with the data alone."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole / DATA, root / DATA)
    return root
