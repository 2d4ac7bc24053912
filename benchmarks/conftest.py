"""Options of ``pytest benchmarks/``, the processes that measure, and the file of results."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import floors
import pytest

HERE = Path(__file__).parent
KEY = ("threads", "dtype", "case", "direction")  # of a row of results
PACKAGES = ("torch", "numpy", "POT", "geomloss", "pykeops", "jax", "ott-jax", "pytest-benchmark")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("otdd")
    group.addoption("--quick", action="store_true", help="few rounds, small cases, no result file")
    group.addoption("--threads", default="1,2", help="numbers of threads, separated by commas")
    group.addoption("--results", type=Path, help="JSON file to write, or to renew rows of")
    group.addoption("--gpu-results", type=Path, help="the same for test_gpu.py, which needs it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        threads = [int(t) for t in metafunc.config.getoption("threads").split(",")]
        metafunc.parametrize("threads", threads, ids=lambda t: f"threads={t}", scope="session")


class Workers:
    """One process of `measure` per number of threads, and every row they have answered with."""

    def __init__(self, quick: bool) -> None:
        self.quick, self.rows, self.processes = quick, {}, {}

    def measure(self, threads: int, case: str, dtype: str, direction: str) -> dict:
        key = threads, case, dtype, direction
        if key not in self.rows:
            request = {"case": case, "dtype": dtype, "direction": direction, "quick": self.quick}
            self.rows[key] = self.ask(threads, request)
        return self.rows[key]

    def ask(self, threads: int, request: dict) -> dict:
        if threads not in self.processes:
            self.stop()  # one at a time: they share the machine
            self.processes[threads] = start(threads)
        process = self.processes[threads]
        print(json.dumps(request), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"measure.py stopped with exit code {process.wait()} at {request}")
        return json.loads(answer)

    def stop(self) -> None:
        for process in self.processes.values():
            process.stdin.close()
            process.wait()
        self.processes.clear()


def start(threads: int) -> subprocess.Popen:
    """A process of `measure` on the first `threads` cores; OpenMP, torch and XLA told as many.

    XLA makes as many threads as the process has cores. How OpenMP's threads wait is left as the
    caller's environment says, and recorded.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise RuntimeError(f"--threads: got {threads}; accepted: at most the {len(cores)} cores")
    paths = [HERE.parent, HERE, HERE.parent / "tests", os.environ.get("PYTHONPATH", "")]
    changed = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": str(threads)}
    if threads == 1:
        one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        changed["XLA_FLAGS"] = one
    return subprocess.Popen(
        [sys.executable, HERE / "measure.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | changed,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:threads]),
    )


@pytest.fixture(scope="session")
def workers(pytestconfig: pytest.Config) -> Iterator[Workers]:
    workers = Workers(pytestconfig.getoption("quick"))
    yield workers
    workers.stop()
    if path := pytestconfig.getoption("results"):
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results(before, [*workers.rows.values()]), indent=1) + "\n")


def results(before: list[dict], rows: list[dict]) -> dict:
    """What is committed, without the single times; rows of an earlier run stay, or are replaced.

    Floors are those of the highest rates that a row of the same threads and type has seen.
    """
    about = machine()
    for row in rows:
        row["commit"] = about["commit"]
        for contender in row["contenders"].values():
            contender.pop("times_ms", None)
    merged = {tuple(row[k] for k in KEY): row for row in [*before, *rows]}
    for row in merged.values():
        alike = [r["rates"] for r in merged.values() if all(r[k] == row[k] for k in KEY[:2])]
        row["rates"] = floors.highest(*alike)
    for row in merged.values():
        floors.put(row)
    ordered = sorted(merged.values(), key=lambda row: row["threads"])
    return {"command": " ".join(["pytest", *sys.argv[1:]]), **about, "rows": ordered}


def machine() -> dict:
    import otdd
    from otdd import backends

    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    versions = {"otdd": otdd.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    processor = f"{platform.machine()} {model}".strip()
    return {
        "commit": commit,
        "machine": {
            "processor": processor,
            "cores": len(os.sched_getaffinity(0)),
            "isa": backends.native().cpu_isa(),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        },
        "versions": versions,
    }
