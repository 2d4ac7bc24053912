"""Several processes make the same bytes as one, and what a lost one left is made by others."""

import datetime
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from otdd.distill import workers
from otdd.distill.config import ConfigError
from otdd.distill.store import TEMP
from otdd.distill.workers import Workers

ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "OTDD_LOG": "json"}
DRIVER = Path(__file__).with_name("shared_run.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(DRIVER), str(root)], check=True, env=environment)
    return root, json.loads((root / "ways.json").read_text())


def contents(folder):
    files = (p for p in (folder / "sets").rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_processes_end_well_and_those_left_behind_stop(runs):
    root, ways = runs
    assert ways["one"] == [[0]]
    assert (ways["by-2"], ways["by-3"]) == ([[0, 0]], [[0, 0, 0]])
    assert (ways["lost"], ways["alone"]) == ([[1, -9], [0, 0]], [[1, -9], [0]])
    assert ways["head"] == [[-9, 1], [0, 0, 0]]
    for name, rank in (("lost", 0), ("alone", 0), ("head", 1)):
        error = (root / f"{name}-{rank}.error").read_text()
        assert "another process of this run was lost; what is finished is kept" in error


def test_groups_of_a_lost_process_are_kept_and_the_rest_made(runs):
    for name in ("lost", "alone", "head"):
        kept = json.loads((runs[0] / f"{name}.json").read_text())
        assert 1 < len(kept) < 5, (name, kept)


@pytest.mark.parametrize("name", ["by-2", "by-3", "lost", "alone", "head"])
def test_the_same_bytes_whatever_the_number_of_processes(runs, name):
    root = runs[0]
    whole = contents(root / "one")
    assert len(whole) == 3 * (20 + 1)
    assert contents(root / name) == whole
    assert not list((root / name).rglob(TEMP + "*"))


def test_teachers_of_several_processes_choose_the_same_starts(runs):
    root, ways = runs
    assert (ways["judged-1"], ways["judged-3"]) == ([[0]], [[0, 0, 0]])
    assert contents(root / "judged-1") == contents(root / "judged-3")
    chosen, others = (
        load_file(root / name / "sets/otg/images.safetensors")["latents"]
        for name in ("judged-1", "one")
    )
    assert not torch.equal(chosen, others)


@pytest.mark.parametrize("name", ["stored-3", "live-3", "stored-lost", "live-1"])
def test_the_same_students_whatever_the_number_of_processes(runs, name):
    root, ways = runs
    lost = [[1, -9], [0, 0]]
    assert ways[name] == (lost if name == "stored-lost" else [[0] * int(name[-1])])
    assert results(root / name) == results(root / "stored-1")
    assert len(results(root / name)) == 2 * 2 * 2
    logs = list((root / name / "logs").rglob("*.csv"))
    assert len(logs) == 8
    assert not (root / name / "checkpoints").exists()
    tables = [json.loads((root / n / "metrics.json").read_text()) for n in (name, "stored-1")]
    assert tables[0]["accuracy"] == tables[1]["accuracy"]


# The broken torchvision of some machines is repaired, as otdd does for itself.
ACCELERATE = (
    "from otdd import _torchvision; _torchvision.repair();"
    "from accelerate.commands.launch import main; main()"
)
LAUNCHERS = {
    "accelerate": "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
    "torchrun": "--nproc-per-node 2",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_commands_of_the_readme_start_it(runs, tmp_path, launcher):
    root = runs[0]
    out, generator, data = tmp_path / "out", root / "generator.safetensors", root / "digits.npz"
    starts = {"accelerate": ["-c", ACCELERATE], "torchrun": ["-m", "torch.distributed.run"]}
    command = [sys.executable, *starts[launcher], *LAUNCHERS[launcher].split()]
    command += ["-m", "otdd", "sample"]
    command += ["--data", str(data), "--ipc", "2", "--generator", str(generator), "--out", str(out)]
    command += ["--sample.steps", "2", "--sample.batch-classes", "2", "--sets", "otg"]
    command += ["--sample.guidance.reference-size", "8", "--sample.judge", "latents"]
    made = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALONE)
    assert made.returncode == 0, made.stderr[-2000:]
    told = [json.loads(line) for line in made.stderr.splitlines() if line.startswith("{")]
    assert {line.get("rank") for line in told} == {0, 1}
    file = "sets/otg/images.safetensors"
    assert (out / file).read_bytes() == (root / "one" / file).read_bytes()


def results(folder):
    files = (p for p in (folder / "results").rglob("*.json"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_store_with_words_of_the_dead_joins_the_living():
    store = torch.distributed.HashStore()
    for rank in (1, 2):  # an attempt whose first process was lost while it answered
        store.set(f"hello/{rank}", f"dead{rank}")
    store.set("welcome/dead1", "dead")
    store.set("here/dead/1", "")
    for _ in range(2):  # and then twice in the same store
        with ThreadPoolExecutor(3) as pool:
            names = [pool.submit(workers._agree, store, rank, 3) for rank in (1, 2, 0)]
            found = {name.result(timeout=20) for name in names}
        assert len(found) == 1
        assert found != {"dead"}


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(workers, "JOIN", datetime.timedelta(seconds=0.1))
    with pytest.raises(workers.WorkersError, match=r"processes \[1\] of this run have not come"):
        workers._agree(torch.distributed.HashStore(), 0, 2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE of the environment: 'two' is not accepted; .* a number"),
        ("RANK", "", "RANK of the environment: '' is not accepted"),
        ("RANK", "2", "RANK of the environment: 2 is not accepted; expected 0 to 1"),
        ("MASTER_ADDR", "", "MASTER_ADDR of the environment: '' .* a host, as torchrun"),
        ("MASTER_PORT", "x", "MASTER_PORT of the environment: 'x' is not accepted"),
    ],
)
def test_what_a_launcher_left_out_is_named(monkeypatch, key, value, message):
    whole = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, given in (whole | {key: value}).items():
        monkeypatch.setenv(name, given)
    with pytest.raises(ConfigError, match=message):
        Workers.join()


def test_one_process_is_alone(monkeypatch):
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        alone = Workers.join()
        assert (alone.first, alone.share("x"), alone.part(range(3))) == (True, "x", [0, 1, 2])
        alone.wait()
        alone.leave()
    parts = [Workers(rank, 3).part(range(7)) for rank in range(3)]
    assert sorted(n for part in parts for n in part) == list(range(7))
