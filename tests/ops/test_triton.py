"""What the shared cases don't show of the Triton backend: tiles, refusals, launches."""

import importlib

import pytest
import torch
from references import problem, sinkhorn_oracle

from otdd.backends import BackendError
from otdd.ops import cost_matrix, sinkhorn
from otdd.ops.pointers import triton_kernels
from otdd.ops.points import tiles as points_tiles

FIELDS = ("f", "g", "plan", "value", "cost", "marginal_error")
backend = pytest.mark.parametrize("backend", ["triton"])


@pytest.fixture
def tiles(monkeypatch, backend):
    """Problems are solved in tiles of 8x4, not in registers."""
    monkeypatch.setattr(triton_kernels("sinkhorn"), "layout", lambda *_: (False, (8, 4), 4))


@backend
@pytest.mark.parametrize("size", [(3, 2), (11, 9), (8, 12)])
@pytest.mark.parametrize("rho", [None, 0.3])
def test_solves_in_tiles(backend, size, rho, tiles):
    C, a, b = (t.requires_grad_() for t in problem(2, *size))
    options = {"eps": 0.05, "max_iter": 4} | ({} if rho is None else {"rho_a": rho})
    result = sinkhorn(C, a, b, grad="unrolled", backend=backend, **options)
    expected = sinkhorn_oracle(C, a, b, **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(result, name), expected[name], rtol=1e-11, atol=1e-12)
    got = torch.autograd.grad((result.value + result.cost).sum() + result.f.sum(), (C, a, b))
    loss = (expected["value"] + expected["cost"]).sum() + expected["f"].sum()
    want = torch.autograd.grad(loss, (C, a, b))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@backend
def test_tiles_with_masks_tol_and_a_start(backend, tiles):
    C, a, b = problem(2, 11, 9)
    C[1, 9:], C[1, :, 7:], a[1, 9:], b[1, 7:] = -1e6, 1e6, 0, 0
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    options = {"eps": 0.3, "max_iter": 40, "tol": 1e-3, "init": (a, torch.rand_like(b))}
    got = sinkhorn(C, a, b, backend=backend, **options)
    want = sinkhorn(C, a, b, backend="reference", **options)
    assert torch.equal(got.n_iter, want.n_iter)
    assert (got.n_iter < 40).all()
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(want, name))


@backend
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_gradients_at_convergence(backend, grad):
    C, a, b = (t.requires_grad_() for t in problem(2, 5, 7))
    options = {"eps": 0.5, "rho_b": 0.3}
    result = sinkhorn(C, a, b, max_iter=100, tol=1e-13, grad=grad, backend=backend, **options)
    expected = sinkhorn_oracle(C, a, b, max_iter=100, **options)
    assert (result.n_iter < 60).all()
    names = ("value",) if grad == "envelope" else ("value", "cost", "plan")
    got = torch.autograd.grad(sum((getattr(result, n) ** 2).sum() for n in names), (C, a, b))
    want = torch.autograd.grad(sum((expected[n] ** 2).sum() for n in names), (C, a, b))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_whose_terms_vanish_are_made_anew(backend, dtype):
    C = torch.zeros(2, 3, 4, dtype=dtype)
    C[:, :, 3] = 900  # nobody's term but exp(-900 / eps)
    C[1, 0] = 1e4
    got = sinkhorn(C, eps=0.5, max_iter=3, backend=backend)
    want = sinkhorn_oracle(C.double(), eps=0.5, max_iter=3)
    for name in ("f", "g", "value", "cost", "plan"):
        torch.testing.assert_close(getattr(got, name).double(), want[name], rtol=1e-4, atol=1e-3)


@backend
def test_refusals_say_why(backend):
    C = torch.rand(4, 5)
    for options in ({"schedule": 0.5}, {"accelerate": "anderson"}):
        with pytest.raises(BackendError, match="neither schedule nor accelerate"):
            sinkhorn(C, eps=0.1, backend=backend, **options)
    large = C[:1, :1].expand(1025, 1024)
    with pytest.raises(BackendError, match="1049600 costs; the unrolled derivative takes 1048576"):
        sinkhorn(large, eps=0.1, grad="unrolled", backend=backend)


@pytest.fixture
def by_many(monkeypatch):
    """Every problem is solved by many programs, whose costs are read in panels of some rows."""
    monkeypatch.setattr(triton_kernels("sinkhorn"), "MOST_ENTRIES", 0)
    monkeypatch.setattr(points_tiles, "PANEL", 1 << 10)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (33, 70)])
@pytest.mark.parametrize("rho", [None, 0.7])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_many_programs_for_a_problem(by_many, size, rho, dtype, tol, monkeypatch):
    monkeypatch.setattr(points_tiles, "PANEL", 1 << 12)  # 5 of the largest costs, or 3
    C, a, b = problem(2, *size, dtype)
    a[:, 3:5], b[:, 4:6] = 0, 0
    C = C.mT.contiguous().mT
    eps = torch.tensor([0.5, 0.02], dtype=torch.float64)
    options = {"eps": eps, "max_iter": 4, "rho_a": rho}
    result = sinkhorn(C, a, b, **options, backend="triton")
    options["rho_a"] = rho or torch.inf
    expected = sinkhorn_oracle(C.double(), a.double(), b.double(), **options, rho_b=torch.inf)
    for name in ("f", "g", "plan", "value", "cost", "marginal_error"):
        seen, want = getattr(result, name).double(), expected[name]
        torch.testing.assert_close(
            seen, want, rtol=tol, atol=tol * want.abs().max().clamp(1).item()
        )


@pytest.mark.parametrize("ratio", [1e0, 1e3, 1e5])
def test_many_programs_at_every_ratio_of_cost_to_eps(by_many, ratio):
    C, a, b = problem(2, 20, 30, torch.float32, 12.0)
    C = C / C.amax((1, 2), keepdim=True) * 1e6
    result = sinkhorn(C, a, b, eps=1e6 / ratio, max_iter=4, backend="triton")
    expected = sinkhorn_oracle(C.double(), a.double(), b.double(), eps=1e6 / ratio, max_iter=4)
    error = (result.plan.double() - expected["plan"]).abs().sum((1, 2)).max().item()
    assert error <= 6e-8 * (40 + 10 * ratio)
    for name in ("f", "g", "value", "cost"):
        seen = getattr(result, name).double()
        torch.testing.assert_close(seen, expected[name], rtol=6e-6, atol=6)


@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_many_programs_stop_go_on_and_have_gradients(by_many, grad):
    C, a, b = problem(2, 12, 17)
    options = {"eps": torch.tensor([0.5, 0.1], dtype=torch.float64), "tol": 1e-12}
    leaves = [[t.clone().requires_grad_() for t in (C, a, b)] for _ in range(2)]
    seen, want = (
        sinkhorn(*some, **options, max_iter=400, grad=grad, backend=backend)
        for some, backend in zip(leaves, ("triton", "reference"), strict=True)
    )
    assert torch.equal(seen.n_iter, want.n_iter)
    assert (seen.marginal_error <= 1e-12).all()
    assert seen.n_iter[0] < seen.n_iter[1] < 400
    value = lambda r: r.value.sum() if grad == "envelope" else (r.cost + r.value**2).sum()  # noqa: E731
    for s, w in zip(*map(torch.autograd.grad, map(value, (seen, want)), leaves), strict=True):
        torch.testing.assert_close(s, w, rtol=1e-6, atol=1e-8)
    warm = sinkhorn(C, a, b, **options, init=seen, backend="triton")
    assert (warm.n_iter <= 1).all()


def test_many_programs_take_marginals_of_ones_and_half_precision(by_many):
    C = problem(2, 9, 14)[0].half()
    result = sinkhorn(C, eps=0.3, max_iter=4, marginals="sinkd", backend="triton")
    expected = sinkhorn(C.double(), eps=0.3, max_iter=4, marginals="sinkd", backend="reference")
    for name in ("f", "g", "plan", "value", "cost"):
        seen = getattr(result, name).double()
        torch.testing.assert_close(seen, getattr(expected, name), rtol=1e-4, atol=1e-4)
    none = sinkhorn(C[:0], eps=0.3, backend="triton")
    assert none.value.shape == (0,)


def test_many_programs_for_a_problem_without_a_batch(by_many):
    C, a, b = problem(2, 9, 14)
    alone = sinkhorn(C[1], a[1], b[1], eps=0.3, max_iter=4, backend="triton")
    among = sinkhorn(C, a, b, eps=0.3, max_iter=4, backend="triton")
    for name in FIELDS:
        torch.testing.assert_close(getattr(alone, name), getattr(among, name)[1])


def test_many_programs_take_every_iteration_without_a_tolerance(by_many):
    constant = sinkhorn(torch.ones(4, 5), eps=0.3, max_iter=4, backend="triton")
    assert constant.n_iter == 4
    torch.testing.assert_close(constant.value, torch.tensor(1.0))


def test_a_problem_beyond_one_program(monkeypatch):
    monkeypatch.setattr(triton_kernels("sinkhorn"), "MOST_ENTRIES", 200 * 170 - 1)
    C, a, b = problem(1, 200, 170, torch.float32)
    result = sinkhorn(C, a, b, eps=0.1, max_iter=1, backend="triton")
    expected = sinkhorn_oracle(C.double(), a.double(), b.double(), eps=0.1, max_iter=1)
    for name in ("f", "g", "value", "cost"):
        seen = getattr(result, name).double()
        torch.testing.assert_close(seen, expected[name], rtol=1e-4, atol=1e-4)


@backend
def test_every_size_has_a_layout(backend):
    layout = triton_kernels("sinkhorn").layout
    assert layout(64, 64, torch.float32) == (True, (64, 64), 8)
    assert layout(1, 1, torch.float32) == (True, (1, 1), 1)
    for dtype in (torch.float32, torch.float64):
        for N, M in ((1, 1 << 20), (1 << 20, 1), (7, 900), (1300, 50), (1024, 1024)):
            resident, (rows, columns), warps = layout(N, M, dtype)
            assert rows * columns <= 8192
            assert max(rows, columns) <= 1024
            assert warps in (1, 2, 4, 8)
            assert not resident or (rows >= N and columns >= M)


@backend
def test_a_tolerance_is_never_rounded_up(backend):
    tol_below = triton_kernels("sinkhorn").tol_below
    for tol in (0.0, 0.1, 1e-3, 1e-9, 1e-13, 1e-60, 1e30, 0.5):
        assert tol * (1 - 1e-6) - 1e-45 <= tol_below(tol) <= tol


@backend
def test_rows_of_costs_begin_at_multiples_of_16(backend):
    aligned = triton_kernels("sinkhorn").aligned
    C = torch.rand(3, 5, 32)
    assert aligned(C) is C
    for other in (torch.rand(3, 5, 7), C.mT, C[..., 1:], C[..., ::2]):
        copy = aligned(other)
        assert torch.equal(copy, other)
        assert not any(step % 16 for step in copy.stride()[:-1])
        assert copy.stride(-1) == 1


@backend
def test_l1_in_several_tiles_and_sums(backend):
    x, y = torch.randn(40, 150), torch.randn(35, 150)
    module = importlib.import_module("otdd.ops.cost.triton")
    rows, columns = module.tile(1, 40, 35, x.dtype)
    assert rows < 40
    assert columns < 35
    got = cost_matrix(x, y, backend=backend)
    assert torch.equal(got, cost_matrix(x, y, backend=backend))
    torch.testing.assert_close(
        got.double(), torch.cdist(x.double(), y.double(), p=1), rtol=1e-6, atol=0
    )
