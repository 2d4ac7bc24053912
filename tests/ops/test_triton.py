"""What the shared cases don't show of the Triton backend: tiles, refusals, launches."""

import importlib

import pytest
import torch
from references import problem, sinkhorn_oracle

from otdd.backends import BackendError
from otdd.ops import cost_matrix, sinkhorn
from otdd.ops.pointers import triton_kernels

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
    with pytest.raises(BackendError, match="1049600 costs; one program takes 1048576"):
        sinkhorn(C[:1, :1].expand(1025, 1024), eps=0.1, backend=backend)


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
