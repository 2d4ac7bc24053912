"""Steps that are replays of a graph: as many as were asked for, with the same results."""

import pytest
import torch
from references import clouds
from torch.utils._python_dispatch import TorchDispatchMode

from otdd.ops import graphs, sinkhorn_points
from otdd.ops.points import tiles, triton

CPU = torch.device("cpu")


class Recorder:
    """Captures as a GPU does: what a step launches is kept, not done, until it is replayed."""

    def __init__(self):
        self.captured, self.replayed = [], 0

    def capture(self, step, size, device):
        self.captured.append(size)

        def replay():
            self.replayed += 1
            for _ in range(size):
                step(2)

        return replay


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(graphs, "_can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "_captured", made.capture)
    return made


@pytest.mark.parametrize("launches", [1, 4, 5, 100, 255, 256, 257, 5000])
@pytest.mark.parametrize("times", [0, 1, 2, 3, 4, 5, 17, 18, 19, 50, 100])
def test_every_step_is_done_once(times, launches, recorder):
    seen = []
    told = list(graphs.repeated(seen.append, times, launches, CPU))
    assert len(seen) == times
    assert seen[:2] == [0, 1][:times]
    assert all(later >= 2 for later in seen[2:])
    assert told == sorted(set(told))
    assert (told[-1] if told else 0) == times
    for size in recorder.captured:
        assert size * launches <= max(graphs.LAUNCHES, launches)
        assert size <= graphs.STEPS
        assert recorder.replayed == (times - 2) // size


@pytest.mark.parametrize(("times", "eager"), [(50, 2), (100, 4)])
def test_the_host_launches_few_of_them(times, eager, recorder):
    seen = []
    for _ in graphs.repeated(seen.append, times, 4, CPU):
        pass
    assert recorder.captured == [8]
    assert times - 8 * recorder.replayed == eager


def test_what_is_told_can_end_it(recorder):
    seen = []
    for done in graphs.repeated(seen.append, 1000, 4, CPU):
        if done >= 30:
            break
    assert len(seen) == done == 34


def test_none_in_a_capture_of_somebody_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not graphs._can_capture(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs._can_capture(torch.device("cuda", 0))
    assert not graphs._can_capture(CPU)


@pytest.fixture(params=["nothing", "all", "panels"])
def problem(request, monkeypatch):
    """Clouds whose costs are made in each pass, kept whole, or kept in panels."""
    way = request.param
    monkeypatch.setattr(tiles, "RESIDENT", 0)
    if way == "panels":
        monkeypatch.setattr(tiles, "STORED", 0)
        monkeypatch.setattr(tiles, "PANEL", 8 * 14 * 8)
    x, y, a, b = clouds(1, 16, 14, 3 if way == "nothing" else 20, torch.float64)
    assert tiles.plan_of(1, 16, 14, x.shape[-1], 8, "l1", "highest").keep == way
    return x, y, a, b


@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_replays_give_the_same_bits(problem, tol, monkeypatch, recorder):
    monkeypatch.setattr(graphs, "STEPS", 2)
    eps = 0.5 if problem[0].shape[-1] == 3 else 1.0  # a few iterations to 1e-2
    options = {"metric": "l1", "eps": eps, "max_iter": 11, "tol": tol, "backend": "triton"}
    seen = sinkhorn_points(*problem, **options)
    assert recorder.captured == [2]
    assert recorder.replayed > 1
    monkeypatch.setattr(graphs, "_can_capture", lambda device: False)
    want = sinkhorn_points(*problem, **options)
    for name in ("f", "g", "value", "cost", "marginal_error", "n_iter"):
        assert torch.equal(getattr(seen, name), getattr(want, name)), name
    assert bool((want.n_iter < 11).all()) == (tol > 0)


@pytest.mark.parametrize("tol", [0.0, 1e-30])
def test_a_step_allocates_nothing(problem, tol, monkeypatch, recorder):
    """Memory of a capture goes with the graph, while its last replays may be under way."""
    made = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
            known = {t.untyped_storage().data_ptr() for t in given}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                made.append(str(func))
            return out

    def capture(step, size, device):
        def replay():
            with monkeypatch.context() as patch, Allocations():
                for name in ("softmin_kernel", "merge_kernel", "tile_kernel", "decide_kernel"):
                    patch.setattr(triton.kernels, name, Nothing())  # the interpreter allocates
                step(2)
            recorder.replayed += 1

        return replay

    monkeypatch.setattr(graphs, "_captured", capture)
    monkeypatch.setattr(graphs, "STEPS", 1)
    monkeypatch.setattr(triton, "splits", lambda *sizes: 2)  # of which the parts are kept aside
    options = {"metric": "l1", "eps": 2.0, "max_iter": 6, "tol": tol, "backend": "triton"}
    sinkhorn_points(*problem, **options)
    assert recorder.replayed == 4
    assert made == []


class Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None
