"""The GPU benchmark, as far as it goes without a GPU; none of the figures here were measured."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cases
import gpu_cases
import gpu_contenders
import gpu_floors
import gpu_measure
import gpu_report
import gpu_scale
import gpu_small
import measure
import pytest
import test_gpu
import torch
from contender import DISAGREES, Unsupported

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu.sh"
BASH = shutil.which("bash")

# A made-up device, of round numbers.
CHIP = gpu_floors.Chip("made up", multiprocessors=100, l2=1 << 20, shared=1 << 24, memory=1 << 34)
RATE = {"copy": 1e12, "fma": 1e13, "exp": 1e12, "shared": 1e13}
TINY = [
    cases.Case("given", "given", 3, 6, 5, iterations=4),
    cases.Case("l1", "points", 2, 6, 5, 3, "l1", iterations=4),
    cases.Case("sqeuclidean", "points", 2, 6, 5, 3, "sqeuclidean", iterations=4),
    cases.Case("logits", "logits", 1, 6, 6, 5, "l1", iterations=4),
    cases.Case("metric", "metric", 2, 6, 5, 3, "l1", iterations=1),
]
ON_CPU = [
    contender
    for contender in gpu_contenders.CONTENDERS
    if "graph" not in contender.name and "compile" not in contender.name
]
needs_bash = pytest.mark.skipif(BASH is None, reason="needs bash")


def gpu_sh(*arguments, cwd, smi="exit 9", python=sys.executable):
    """gpu.sh in `cwd`, with an nvidia-smi that does what `smi` says."""
    program(cwd / "bin/nvidia-smi", smi)
    path = f"{cwd / 'bin'}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHON": str(python), "OTDD_COMMIT": "made-up"}
    command = [BASH, SCRIPT, *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


def program(path, body):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@needs_bash
def test_script_is_bash():
    done = subprocess.run([BASH, "-n", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_bash
def test_without_a_gpu_it_says_so(tmp_path):
    done = gpu_sh("results", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "gpu.sh: no GPU: nvidia-smi names none (--dry-run prints what would run)\n"
    )
    assert not (tmp_path / "results").exists()


@needs_bash
def test_dry_run_names_every_part_and_makes_nothing(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/peer-1-py3-none-any.whl").touch()
    done = gpu_sh("--dry-run", "--wheels", "wheels", "-k", "small", "results", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    parts = [line.split()[1].rstrip(",") for line in lines if ", at most " in line]
    assert parts == ["build", "test", "memcheck", "racecheck", "synccheck", "bench"]
    assert sum(int(line.split()[4]) for line in lines if ", at most " in line) <= 25 * 60
    assert "peer-1-py3-none-any.whl" in lines[0]
    assert lines[-1].endswith("-k small benchmarks/test_gpu.py --gpu-results results/gpu.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "wheels"]


@needs_bash
def test_one_part_for_the_gpu_at_hand(tmp_path):
    done = gpu_sh("--dry-run", "--part", "build", smi="echo 10.0", cwd=tmp_path)
    assert "OTDD_CUDA_ARCHS=10.0 " in done.stdout
    assert done.stdout.count("at most") == 1


@needs_bash
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--part", "bnech"], "--part bnech: not build, test, sanitize, bench or all"),
        (["--part"], "--part needs a value"),
        (["--wheels", "nowhere"], "--wheels nowhere: no such folder"),
        (["--fast"], "unknown option --fast"),
        (["one", "two"], "one folder, not one and two"),
    ],
)
def test_wrong_options_are_refused(tmp_path, arguments, told):
    done = gpu_sh("--dry-run", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"gpu.sh: {told}\n")


@needs_bash
def test_a_part_is_recorded_and_its_failure_is_the_scripts(tmp_path):
    """A stand-in for Python fails to build."""
    body = """
case "$*" in
  -c*) echo "$0" ;;
  setup.py*) echo "otdd: no kernels" && exit 3 ;;
  *) exec real "$@" ;;
esac""".replace("real", sys.executable)
    python = program(tmp_path / "bin/python", body)
    done = gpu_sh("--part", "build", "results", cwd=tmp_path, smi="echo 9.0", python=python)
    assert done.returncode == 1, done.stderr
    assert re.search(r"build: ended with 3 in \d+ s, made-up", done.stdout)
    part = json.loads((tmp_path / "results/gpu.json").read_text())["parts"]["build"]
    assert (part["status"], part["says"]) == (3, ["otdd: no kernels"])


# Cases, floors and contenders, on the CPU.


@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_the_oracle_in_parts_is_the_oracle(case, gradient, monkeypatch):
    monkeypatch.setattr(gpu_cases, "GRAPH", 1.0)  # one problem at a time
    data = cases.make(case, torch.float64)
    primal = case.kind in ("given", "points")
    value, gradients = gpu_cases.oracle(case, data, 4, gradient, primal)
    exact, wanted = cases.oracle(case, data, 4, gradient, primal)
    torch.testing.assert_close([value, *gradients], [exact, *wanted], rtol=1e-9, atol=1e-12)


def test_sets_of_inputs_exceed_the_cache():
    data = cases.make(TINY[0], torch.float32)
    one = gpu_cases.input_bytes(data)
    assert one == 4 * 3 * (6 * 5 + 6 + 5)
    assert len(gpu_cases.sets(data, one // 4)) == 1
    copies = gpu_cases.sets(data, 5 * one)
    assert len(copies) == 10
    assert len({copy.C.data_ptr() for copy in copies}) == 10
    assert len(gpu_cases.sets(data, 1 << 30)) == gpu_cases.MOST_SETS


@pytest.mark.parametrize("case", gpu_cases.CASES, ids=lambda c: c.name)
def test_floors_grow_with_the_work(case):
    def floor(direction, gradient):
        work = gpu_floors.work(case, direction, gradient, 4, CHIP.shared)
        return gpu_floors.floor_ms(work, RATE)

    if case.kind == "metric":
        assert 0 < floor("forward", "unrolled") < floor("backward", "unrolled") < math.inf
        return
    forward, envelope, unrolled = (
        floor("forward", "envelope"),
        floor("forward+backward", "envelope"),
        floor("forward+backward", "unrolled"),
    )
    assert 0 < forward <= envelope <= unrolled < math.inf


def test_floors_by_hand():
    case = cases.Case("c", "given", 10, 64, 64, iterations=50)
    size = 10 * 64 * 64
    work = gpu_floors.work(case, "forward", "envelope", 4, CHIP.shared)
    assert work == gpu_floors.Work(4 * size, 0, 2 * size * 51, size)
    work = gpu_floors.work(case, "forward+backward", "unrolled", 4, CHIP.shared)
    assert work.slots == size * (2 * 52 + 4 * 50)
    assert work.bytes == 2 * 4 * size + 2 * 8 * 10 * 128 * 50
    larger = replace(case, B=1, N=1000, M=1000)
    assert gpu_floors.work(larger, "forward", "", 4, CHIP.shared).shared == 4e6 * 50
    work = gpu_floors.work(larger, "forward", "", 4, on_chip=1000)
    assert (work.shared, work.bytes) == (0, 4e6 * 51)
    metric = cases.Case("c", "metric", 1, 1024, 1024, 1000, "l1", iterations=1)
    assert gpu_floors.work(metric, "forward", "", 4, 0).slots == 2 * 1024 * 1024 * 1000
    assert gpu_floors.work(metric, "backward", "", 4, 0).slots == 3 * 1024 * 1024 * 1000
    assert gpu_floors.floor_ms(gpu_floors.Work(1e9, 1e9, 1e9, 1e9), RATE) == pytest.approx(1.0)


@pytest.mark.parametrize("contender", ON_CPU, ids=lambda c: c.name)
@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_contenders_agree_with_the_oracle_or_say_why_not(case, contender):
    data = cases.make(case, torch.float64)
    truth = gpu_measure.Truth(case, "float64", data)
    for direction in ("forward", "backward" if case.kind == "metric" else "forward+backward"):
        row, run = gpu_measure.prepare(contender, case, truth, [data, data], direction)
        if run is None:
            assert row["reason"] != DISAGREES, row
            assert "Error" not in row["reason"], row
        if contender.name == "otdd":
            assert run is not None, row
            run(), run(), run()


def test_flash_sinkhorn_says_what_it_cannot_do():
    for case in TINY:
        if case.metric == "sqeuclidean":
            continue
        with pytest.raises(Unsupported, match="squared distance alone"):
            gpu_contenders.flash(False)(case, cases.make(case, torch.float32), "forward", 4)


def test_a_row_is_measured(monkeypatch):
    """With the CPU and its clock in place of the GPU's."""
    monkeypatch.setattr(gpu_measure, "GPU", torch.device("cpu"))
    monkeypatch.setattr(gpu_measure, "works", lambda: True)
    monkeypatch.setattr(gpu_measure, "BUDGET", measure.Budget(seconds=1e-3, call=1.0, rounds=2))
    monkeypatch.setattr(gpu_floors, "seconds", measure.by_wall_clock)
    monkeypatch.setattr(gpu_contenders, "new_pool", lambda: None)
    wanted = ("otdd", "otdd, unrolled", "torch loop", "otdd, graph")
    few = [contender for contender in gpu_contenders.CONTENDERS if contender.name in wanted]
    monkeypatch.setattr(gpu_contenders, "CONTENDERS", few)
    row = gpu_measure.measure(TINY[0], "float32", "forward+backward", CHIP, RATE)
    assert (row["sets"], row["device"], row["fastest_peer"]) == (64, "made up", "torch loop")
    seen = row["contenders"]
    assert "median_ms" not in seen["otdd, graph"]
    for name in wanted[:3]:
        assert seen[name]["of_floor"] == seen[name]["floor_ms"] / seen[name]["median_ms"]
        assert seen[name]["gradient_error"] < 1e-3
        assert seen[name]["ratio"] > 0
    json.dumps(row)


def test_a_row_ends_where_cuda_does(monkeypatch):
    monkeypatch.setattr(gpu_measure, "GPU", torch.device("cpu"))
    monkeypatch.setattr(gpu_measure, "works", lambda: False)
    monkeypatch.setattr(gpu_contenders, "new_pool", lambda: None)
    row = gpu_measure.measure(TINY[0], "float32", "forward", CHIP, RATE)
    assert row["fatal"] == "CUDA failed in otdd"
    assert list(row["contenders"]) == ["otdd"]


def test_summary_names_the_fastest_peer():
    rows = {
        "otdd": {"median_ms": 2.0, "times_ms": [2.0, 2.0]},
        "otdd, graph": {"median_ms": 1.0, "times_ms": [1.0, 1.0]},
        "torch loop": {"median_ms": 30.0, "times_ms": [30.0, 30.0]},
        "POT log, detach": {"reason": "is not installed"},
    }
    assert gpu_measure.summary(rows) == {"fastest_peer": "torch loop"}
    assert rows["torch loop"] == {"median_ms": 30.0, "ratio": 15.0}
    assert gpu_measure.summary({"otdd": {"reason": "x"}}) == {"fastest_peer": None}


# The process that measures, replaced by one of made-up answers.

ANSWERS = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["case"] == "ends": sys.exit()
    if request["case"] == "hangs": time.sleep(60)
    print(json.dumps(request | {"rates": {"made up": 1}, "contenders": {}}), flush=True)
"""


def test_worker_outlives_a_process_that_ends_or_hangs(tmp_path):
    path = tmp_path / "made_up.json"
    worker = test_gpu.Worker(path, (sys.executable, "-c", ANSWERS))
    row = {"dtype": "float32", "direction": "forward"}
    answers = [worker.ask({"case": c} | row, 3) for c in ("a", "ends", "b", "hangs", "a")]
    worker.stop()
    assert [answer.get("fatal") for answer in answers] == [
        None, "the process ended", None, "no answer within 3 s", None,
    ]  # fmt: skip
    results = json.loads(path.read_text())
    assert [row["case"] for row in results["rows"]] == ["ends", "b", "hangs", "a"]
    assert results["rates"] == {"made up": 1}


def test_table_of_a_made_up_result(tmp_path):
    path, log = tmp_path / "made_up.json", tmp_path / "log"
    log.write_text("noise\n========= ERROR SUMMARY: 0 errors\n3 passed in 1.2s\n")
    gpu_report.put_part(path, "memcheck", 0, 12, log)
    gpu_report.put_part(path, "test", 1, 3, tmp_path / "no log")
    row = {"case": "small-64", "dtype": "float32", "direction": "forward"}
    contenders = {
        "otdd": {"median_ms": 0.03},
        "otdd, graph": {"median_ms": 0.02, "of_floor": 0.25},
        "otdd, unrolled": {"reason": "forward is that of otdd"},
        "torch loop": {"median_ms": 6.0, "ratio": 200.0},
    }
    gpu_report.put_row(path, row | {"contenders": contenders, "fastest_peer": "torch loop"})
    gpu_report.put_row(path, row | {"case": "tiny", "fatal": "the process ended"})
    gpu_report.put_row(path, {"case": "a step", "median_ms": 2000.0, "what": "stand-in"})
    results = gpu_report.read(path)
    assert results["parts"]["memcheck"]["says"] == [
        "========= ERROR SUMMARY: 0 errors",
        "3 passed in 1.2s",
    ]
    lines = gpu_report.table(results).splitlines()
    assert results["parts"]["test"]["says"] == []
    assert lines[1].startswith("memcheck: passed in 12 s")
    assert lines[2].startswith("test: ended with 1 in 3 s")
    assert lines[4:] == [
        "| small-64 float32 forward | 30.0 us | 20.0 us | - | 25 % | 6.00 ms torch loop, 200.0x |",
        "| tiny | - | the process ended |",
        "| a step | 2.00 s | stand-in |",
    ]


def test_what_settles_the_choice_between_cuda_and_triton():
    """The two side by side in one table, with the reason where one has no time."""
    row = {"case": "small-64", "dtype": "float32", "direction": "forward"}
    clouds = row | {"case": "clouds-2048-d3", "iterations": 50}

    def lines(row, **contenders):
        named = {name.replace("_", ", "): seen for name, seen in contenders.items()}
        results = {"parts": {}, "rows": [row | {"contenders": named}]}
        table = gpu_report.table(results).splitlines()
        head = "| " + " | ".join(gpu_report.CHOICE) + " |"
        return table[table.index(head) + 1 :] if head in table else []

    ms = lambda time, **more: {"median_ms": time, **more}  # noqa: E731
    assert lines(row, otdd=ms(2.0), otdd_triton=ms(3.0)) == [
        "| small-64 float32 forward | cuda | 2.00 ms | 3.00 ms | 1.50x |"
    ]
    assert lines(row, otdd=ms(2.0), otdd_triton={"reason": "too large"}) == [
        "| small-64 float32 forward | cuda | 2.00 ms | too large | - |"
    ]
    assert lines(clouds, otdd=ms(2.0, backend="triton"), otdd_cuda=ms(1.0)) == [
        "| clouds-2048-d3 float32 forward | triton | 1.00 ms | 2.00 ms | 0.50x, to be changed |"
    ]
    assert lines(clouds, otdd=ms(2.0, backend="triton"), otdd_cuda=ms(1.9)) == [
        "| clouds-2048-d3 float32 forward | triton | 1.90 ms | 2.00 ms | 0.95x |"
    ]
    assert not lines(row, otdd=ms(2.0))
    assert not lines(row, otdd=ms(2.0, backend="cpu"), otdd_triton=ms(1.0))


# Small problems for the sanitizers.


def layouts():
    return [(name, dtype) for name, dtype in gpu_small.programs() if "group" not in name]


def test_sanitized_problems_cover_every_layout_and_option():
    programs = list(gpu_small.programs())
    assert {dtype for _, dtype in programs} == set(gpu_small.DTYPES)
    for part in (*gpu_small.SHAPES, *gpu_small.OPTIONS, *gpu_small.COSTS, *gpu_small.LOGITS):
        assert sum(part in name for name, _ in programs) >= 2, part


@pytest.mark.parametrize(("name", "dtype"), layouts())
def test_sanitized_problems_agree_on_the_cpu(name, dtype, monkeypatch):
    if name.startswith("stream, "):  # what is large for a GPU alone
        monkeypatch.setitem(gpu_small.SHAPES, "stream", {dtype: (1, 700, 701)})
    assert gpu_small.check(name, dtype, "cpu", "cpu").startswith("ok: ")


LAYOUTS = """
#include <cstdio>

#include "cuda/emulator.h"
#include "cuda/layout.h"
#include "cuda/solver.h"

using namespace otdd::cuda;

template <class T>
void say(i64 B, i64 N, i64 M) {
  Chip chip = emulated_chip;
  chip.multiprocessors = 132;
  const Layout l = layout_of<T, Iterate<T>>(chip, B, N, M);
  const char* team = l.team == Team::kCluster ? "cluster" : "group";
  team = l.team == Team::kAlone ? "block" : team;
  team = l.kind == Layout::kWarp ? "warp" : l.kind == Layout::kStream ? "stream" : team;
  std::printf("%s %d\\n", team, l.slab.peers);
}

int main() { CALLS }
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_sanitized_problems_have_the_layout_of_their_name(tmp_path):
    expected = {
        "warp": "warp 1",
        "warp of narrow rows": "warp 1",
        "block": "block 1",
        "cluster of 8": "cluster 8",
        "cluster of 16": "cluster 16",
        "group": r"group \d+",
        "stream": r"stream \d+",
        "stream of many columns": r"stream \d+",
    }
    shapes = [(name, dtype) for name in expected for dtype in gpu_small.DTYPES]
    types = {"float32": "float", "float64": "double"}
    calls = [
        f"say<{types[dtype]}>({', '.join(map(str, gpu_small.SHAPES[name][dtype]))});"
        for name, dtype in shapes
    ]
    source, program = tmp_path / "layouts.cpp", tmp_path / "layouts"
    source.write_text(LAYOUTS.replace("CALLS", " ".join(calls)))
    flags = ["-std=c++17", "-DOTDD_EMULATED", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, source, "-o", program], check=True)
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    for (name, dtype), line in zip(shapes, told, strict=True):
        assert re.fullmatch(expected[name], line), f"{name}, {dtype}: {line}"


def test_sanitized_problems_tell_a_refusal():
    line = gpu_small.check("block, envelope", "float32", "cpu", "cuda")
    assert line.startswith("refused: block, envelope, float32: ")


# For scale.


def test_stand_in_has_the_shape_of_dit():
    model = gpu_scale.StandIn(layers=1, heads=2, width=16)
    z, labels = torch.randn(3, 4, 32, 32), torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert model(z, labels).shape == (3, 8, 32, 32)
        eps = gpu_scale.guided(model, lambda model, z, y: model(z, y), z, labels)
    assert eps.shape == (3, 3, 32, 32)


@pytest.mark.slow
def test_stand_in_does_the_products_of_dit():
    pytest.importorskip("diffusers")
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    with torch.device("meta"), torch.no_grad():
        told, model, predict = gpu_scale.dit(layers=28)
        stand_in = gpu_scale.StandIn(28, 16, 1152)
        z, labels = torch.randn(2, 4, 32, 32), torch.zeros(2, dtype=torch.int64)
        for run in (lambda: predict(model, z, labels), lambda: stand_in(z, labels)):
            with FlopCounterMode(display=False) as counter:
                run()
            flops.append(counter.get_total_flops())
    assert told == "diffusers"
    assert flops[1] == pytest.approx(flops[0], rel=0.01)
