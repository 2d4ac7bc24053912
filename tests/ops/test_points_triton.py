"""How the Triton kernels of `sinkhorn_points` are used: what is kept, how columns are cut."""

import pytest
import torch
from points_backends import points_backend
from references import clouds, cost_oracle, sinkhorn_oracle

from otdd.ops import pointers, sinkhorn_points
from otdd.ops.points import tiles

triton = pointers.triton_kernels("points")
SIZE = {torch.float32: 4, torch.float64: 8}


@pytest.mark.parametrize(
    ("problem", "metric", "precision", "plan"),
    [
        ((1, 100000, 100000, 3), "sqeuclidean", "highest", ("differences", "nothing", 1, 100000)),
        ((9, 5, 7, 16), "l2", "highest", ("differences", "resident", 9, 5)),
        ((9, 256, 256, 64), "sqeuclidean", "highest", ("product", "resident", 9, 256)),
        ((5000, 256, 256, 3), "l1", "highest", ("differences", "resident", 4096, 256)),
        ((9, 257, 256, 16), "l2", "highest", ("differences", "nothing", 9, 257)),
        ((64, 1024, 1024, 32), "sqeuclidean", "highest", ("product", "nothing", 64, 1024)),
        ((64, 1024, 1024, 33), "sqeuclidean", "highest", ("product", "all", 64, 1024)),
        ((64, 1024, 1024, 64), "sqeuclidean", "high", ("product", "nothing", 64, 1024)),
        ((1, 65536, 65536, 64), "sqeuclidean", "highest", ("product", "nothing", 1, 65536)),
        ((1, 65536, 65536, 65), "sqeuclidean", "highest", ("product", "panels", 1, 128)),
        ((64, 1024, 1024, 65), "sqeuclidean", "high", ("product", "all", 64, 1024)),
        ((900, 1024, 1024, 512), "sqeuclidean", "highest", ("product", "all", 256, 1024)),
        ((2, 16384, 16384, 512), "sqeuclidean", "highest", ("product", "all", 1, 16384)),
        ((2, 65536, 65536, 512), "sqeuclidean", "highest", ("product", "panels", 1, 128)),
        ((1, 10, 1 << 30, 512), "sqeuclidean", "highest", ("product", "panels", 1, 1)),
        ((1, 51, 1300, 4096), "l2", "highest", ("differences", "all", 1, 51)),
        ((1, 51, 1300, 4096), "l2", "medium", ("product", "all", 1, 51)),
        ((1, 51, 1300, 4096), "l1", "medium", ("differences", "all", 1, 51)),
    ],
)
def test_plan(problem, metric, precision, plan):
    assert tiles.plan_of(*problem, 4, metric, precision) == plan


def test_costs_in_float64_are_one_product():
    """Three products of TF32 are of float32 alone."""
    plan = tiles.plan_of(64, 1024, 1024, 64, 8, "sqeuclidean", "highest")
    assert plan == ("product", "nothing", 64, 1024)


@pytest.mark.parametrize("programs", [1, 7, 132, 5000])
@pytest.mark.parametrize("across", [1, 3, 4, 21, 2000])
@pytest.mark.parametrize("processors", [1, 132])
def test_splits(programs, across, processors):
    cuts = tiles.splits(programs, across, processors)
    assert cuts & (cuts - 1) == 0
    assert cuts == 1 or (cuts * programs <= 2 * processors and cuts * 4 <= across)
    fuller = 2 * cuts
    assert fuller * programs > 2 * processors or fuller * 4 > across


@pytest.mark.parametrize("processors", [1, 8, 100])
def test_cut_columns_change_nothing_but_rounding(monkeypatch, processors):
    x, y, a, b = clouds(1, 20, 900, 2, torch.float64)
    monkeypatch.setattr(triton, "_processors", lambda device: processors)
    monkeypatch.setattr(tiles, "RESIDENT", 0)
    options = {"eps": 0.5, "max_iter": 2}
    result = sinkhorn_points(x, y, a, b, **options, backend="triton")
    expected = sinkhorn_oracle(cost_oracle(x, y, "sqeuclidean"), a, b, **options)
    torch.testing.assert_close(result.f, expected["f"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.g, expected["g"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("highest", 0, 1e-5), ("medium", 1e-5, 1e-2)]
)
@pytest.mark.parametrize("way", ["triton", "triton stored"])
def test_precision_is_what_was_allowed(monkeypatch, way, precision, least, most):
    """The interpreter multiplies in bfloat16 where that is allowed, but not in TF32."""
    backend = points_backend(way, monkeypatch)
    x, y, a, b = clouds(1, 20, 30, 40, torch.float32)
    options = {"eps": 10.0, "max_iter": 3}
    r = sinkhorn_points(x, y, a, b, **options, precision=precision, backend=backend)
    C = cost_oracle(x.double(), y.double(), "sqeuclidean")
    plan = sinkhorn_oracle(C, a.double(), b.double(), **options)["plan"]
    error = (r.f - sinkhorn_oracle(C, a.double(), b.double(), **options)["f"]).abs().max().item()
    assert least <= error / C.max().item() <= most
    assert (r.plan - plan).abs().sum() < 0.2


def test_tf32_is_rounded_to_nearest():
    t = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-11 + 2**-20, -1 - 2**-10, 1e30, -3e-30, 0.0])
    want = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-10, -1 - 2**-10, 1e30, -3e-30, 0.0])
    torch.testing.assert_close(tiles.tf32(t), want, rtol=2**-11, atol=0)
    assert (tiles.tf32(t).view(torch.int32) & 0x1FFF == 0).all()
    assert tiles.tf32(t)[1:4].tolist() == want[1:4].tolist()


@pytest.mark.parametrize("resident", [0, 1 << 16])
def test_a_nan_stays_in_its_problem(resident, monkeypatch):
    """On a GPU values are not looked at: what a NaN, or a label that is none, makes must show."""
    x, y, a, b = clouds(3, 20, 30, 2, torch.float32)
    monkeypatch.setattr(tiles, "RESIDENT", resident)
    x[1, 3, 1] = torch.nan
    labels = torch.zeros(3, 20, dtype=torch.int64), torch.zeros(3, 30, dtype=torch.int64)
    labels[1][2, 5] = 7
    W, eps = torch.ones(3, 2, 2), torch.ones(3, dtype=torch.float64)
    p = triton.Clouds(x, y, a, b, eps, eps / 0, eps / 0, *labels, W)
    r = triton.points_triton(p, torch.zeros(3, 30), "sqeuclidean", 5, 1e-3, "highest")
    assert torch.isnan(r.cost).tolist() == [False, True, True]
    assert torch.isnan(r.marginal_error).tolist() == [False, True, True]
    assert torch.isfinite(r.f[0]).all()


def test_all_problems_stop_early(monkeypatch):
    launches = []
    monkeypatch.setattr(tiles, "RESIDENT", 0)
    monkeypatch.setattr(triton, "_softmin", _counted(triton._softmin, launches))
    x, y, a, b = clouds(2, 20, 30, 2, torch.float64)
    options = {"eps": 3.0, "max_iter": 10000, "tol": 1e-4, "backend": "triton"}
    r = sinkhorn_points(x, y, a, b, **options)
    assert r.converged.all()
    assert len(launches) == 2 * (r.n_iter.max() + 1)


@pytest.mark.parametrize("max_iter", [1, 7])
@pytest.mark.parametrize("tol", [0.0, 1e-30])
def test_few_points_take_a_few_launches_whatever_the_iterations(max_iter, tol, monkeypatch):
    """That the values are right is for the way ``triton resident`` of the shared cases."""
    launches, solves = [], pointers.triton_kernels("sinkhorn").triton_solve
    of_tiles = [f"{name}_kernel" for name in ("softmin", "merge", "decide", "tile")]
    of_one = ["solve_resident", "solve_streamed", "values"]
    for module, names in ((triton.kernels, of_tiles), (solves, of_one)):
        for name in names:
            kernel = _Launched(name, getattr(module, name), launches)
            monkeypatch.setattr(module, name, kernel)
    x, y, a, b = clouds(3, 20, 30, 20, torch.float32)
    r = sinkhorn_points(x, y, a, b, eps=9.0, max_iter=max_iter, tol=tol, backend="triton")
    assert (r.n_iter == max_iter).all()
    assert launches == ["tile_kernel", "solve_resident", "values"]


def test_a_schedule_of_few_points():
    """Its levels have a tolerance for each problem, which the one launch has not."""
    x, y, a, b = clouds(2, 9, 12, 3, torch.float64)
    options = {"eps": 0.5, "max_iter": 40, "schedule": 0.1}
    seen, want = (
        sinkhorn_points(x, y, a, b, **options, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(seen.n_iter, want.n_iter)
    torch.testing.assert_close(seen.value, want.value, rtol=1e-10, atol=1e-10)


class _Launched:
    """Notes down a kernel's launches."""

    def __init__(self, name, kernel, launches):
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


def _counted(call, calls):
    def run(*args, **kwargs):
        calls.append(args)
        return call(*args, **kwargs)

    return run
