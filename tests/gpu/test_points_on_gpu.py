"""`sinkhorn_points` on a GPU, by each backend, at sizes that no interpreter does.

The bodies are in tests/points_on_device.py; tests/ops/test_points_on_device.py runs them on the
CPU.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import points_on_device as checks
import pytest
import torch
from points_backends import points_backend
from references import clouds

from otdd.ops import graphs, sinkhorn_points
from otdd.ops.points import tiles

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
WAYS = (*BACKENDS, "triton stored", "triton panels")
SIZES = [
    (1, 3000, 2500, 3),
    (1, 3000, 2500, 64),
    (1, 3000, 2500, 100),
    (1, 3000, 2500, 1024),
    (5, 700, 900, 64),
    (5, 16, 9, 3),
]
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/precision.json"
PRECISIONS = [
    row
    for row in json.loads(RESULTS.read_text())["rows"]
    if row["precision"] in ("highest", "high") and (row["N"], row["eps"]) != (50, 0.005)
]


def in_this_way(way, monkeypatch):
    backend = points_backend(way, monkeypatch)
    if way == "triton panels":
        monkeypatch.setattr(tiles, "PANEL", 1 << 20)  # of some rows, not of one
    return backend


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_oracle(size, way, monkeypatch):
    checks.agrees(in_this_way(way, monkeypatch), size, torch.float32, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(5, 16, 9, 3), (3, 64, 64, 64), (2, 250, 200, 100)])
def test_few_points_in_one_launch(size, dtype, monkeypatch):
    checks.agrees(points_backend("triton resident", monkeypatch), size, dtype, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[4]])
def test_agrees_in_float64(size, backend):
    checks.agrees(backend, size, torch.float64, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(3, 700, 900, 3), (3, 700, 900, 64)])
def test_zero_weights(size, backend):
    checks.agrees(backend, size, torch.float32, DEVICE, zeros=True)


@pytest.mark.parametrize("way", WAYS)
def test_labels(way, monkeypatch):
    checks.with_labels(in_this_way(way, monkeypatch), (3, 700, 900, 20), DEVICE)


@pytest.mark.parametrize("way", WAYS)
def test_between_data_sets(way, monkeypatch):
    checks.between_data_sets(in_this_way(way, monkeypatch), (300, 250), 5, DEVICE)


@pytest.mark.parametrize("row", PRECISIONS, ids=lambda row: "-".join(map(str, row.values())))
def test_products_keep_their_digits(row):
    checks.plan_keeps_digits("triton", row, DEVICE)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_twice(way, monkeypatch):
    checks.repeats(in_this_way(way, monkeypatch), (2, 1500, 1300, 64), DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [3, 64, 100])
def test_a_nan_stays_in_its_own_problem(D, backend, monkeypatch):
    checks.nan_stays(backend, (3, 300, 200, D), DEVICE, monkeypatch)


def without_sync(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [3, 64, 100])
def test_tolerance_without_waiting(D, backend):
    checks.tolerance_holds(backend, (4, 600, 500, D), DEVICE, without_sync, 0.2, 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(4, 300, 200, 3), (1, 2500, 2000, 64)])  # plan kept, or not
def test_fixed_point_without_waiting(size, backend):
    checks.fixed_point(backend, size, DEVICE, without_sync)


def capture(step):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay():
        graph.replay()
        return outputs

    return replay


@pytest.mark.parametrize("way", WAYS)
def test_captured_in_a_cuda_graph(way, monkeypatch):
    checks.captured(in_this_way(way, monkeypatch), (2, 700, 900, 64), DEVICE, capture)


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_with_a_tolerance(backend):
    checks.captured(backend, (2, 700, 900, 64), DEVICE, capture, tol=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_another_stream(way, monkeypatch):
    backend = in_this_way(way, monkeypatch)
    x, y, a, b = (t.to(DEVICE) for t in clouds(1, 1500, 1300, 64, torch.float32))
    options = {"eps": 10.0, "max_iter": 30, "backend": backend}
    want = sinkhorn_points(x, y, a, b, **options)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10_000_000)  # the solve must come after what is in its stream
        late += x
        seen = sinkhorn_points(late, y, a, b, **options)
    stream.synchronize()
    assert torch.equal(seen.f, want.f)
    assert torch.equal(seen.value, want.value)


@pytest.mark.parametrize("tol", [0.0, 1e-3])
@pytest.mark.parametrize("way", WAYS[1:])
def test_replayed_steps_are_the_same_bits(way, tol, monkeypatch):
    """Also from two threads at once, each with a graph of its own."""
    backend = in_this_way(way, monkeypatch)
    clouds_of = [[t.to(DEVICE) for t in clouds(1, 900 + n, 800, 64, torch.float32)] for n in (0, 1)]
    options = {"eps": 10.0, "max_iter": 101, "tol": tol, "backend": backend}
    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(lambda given: sinkhorn_points(*given, **options), clouds_of * 5))
    monkeypatch.setattr(graphs, "_can_capture", lambda device: False)
    want = [sinkhorn_points(*given, **options) for given in clouds_of] * 5
    for got, one in zip(seen, want, strict=True):
        for name in ("f", "g", "value", "cost", "marginal_error", "n_iter"):
            assert torch.equal(getattr(got, name), getattr(one, name)), name


def test_replays_do_not_wait():
    """Of 1000 iterations 16 are launched one by one."""
    x, y, a, b = (t.to(DEVICE) for t in clouds(1, 2048, 2048, 64, torch.float32))
    options = {"eps": 10.0, "max_iter": 1000, "backend": "triton"}
    sinkhorn_points(x, y, a, b, **options)
    r = without_sync(lambda: sinkhorn_points(x, y, a, b, **options))
    assert torch.isfinite(r.value).all()


def test_large_clouds_take_little_memory():
    torch.cuda.empty_cache()
    checks.large("triton", (1, 65536, 65536, 3), DEVICE)


def test_large_clouds_are_for_triton():
    x = torch.rand(10000, 3, device=DEVICE)
    assert sinkhorn_points(x, x, eps=0.1, max_iter=2).backend == "triton"
