"""What is done to a tiny run, and what came of it: one row for each try.

Helper of test_faults and of benchmarks/faults.py. Every campaign takes a finished root and a folder
for its own.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from distill.faults import (
    STAGES,
    Fault,
    complaint,
    contents,
    copied,
    forked,
    fresh,
    one_line,
)

import otdd
from otdd.distill import locks

SAME = "the same bytes in the end"
FULL = "one line; space freed, the same bytes"
NAMED = "named in one line; deleted and made again, the same bytes"
REFUSED = "refused in one line"
AGAIN = "made again, the same bytes"
UNNEEDED = "not read: the same results"
ABSENT = "not needed any more, not made again"
HEALED = "no lock: the run goes on"
WAYS = ("flipped", "cut", "emptied", "deleted")


class Row(NamedTuple):
    """One try: what was done, to what, the outcome, and what was said if it is a fault."""

    done: str
    to: str
    outcome: str
    detail: str = ""

    @property
    def fault(self) -> bool:
        return self.outcome == "fault"


def _row(done: str, to: str, outcome: str, ok: bool, detail: object = "") -> Row:
    return Row(done, to, outcome) if ok else Row(done, to, "fault", str(detail))


def differences(root: Path, whole: dict[str, str]) -> list[str]:
    """Files that are not those of the finished root, and what was left behind."""
    seen = contents(root)
    return [name for name in sorted({*seen, *whole}) if seen.get(name) != whole.get(name)]


def points(stages: list[str], count: int, seed: int) -> list[int]:
    """Numbers of events, drawn from each stage in turn."""
    draw, names = random.Random(seed), list(dict.fromkeys(stages))
    first = {name: stages.index(name) for name in names}
    turns = [names[k % len(names)] for k in range(count)]
    return [first[name] + draw.randrange(stages.count(name)) + 1 for name in turns]


def stops(whole: Path, root: Path, count: int, seed: int, kind: str = "kill") -> list[Row]:
    """Killed or interrupted at random points of all stages, and started again."""
    expected, rows = contents(whole), []
    stages = forked(fresh(whole, root))["stages"]
    for at in points(stages, count, seed):
        first = forked(fresh(whole, root), fault=Fault(root, at, kind))
        second = forked(root)
        wrong = differences(root, expected)
        # Ctrl-C in the last step of a fit: the step, and with it the generator, is finished.
        late = kind == "interrupt" and stages[at - 1] == "fit" and first["code"] == 0
        stopped = late or first["code"] == {"kill": -9, "interrupt": 130}[kind]
        ok = stopped and second["code"] == 0
        what = {"kill": "kill -9", "interrupt": "Ctrl-C"}[kind]
        rows.append(_row(what, stages[at - 1], SAME, ok and not wrong, (at, first, second, wrong)))
    return rows


def full_disks(whole: Path, root: Path, count: int, seed: int) -> list[Row]:
    """No space from a random write on; then there is."""
    expected, rows = contents(whole), []
    stages = forked(fresh(whole, root), fault=Fault(root, 0, "full"))["stages"]
    for at in points(stages, count, seed):
        first = forked(fresh(whole, root), fault=Fault(root, at, "full"))
        rows.append(_after_full(root, expected, first, stages[at - 1]))
    return rows


def file_limits(whole: Path, root: Path, sizes: list[int]) -> list[Row]:
    """Files above a size cannot be written (RLIMIT_FSIZE); then they can."""
    expected, rows = contents(whole), []
    for size in sizes:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        root = fresh(whole, root)
        fault = Fault(root, size, "limit")
        first = forked(root, fault=fault)
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
        rows.append(_after_full(root, expected, first, first["stage"]))
    return rows


def _after_full(root: Path, expected: dict[str, str], first: dict, stage: str) -> Row:
    half = [p for p in root.rglob("*") if p.name.startswith(".tmp-")]
    kept = {
        k: v for k, v in contents(root).items() if not k.endswith(("SHA256SUMS", "metrics.json"))
    }
    second = forked(root)
    lost = [name for name in kept if name in expected and kept[name] != expected[name]]
    wrong = differences(root, expected)
    ok = first["code"] == 4 and one_line(first) and second["code"] == 0
    detail = (first, second, half, lost, wrong)
    return _row("disk full", stage, FULL, ok and not (half or lost or wrong), detail)


@contextlib.contextmanager
def tmpfs(folder: Path, size: int):
    """A file system of so many bytes, or OSError where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)


def small_disks(whole: Path, root: Path, count: int) -> list[Row]:
    """File systems of growing size that are too small; then enlarged."""
    expected, rows = contents(whole), []
    everything = _pages(whole)
    data = _pages(whole / "photos")
    for number in range(count):
        size = data + (everything - data) * (2 * number + 1) // (2 * count)
        with tmpfs(root.with_name(f"{root.name}-{number}"), size) as disk:
            shutil.copytree(whole / "photos", disk / "photos")
            first = forked(disk)
            _mount("-o", "remount,size=64m", disk)
            row = _after_full(disk, expected, first, first["stage"])
            rows.append(row._replace(done="disk full (tmpfs)"))
    return rows


def _pages(folder: Path) -> int:
    return sum(4096 * -(-p.stat().st_size // 4096) for p in folder.rglob("*") if p.is_file())


def damage(whole: Path, root: Path, names: list[str], ways=WAYS, seed: int = 0) -> list[Row]:
    """Files of a finished root, each damaged in each way, and its command started again."""
    expected, rows = contents(whole), []
    for name in names:
        for way in ways:
            copied(whole, root)
            harm(root / name, way, random.Random(f"{seed}/{name}/{way}"))
            rows.append(_owner(root, name, way, expected))
    return rows


def harm(path: Path, way: str, draw: random.Random) -> None:
    """Flip a bit, cut off a part, empty or delete a file."""
    data = bytearray(path.read_bytes())
    if way == "flipped":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del data[draw.randrange(len(data)) :]
    elif way == "emptied":
        data.clear()
    path.unlink() if way == "deleted" else path.write_bytes(data)


OWNERS = {
    "run": ("evaluate",),
    "run/logs": ("train", "evaluate"),
    "run/geometry": ("train", "evaluate"),
    "latents": ("encode", "evaluate"),
    "surrogate": ("fit-surrogate", "evaluate"),
    "g.safetensors": ("fit", "evaluate"),
}


def _owner(root: Path, name: str, way: str, expected: dict[str, str]) -> Row:
    parts = name.split("/")
    stages = OWNERS.get("/".join(parts[:2]), OWNERS[parts[0]])
    done = forked(root, stages)
    if done["code"] == 2 and one_line(done):
        named = _named(root, done["said"])
        for path in named:
            path.unlink()
        again = forked(root, stages)
        wrong = differences(root, expected)
        ok = bool(named) and again["code"] == 0
        if _unneeded(root, name, wrong):
            return _row(way, name, f"named in one line; {ABSENT}", ok, (done, again))
        ok = ok and not wrong
        return _row(way, name, NAMED, ok, (done, named, again, wrong))
    wrong = differences(root, expected)
    ok = done["code"] == 0 and not complaint(done["said"])
    if _unneeded(root, name, wrong):
        return _row(way, name, ABSENT, ok, done)
    return _row(way, name, AGAIN, ok and not wrong, (done, wrong))


def _unneeded(root: Path, name: str, wrong: list[str]) -> bool:
    """Whether nothing but a teacher, whose labels are all there, is missing."""
    gone = name.startswith("run/teachers/") and not (root / name).exists()
    return gone and set(wrong) == {name, "run/SHA256SUMS"}


def _named(root: Path, said: str) -> list[Path]:
    """Files that a complaint names."""
    said = complaint(said)[0]
    if "by SHA256SUMS: " not in said:
        return [root / "g.safetensors"] if "generator g.safetensors" in said else []
    folder = said.removeprefix("otdd: ").partition(":")[0]
    names = said.partition("by SHA256SUMS: ")[2].partition(";")[0].split(", ")
    return [root / folder / name for name in names]


def consumed(whole: Path, root: Path, names: list[str], ways=WAYS, seed: int = 0) -> list[Row]:
    """Damaged latents, surrogates and generators, read by a new run."""
    other = {"sample": [w if w != "run" else "other" for w in STAGES["sample"]]}
    forked(copied(whole, root), ("sample",), commands=other)
    expected, rows = contents(root), []
    for name in names:
        for way in ways:
            copied(whole, root)
            harm(root / name, way, random.Random(f"{seed}/{name}/{way}"))
            done = forked(root, ("sample",), commands=other)
            if done["code"]:
                short = name.partition("/")[0]
                ok = done["code"] == 2 and one_line(done) and short in done["said"]
                rows.append(_row(f"{way}, read", name, REFUSED, ok, done))
            else:
                wrong = [n for n in differences(root, expected) if n != name]
                rows.append(_row(f"{way}, read", name, UNNEEDED, not wrong, (done, wrong)))
    return rows


def loaded(whole: Path, root: Path, names: list[str], ways=WAYS, seed: int = 0) -> list[Row]:
    """Files of an exported set, read by `otdd.load`, and sent by `otdd push --dry-run`."""
    rows, expected = [], _read(whole / "hf")
    for name in names:
        for way in ways:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(whole / "hf", root)
            harm(root / name, way, random.Random(f"{seed}/{name}/{way}"))
            try:
                same = _read(root) == expected
                rows.append(_row(f"{way}, loaded", f"hf/{name}", UNNEEDED, same, "other content"))
            except otdd.distill.StoreError as error:
                said = str(error)
                ok = "\n" not in said and Path(name).name in said
                rows.append(_row(f"{way}, loaded", f"hf/{name}", REFUSED, ok, said))
    return rows


def _read(folder: Path) -> str:
    from otdd.distill.sums import tensor_digest

    got = otdd.load(folder)
    batches = {f"{k}": batch.images for k, batch in enumerate(got.replay())}
    everything = {"images": got.images, "labels": got.labels, "soft": got.soft_labels, **batches}
    return tensor_digest(everything, [got.classes, got.mean, got.std])


def places(whole: Path, root: Path) -> list[Row]:
    """Outputs that cannot be: every command refuses at once and leaves everything as it was."""
    rows, outs = [], ("g.safetensors", "surrogate", "latents", "run", "run", "run", "run", "hf")
    for kind in ("a file", "under a file", "name too long", "among the classes", "foreign files"):
        for (stage, command), out in zip(STAGES.items(), outs, strict=True):
            if (stage, kind) in {("fit", "a file"), ("export", "among the classes")}:
                continue
            if stage == "fit" and kind in ("foreign files", "among the classes"):
                continue
            copied(whole, root)
            (root / "notes").mkdir()
            (root / "notes/thesis.tex").write_text("words")
            to = {
                "a file": "notes/thesis.tex",
                "under a file": "notes/thesis.tex/new",
                "name too long": "x" * 300,
                "among the classes": "photos/train/new",
                "foreign files": "notes",
            }[kind]
            place = len(command) - 1 - command[::-1].index("--out") + 1
            assert command[place] == out
            changed = [*command[:place], to, *command[place + 1 :]]
            before = _tree(root)
            done = forked(root, (stage,), commands={stage: changed})
            ok = done["code"] == 2 and one_line(done) and _tree(root) == before
            rows.append(_row(f"output is {kind}", stage, REFUSED, ok, done))
    return rows


def read_only(whole: Path, root: Path, real: bool, stages=tuple(STAGES)) -> list[Row]:
    """All stages where nothing can be written: a read-only file system, or one that says so."""
    rows, expected = [], contents(whole)
    for stage in stages:
        if real:
            folder = root.with_name(f"{root.name}-ro")
            with tmpfs(folder, 2**24) as disk:
                _before(whole, disk, stage)
                _mount("-o", "remount,ro", disk)
                first = forked(disk, (stage,), Fault(disk), answer=root.with_name("answer"))
                _mount("-o", "remount,rw", disk)
                rows.append(_after_read_only(disk, stage, first, expected))
        else:
            _before(whole, root, stage)
            first = forked(root, (stage,), Fault(root, 1, "read-only"))
            rows.append(_after_read_only(root, stage, first, expected))
    return rows


def _before(whole: Path, root: Path, stage: str) -> None:
    """A root in which the stages before this one are done."""
    shutil.copytree(whole / "photos", fresh(whole, root) / "photos", dirs_exist_ok=True)
    forked(root, tuple(STAGES)[: list(STAGES).index(stage)])


def _after_read_only(root: Path, stage: str, first: dict, expected: dict[str, str]) -> Row:
    second = forked(root)
    wrong = differences(root, expected)
    ok = first["code"] == 4 and one_line(first) and second["code"] == 0 and not wrong
    return _row("read-only", stage, FULL, ok, (first, second, wrong))


def _tree(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(root)): (p.stat().st_mode, p.read_bytes() if p.is_file() else b"")
        for p in sorted(root.rglob("*"))
        if p.name != ".otdd.lock"
    }


LOCKS = {
    "fit": ".g.safetensors.lock",
    "fit-surrogate": "surrogate/.otdd.lock",
    "encode": "latents/.otdd.lock",
    "sample": "run/.otdd.lock",
    "train": "run/.otdd.lock",
    "evaluate": "run/.otdd.lock",
}


def second_runs(whole: Path, root: Path, stages=tuple(LOCKS)) -> list[Row]:
    """A lock that a living process holds, that a killed one held, and files that lock nothing."""
    rows, expected = [], contents(whole)
    copied(whole, root)
    for stage in stages:
        lock = LOCKS[stage]
        holder = _holder(root / lock)
        done = forked(root, (stage,))
        ok = done["code"] == 3 and one_line(done) and f"process {holder} on" in done["said"]
        rows.append(_row("second process", stage, REFUSED, ok, done))
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        rows.append(_healed(root, stage, "lock of a killed process", expected))
        for what, text in {
            "lock of another host": "process 17 on elsewhere\n",
            "lock with a used number": f"process {os.getpid()} on {os.uname().nodename}\n",
            "lock without sense": "\x00\xff",
        }.items():
            (root / lock).write_text(text)
            rows.append(_healed(root, stage, what, expected))
    return rows


def _holder(lock: Path) -> int:
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        locks.acquire(lock)
        os.write(there, b"held")
        signal.pause()
    assert os.read(here, 4) == b"held"
    os.close(here)
    os.close(there)
    return child


def _healed(root: Path, stage: str, what: str, expected: dict[str, str]) -> Row:
    done = forked(root, (stage,))
    wrong = differences(root, expected)
    return _row(what, stage, HEALED, done["code"] == 0 and not wrong, (done, wrong))
