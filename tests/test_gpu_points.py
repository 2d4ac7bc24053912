"""The GPU benchmark of clouds without a GPU: contenders, errors, floors, rows."""

import importlib.machinery
import json
import sys
import types
from dataclasses import replace

import cases
import gpu_cases
import gpu_contenders
import gpu_floors
import gpu_measure
import gpu_points
import gpu_report
import measure
import pytest
import test_gpu
import torch
from contender import DISAGREES, ROWS_MET
from references import clouds_oracle

from otdd import backends
from otdd.ops.points import dense, tiles

TINY = [gpu_cases.clouds(1, 12, 3), gpu_cases.clouds(2, 10, 20)]
TINY = [replace(case, name=case.name, iterations=4) for case in TINY]
ON_CPU = [
    contender
    for contender in gpu_points.CONTENDERS
    if not any(word in contender.name for word in ("graph", "compile", "KeOps"))
]
CHIP = gpu_floors.Chip("made up", multiprocessors=100, l2=1 << 20, shared=1 << 24, memory=1 << 34)
RATE = {"copy": 1e12, "fma": 1e13, "exp": 1e12, "shared": 1e13, "tf32": 1e14}
interpreted = pytest.mark.skipif(
    backends.available()["triton"] is not None or not backends.INTERPRETED,
    reason="needs the interpreter of Triton",
)


@interpreted
@pytest.mark.parametrize("contender", ON_CPU, ids=lambda c: c.name)
@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_contenders_agree_with_the_oracle_or_say_why_not(case, contender):
    data = cases.make(case, torch.float32)
    truth = gpu_points.Truth(case, "float32", data)
    bound = 3e-3 if "high" in contender.name else 1e-4
    for direction in case.directions:
        row, run = gpu_measure.prepare(contender, case, truth, [data], direction)
        if run is None:
            assert row["reason"] != DISAGREES, row
            assert "Error" not in row["reason"], row
            assert contender.name not in ("otdd", "otdd, triton", "otdd, high", "torch loop"), row
            continue
        assert row["value_error"] < bound
        assert row["gradient_error"] < bound
        if contender.solution is not None:
            assert 0 < row["plan_error"] < bound
        if contender.name.startswith("otdd"):
            assert row["backend"] == ("triton" if "triton" in contender.name else "cpu")


def test_what_otdd_chooses_is_not_timed_twice(monkeypatch):
    contender = gpu_points.otdd("otdd, cpu", "cpu")
    case, data = TINY[0], cases.make(TINY[0], torch.float32)
    truth = gpu_points.Truth(case, "float32", data)
    row, run = gpu_measure.prepare(contender, case, truth, [data], "forward")
    assert (row["reason"], run) == ("is what otdd chooses", None)
    refused = gpu_points.otdd("otdd, cuda", "cuda")
    monkeypatch.setitem(backends._REASONS, "cuda", None)
    row, _ = gpu_measure.prepare(refused, case, truth, [data], "forward")
    assert row["reason"].startswith("sinkhorn_points: backend='cuda' cannot be used: the inputs")


def test_cuda_is_timed_beyond_its_border():
    """Else a border that is too low would never show."""
    largest = max(case.N for case in gpu_cases.CLOUDS if case.N**2 <= gpu_points.BEYOND)
    x, entries = torch.empty(0), (largest, largest, None)
    refused = dense.cuda_refusal(x, *entries)
    with gpu_points.border("cuda"):
        assert dense.cuda_refusal(x, *entries) is None
    with gpu_points.border(None):
        assert dense.cuda_refusal(x, *entries) == refused
    assert largest**2 > dense.CUDA
    assert refused == f"{largest**2} costs; the CUDA kernels keep at most {dense.CUDA}"


@interpreted
@pytest.mark.parametrize(
    ("D", "usual", "keep"),
    [(3, "nothing", "all"), (20, "nothing", "all"), (40, "all", "nothing"), (40, "all", "all")],
)
def test_both_ways_to_costs_are_timed(D, usual, keep, monkeypatch):
    """Else borders between them would never show."""
    case = cases.Case("clouds", "points", 1, 9, 8, D, "sqeuclidean", stored=False, iterations=3)
    data = cases.make(case, torch.float32)
    truth = gpu_points.Truth(case, "float32", data)
    other = gpu_points.otdd("otdd, triton, otherwise", "triton", keep=keep)
    row, _ = gpu_measure.prepare(other, case, truth, [data], "forward")
    assert row["reason"] == "is what triton does"  # few costs
    monkeypatch.setattr(tiles, "RESIDENT", 0)
    assert gpu_points.keeps(case, data, "highest") == usual
    row, run = gpu_measure.prepare(other, case, truth, [data], "forward")
    if keep == usual:
        assert row["reason"] == "is what triton does"
    else:
        assert run is not None, row
        assert row["value_error"] < 1e-4
    assert gpu_points.keeps(case, data, "highest") == usual


@interpreted
def test_ways_to_costs_that_cannot_be(monkeypatch):
    case = cases.Case("clouds", "points", 1, 9, 8, 65, "sqeuclidean", stored=False, iterations=3)
    data = cases.make(case, torch.float32)
    truth = gpu_points.Truth(case, "float32", data)
    monkeypatch.setattr(tiles, "RESIDENT", 0)
    remade = gpu_points.otdd("otdd, triton, remade", "triton", keep="nothing")
    row, _ = gpu_measure.prepare(remade, case, truth, [data], "forward")
    assert row["reason"] == "has too many features to make costs again"
    monkeypatch.setattr(tiles, "STORED", 0)
    kept = gpu_points.otdd("otdd, triton, kept", "triton", keep="all")
    row, _ = gpu_measure.prepare(kept, case, truth, [data], "forward")
    assert row["reason"] == "has no room for all costs"


def test_a_backend_that_a_solve_lacks_is_a_reason(monkeypatch):
    case = cases.Case("given", "given", 3, 6, 5, iterations=4)
    data = cases.make(case, torch.float64)
    truth = gpu_measure.Truth(case, "float64", data)
    by = {c.name: c for c in gpu_contenders.CONTENDERS}
    monkeypatch.setitem(backends._REASONS, "triton", "is not here")
    for name in ("otdd, triton", "otdd, triton, unrolled"):
        row, run = gpu_measure.prepare(by[name], case, truth, [data], "forward+backward")
        assert run is None
        assert "is not here" in row["reason"]
        assert "Error" not in row["reason"]
    assert {"otdd, triton, graph", "otdd, triton, unrolled, graph"} <= set(by)


# flash-sinkhorn needs a GPU: a stand-in with its arguments, iterates and gradient.


class SamplesLoss:
    def __init__(
        self, loss, *, backend, use_epsilon_scaling, eps, n_iters, debias, normalize, allow_tf32,
        potentials=False,
    ):  # fmt: skip
        assert (loss, backend) == ("sinkhorn", "alternating")
        assert (use_epsilon_scaling, debias, normalize) == (False, False, False)
        self.options, self.potentials = {"eps": eps, "max_iter": n_iters}, potentials

    def __call__(self, a, x, b, y):
        assert [t.dim() for t in (a, x, b, y)] == [1, 2, 1, 2]
        problem = (t.detach().unsqueeze(0) for t in (x, y, a, b))
        s = {name: t[0].float() for name, t in clouds_oracle(*problem, **self.options).items()}
        if self.potentials:
            return s["f"], s["g"]
        return s["value"] + ((x - x.detach()) * s["dx_met"]).sum()


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_flash_sinkhorn_is_asked_for_our_problem(case, monkeypatch):
    module = types.ModuleType("flash_sinkhorn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_sinkhorn", None)
    module.SamplesLoss = SamplesLoss
    module._center_coords = lambda x, y, a, b, batched: (x - 1, y - 1)
    module._round_to_tf32 = lambda t: t
    for name in ("flash_sinkhorn", "flash_sinkhorn.samples_loss"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gpu_points, "tune_in_parallel", lambda: None)
    data = cases.make(case, torch.float32)
    truth = gpu_points.Truth(case, "float32", data)
    for contender in gpu_points.FLASH:
        assert contender.gradient == ROWS_MET
        for direction in case.directions:
            row, run = gpu_measure.prepare(contender, case, truth, [data], direction)
            assert run is not None, row
            assert max(row["value_error"], row["gradient_error"], row["plan_error"]) < 1e-5


class Tuner:
    """Of Triton, as far as it is used."""

    def __init__(self, fails=False):
        self.fails, self.calls = fails, []

    def warmup(self, *args, grid, **options):
        self.calls.append(("compiled", args, options))
        if self.fails:
            raise RuntimeError

    def run(self, *args, grid, warmup, **options):
        self.calls.append(("run", args, options))
        return "ran"


@pytest.mark.parametrize("fails", [False, True])
def test_tiles_are_compiled_before_they_are_timed_once_for_each_kernel(fails):
    pytest.importorskip("triton")
    tuner = Tuner(fails)
    gpu_points.compiled_first(tuner)
    for n, D in ((64, 3), (96, 3), (64, 64)):
        options = {"CACHE_KEY_N": n // 32, "CACHE_KEY_M": n // 32, "D": D}
        assert tuner.run(n, grid=len, warmup=False, **options) == "ran"
    told = [(what, args[0], options["D"]) for what, args, options in tuner.calls]
    assert told == [
        ("compiled", 64, 3), ("run", 64, 3), ("run", 96, 3), ("compiled", 64, 64), ("run", 64, 64),
    ]  # fmt: skip
    assert tuner._do_bench.keywords == {"warmup": 5, "rep": 25}


# Rows and floors.


def test_floors_by_hand():
    case = cases.Case("c", "points", 1, 1000, 1000, 64, "sqeuclidean", 50, stored=False)
    size, points = 1e6, 4 * 2000 * 64
    works = gpu_floors.cloud_works(case, "forward", 3, 4, CHIP.shared)
    slots = 2 * size * 51
    remade = gpu_floors.Work(points, 0, slots, size * 50, 3 * size * 64 * 50)
    kept = gpu_floors.Work(points, 4 * size * 50, slots, size, 3 * size * 64)
    assert works == {"remade": remade, "kept": kept}
    backward = gpu_floors.cloud_works(case, "forward+backward", 1, 4, on_chip=1000)
    assert backward["remade"].products == size * 64 * 52
    assert backward["remade"].exps == size * 51
    moved = 2 * points + points / 2
    assert backward["remade"].bytes == moved + 49 * points
    assert backward["kept"].bytes == moved + 4 * size * 52
    assert (backward["kept"].shared, backward["kept"].products) == (0, size * 64 * 2)
    row = gpu_floors.floors(works, RATE, 1.0)
    assert row["floors"]["remade"]["ms"] == pytest.approx(1e3 * 3 * size * 64 * 50 / 1e14)
    assert row["floors"]["remade"]["binds"] == "products"
    assert row["floor_ms"] == pytest.approx(1e3 * 4 * size * 50 / 1e13)
    assert (row["binds"], row["of_floor"]) == ("shared memory", row["floor_ms"])


@pytest.mark.parametrize("case", gpu_cases.CLOUDS, ids=lambda c: c.name)
def test_less_work_is_a_lower_floor(case):
    def least(direction, products):
        works = gpu_floors.cloud_works(case, direction, products, 4, CHIP.shared)
        return gpu_floors.floors(works, RATE, 1.0)["floor_ms"]

    assert 0 < least("forward", 1) <= least("forward", 3) <= least("forward+backward", 3)


def test_the_rows_of_issue_5():
    clouds = {(case.N, case.D): case for case in gpu_cases.CLOUDS if case.B == 1}
    assert set(clouds) == {(N, D) for N in (2048, 4096, 16384, 65536) for D in (3, 64, 512, 1024)}
    assert all(c.iterations == (10 if c.N == 65536 else 50) for c in clouds.values())
    names = {case.name: case.directions for case in gpu_cases.CLOUDS}
    assert all(direction in names[name] for name, direction in gpu_cases.UNASKED)
    row = {"case": "clouds-65536-d64", "direction": "forward"}
    assert not test_gpu.asked(row, "")
    assert not test_gpu.asked(row, "clouds and not clouds-65536-d3")
    assert test_gpu.asked(row, "small or clouds-65536-d64")
    assert test_gpu.asked({"case": "clouds-2048-d64", "direction": "forward"}, "clouds")
    assert test_gpu.asked({"case": "small-64", "direction": "forward"}, "")


@interpreted
def test_a_row_is_measured(monkeypatch):
    """With the CPU and its clock in place of the GPU's."""
    monkeypatch.setattr(gpu_measure, "GPU", torch.device("cpu"))
    monkeypatch.setattr(gpu_measure, "works", lambda: True)
    monkeypatch.setattr(gpu_measure, "BUDGET", measure.Budget(seconds=1e-3, call=1.0, rounds=2))
    monkeypatch.setattr(gpu_floors, "seconds", measure.by_wall_clock)
    monkeypatch.setattr(gpu_contenders, "new_pool", lambda: None)
    wanted = ("otdd", "otdd, cuda", "otdd, triton", "torch loop", "otdd, graph")
    few = [contender for contender in gpu_points.CONTENDERS if contender.name in wanted]
    monkeypatch.setattr(gpu_points, "CONTENDERS", few)
    row = gpu_measure.measure(TINY[0], "float32", "forward+backward", CHIP, RATE)
    assert (row["sets"], row["iterations"], row["fastest_peer"]) == (4, 4, "torch loop")
    seen = row["contenders"]
    assert list(seen) == ["otdd", "otdd, cuda", "otdd, triton", "torch loop", "otdd, graph"]
    assert "cannot be used" in seen["otdd, cuda"]["reason"]
    for name in ("otdd", "otdd, triton", "torch loop"):
        assert seen[name]["of_floor"] == seen[name]["floor_ms"] / seen[name]["median_ms"]
        assert set(seen[name]["floors"]) == {"remade", "kept"}
        assert 0 < seen[name]["plan_error"] < 1e-5
    assert row["lead"]["otdd"]["peer"] == "torch loop"
    lines = gpu_report.lines_of_clouds(json.loads(json.dumps(row)))
    assert lines[0][1] == "otdd (cpu)"
    assert len(lines) == 5
    assert gpu_report.of_clouds(row)


def test_speed_is_compared_at_equal_error():
    rows = {
        "otdd": {"median_ms": 2.0, "plan_error": 1e-6},
        "otdd, graph": {"median_ms": 1.0, "value_error": 1e-6, "gradient_error": 0.0},
        "otdd, high": {"median_ms": 1.0, "plan_error": 4e-4},
        "otdd, cuda": {"reason": "is what otdd chooses"},
        "flash-sinkhorn": {"median_ms": 9.0, "plan_error": 3e-6},
        "flash-sinkhorn, TF32": {"median_ms": 4.0, "plan_error": 7e-4},
        "geomloss KeOps": {"median_ms": 8.0, "value_error": 1e-6, "gradient_error": 2e-4},
        "torch loop": {"reason": "keeps the costs"},
    }
    assert gpu_points.lead(rows) == {
        "otdd": {"peer": "flash-sinkhorn", "ratio": 4.5},
        "otdd, graph": {"peer": "flash-sinkhorn", "ratio": 9.0},
        "otdd, high": {"peer": "flash-sinkhorn, TF32", "ratio": 4.0},
    }


def test_clouds_have_a_table_of_their_own(tmp_path):
    path = tmp_path / "made_up.json"
    row = {"case": "clouds-2048-d3", "dtype": "float32", "direction": "forward", "iterations": 50}
    ours = {"median_ms": 0.5, "plan_error": 2e-6, "gradient_error": 0.0, "backend": "cuda"}
    ours |= {"of_floor": 0.25, "binds": "exps"}
    lead = {"otdd": {"peer": "torch loop", "ratio": 12.0}}
    contenders = {"otdd": ours, "flash-sinkhorn": {"reason": "flash_sinkhorn is not installed"}}
    gpu_report.put_row(path, row | {"contenders": contenders, "lead": lead})
    gpu_report.put_row(path, {"case": "a step", "median_ms": 2000.0, "what": "stand-in"})
    lines = gpu_report.table(gpu_report.read(path)).splitlines()
    assert lines[-5:] == [
        "| " + " | ".join(gpu_report.HEAD) + " |",
        "| a step | 2.00 s | stand-in |",
        "| " + " | ".join(gpu_report.CLOUDS) + " |",
        "| clouds-2048-d3 forward, 50 iterations | otdd (cuda) | 500.0 us "
        "| 12.00x of torch loop | 2.0e-06 | 0.0e+00 | 25 % (exps) |",
        "| clouds-2048-d3 forward, 50 iterations | flash-sinkhorn "
        "| flash_sinkhorn is not installed |",
    ]
