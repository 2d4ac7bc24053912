"""Batches of tiny problems, which the native solver takes one in each lane of a register."""

import pytest
import torch
from references import problem, sinkhorn_oracle

from otdd.ops import sinkhorn

SIZES = [(1, 1), (1, 9), (9, 1), (5, 7), (16, 16), (32, 16), (3, 100)]
DTYPES = [(torch.float64, 1e-15), (torch.float32, 6e-8)]


def agree(result, C, a, b, eps, max_iter, unit):
    wide = [t.double() for t in (C, a, b)]
    expected = sinkhorn_oracle(*wide, eps=eps, max_iter=max_iter)
    ratio = (C.amax() / torch.as_tensor(eps).min()).item()
    error = (result.plan.double() - expected["plan"]).abs().sum((1, 2)).max().item()
    assert error <= unit * (40 + 10 * ratio)
    scale = C.amax().item()
    for name in ("f", "g", "value", "cost", "marginal_error"):
        seen = getattr(result, name).double()
        tol = 200 * unit + 1e-16 * ratio  # the oracle loses the latter itself
        torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol * scale, msg=name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("B", [16, 37])
@pytest.mark.parametrize(("dtype", "unit"), DTYPES)
def test_values(size, B, dtype, unit):
    C, a, b = problem(B, *size, dtype)
    eps = torch.linspace(0.02, 1, B, dtype=torch.float64)
    for max_iter in (1, 2, 30):
        result = sinkhorn(C, a, b, eps=eps, max_iter=max_iter, backend="cpu")
        agree(result, C, a, b, eps, max_iter, unit)
        assert (result.n_iter == max_iter).all()


@pytest.mark.parametrize("ratio", [1e0, 1e2, 1e3, 1e5])
@pytest.mark.parametrize("decades", [0.0, 6.0, 12.0])
@pytest.mark.parametrize(("dtype", "unit"), DTYPES)
def test_every_ratio_of_cost_to_eps(ratio, decades, dtype, unit):
    C, a, b = problem(21, 12, 14, dtype, decades)
    C[::2] **= 8
    for max_iter in (1, 3, 30):
        result = sinkhorn(C, a, b, eps=1 / ratio, max_iter=max_iter, backend="cpu")
        agree(result, C, a, b, 1 / ratio, max_iter, unit)


@pytest.mark.parametrize(("dtype", "unit"), DTYPES)
def test_a_lane_knows_nothing_of_its_neighbours(dtype, unit):
    C, a, b = problem(40, 8, 9, dtype)
    eps = torch.full((40,), 0.1, dtype=torch.float64)
    expected = sinkhorn(C, a, b, eps=eps, max_iter=40, backend="cpu")
    C[1::3] *= 1e4  # these need a new K at other times
    a[2::9, 3:], b[2::9, 4:] = 0, 0  # and these are solved elsewhere
    seen = sinkhorn(C, a, b, eps=eps, max_iter=40, backend="cpu")
    for name in ("f", "g", "value", "cost", "marginal_error"):
        for k in range(40):
            if k % 3 != 1 and k % 9 != 2:
                assert torch.equal(getattr(seen, name)[k], getattr(expected, name)[k])
            else:
                assert torch.isfinite(getattr(seen, name)[k]).all()
    alone = sinkhorn(C[2], a[2], b[2], eps=0.1, max_iter=40, backend="cpu")
    torch.testing.assert_close(seen.plan[2], alone.plan)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-7), (torch.float32, 1e-4)])
def test_tolerance_stops_each_problem_by_itself(dtype, tol):
    C, a, b = problem(40, 10, 12, dtype)
    C[::4] *= 30
    eps = torch.logspace(-2, 0, 40, dtype=torch.float64)
    many = sinkhorn(C, a, b, eps=eps, max_iter=400, tol=tol, backend="cpu")
    assert many.n_iter.unique().numel() > 5
    for k in range(40):
        alone = sinkhorn(C[k], a[k], b[k], eps=float(eps[k]), max_iter=400, tol=tol, backend="cpu")
        assert abs(int(many.n_iter[k]) - int(alone.n_iter)) <= (dtype == torch.float32)
        assert bool(many.converged[k]) == bool(alone.converged)
        torch.testing.assert_close(many.cost[k], alone.cost, rtol=1e-3, atol=tol)


def test_threads_and_nan():
    C, a, b = problem(100, 16, 16, torch.float32)
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(sinkhorn(C, a, b, eps=0.01, max_iter=20, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert torch.equal(seen[0].f, other.f)
        assert torch.equal(seen[0].cost, other.cost)
    C[57, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"C: got nan at index \(57, 3, 4\)"):
        sinkhorn(C, a, b, eps=0.01, backend="cpu")


NO_NUMBERS = [(name, bad) for name in ("eps", "a", "b", "init") for bad in (torch.nan, torch.inf)]


@pytest.mark.parametrize(
    ("name", "bad"), [*NO_NUMBERS, ("eps", 0), ("eps", -1), ("a", -1), ("b", -1)]
)
@pytest.mark.parametrize("place", [0, 3, -1])
@pytest.mark.parametrize(("dtype", "unit"), DTYPES)
def test_bad_numbers_are_refused(name, bad, place, dtype, unit):
    """In any problem and of any point, beside others that are as they should be."""
    C, a, b = problem(21, 7, 9, dtype)
    eps, g = torch.full((21,), 0.5, dtype=torch.float64), torch.zeros_like(b)
    {"eps": eps, "a": a, "b": b, "init": g}[name][(place,) if name == "eps" else (place, place)] = (
        bad
    )
    with pytest.raises(ValueError, match=f"^{name}: got"):
        sinkhorn(C, a, b, eps=eps, init=(None, g), max_iter=5, backend="cpu")
