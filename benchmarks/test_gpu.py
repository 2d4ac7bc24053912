"""otdd on the GPU beside its peers; `gpu.sh` starts it and says what else it does.

    pytest benchmarks/test_gpu.py --gpu-results benchmarks/results/gpu.json

A process measures (`gpu_measure.py`): each contender is first compared with a float64 oracle on the
GPU, then all take turns. The file is renewed after each row; a test fails where otdd has no figure.
"""

import json
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import gpu_cases
import gpu_report
import gpu_scale
import pytest
import torch

HERE = Path(__file__).parent
SECONDS = 150  # for a row: a kernel that never ends must not end the benchmark
ROWS = [
    {"case": case.name, "dtype": dtype, "direction": direction}
    for case in gpu_cases.CASES
    for dtype in case.dtypes
    for direction in case.directions
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Worker:
    """A process of `gpu_measure`, a new one after each that ended or gave no answer."""

    def __init__(self, path: Path, command: tuple = (sys.executable, HERE / "gpu_measure.py")):
        self.path, self.command, self.process = path, command, None

    def ask(self, request: dict, seconds: float = SECONDS) -> dict:
        if self.process is None or self.process.poll() is not None:
            paths = [HERE.parent, HERE, HERE.parent / "tests", os.environ.get("PYTHONPATH", "")]
            env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen(self.command, env=env, **pipes)
        print(json.dumps(request), file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.stop()
            fatal = "the process ended" if ready else f"no answer within {seconds} s"
            answer = {"case": request.get("scale"), **request, "fatal": fatal}
        else:
            answer = json.loads(line)
        gpu_report.put_row(self.path, answer)
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def worker(pytestconfig):
    path = pytestconfig.getoption("gpu_results")
    if path is None:
        pytest.skip("asked for by --gpu-results FILE")
    worker = Worker(path)
    yield worker
    worker.stop()


def asked(row: dict, expression: str) -> bool:
    """Whether a row is measured: some of the clouds are so only if -k names their case."""
    named = row["case"] in re.split(r"[^\w-]+", expression)
    return named or not gpu_cases.asked_only(row["case"], row["direction"])


@pytest.mark.parametrize("request_", ROWS, ids=lambda row: "-".join(row.values()))
def test_row(worker, pytestconfig, request_):
    if not asked(request_, pytestconfig.getoption("keyword")):
        pytest.skip(f"measured for -k {request_['case']}")
    row = worker.ask(request_)
    assert "fatal" not in row, row["fatal"]
    for name in ("otdd", "otdd, graph", "otdd, unrolled"):
        if name not in row["contenders"]:
            continue  # clouds: the envelope alone
        seen = row["contenders"][name]
        ours = request_["direction"] == "forward+backward" or name != "otdd, unrolled"
        assert "median_ms" in seen or not ours, f"{name}: {seen['reason']}"


@pytest.mark.parametrize("name", gpu_scale.STEPS)
def test_scale(worker, name):
    row = worker.ask({"scale": name})
    if "median_ms" not in row:
        pytest.skip(row.get("reason") or row["fatal"])
