"""Killed or interrupted anywhere and started again, a run ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from otdd.distill.store import TEMP

DRIVER = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(DRIVER), str(root)], check=True, env=environment)
    return root, json.loads((root / "ways.json").read_text())


def contents(folder):
    names = ("sets", "teachers", "results", "geometry")
    files = [p for name in names for p in (folder / name).rglob("*") if p.is_file()]
    found = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    return found | {"grid.png": (folder / "grid.png").read_bytes()}


def test_runs_were_stopped_and_then_finished(runs):
    for name, (ended, second) in runs[1].items():
        assert second == 0, name
        expected = {signal.SIGKILL.value, 130} if name != "killed-often" else range(3, 100)
        assert ended in expected, name


def test_same_bytes_as_an_uninterrupted_run(runs):
    root, ways = runs
    whole = contents(root / "whole")
    pictures = [n for n in whole if n.endswith(".png")]
    assert len(pictures) == 3 * 20 + 1
    assert sum(n.endswith("labels/00000.safetensors") for n in whole) == 3
    for name in ways:
        assert contents(root / name) == whole, name


def test_nothing_unfinished_is_left(runs):
    root, ways = runs
    for name in ways:
        assert not list((root / name).rglob(TEMP + "*")), name
        assert not (root / name / "checkpoints").exists(), name
        costs, whole = (
            json.loads((root / n / "metrics.json").read_text())["ot_cost"] for n in (name, "whole")
        )
        assert costs == whole
