"""The Triton kernels of given costs on a device: results, and that they repeat to the bit."""

import pytest
import torch

from otdd import backends
from otdd.ops import cost_matrix, sinkhorn

pytestmark = pytest.mark.gpu

DTYPES = {torch.float32: 3e-5, torch.float64: 1e-12}
SIZES = [(3, 1, 1), (64, 64, 64), (5, 33, 20), (10, 50, 1300)]  # in registers, and in tiles


@pytest.fixture(autouse=True)
def _there():
    if reason := backends.available()["triton"]:
        pytest.skip(reason)


def close(got, want, digits):
    for seen, exact in zip(got, want, strict=True):
        error = (seen.double() - exact).abs().max() / exact.abs().max().clamp_min(0.1)
        assert error.item() <= digits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rho", [None, 0.4])
@pytest.mark.parametrize("size", SIZES)
def test_solves_and_unrolled_gradients(size, rho, dtype):
    B, N, M = size
    tensors = (torch.rand(B, N, M), torch.rand(B, N) + 0.1, torch.rand(B, M) + 0.1)
    C, a, b = (t.to("cuda", dtype) for t in tensors)
    C, a, b = (t.requires_grad_() for t in (C, a / a.sum(-1, True), b / b.sum(-1, True)))
    exact = [t.detach().double().requires_grad_() for t in (C, a, b)]

    def solved(backend, C, a, b):
        options = {"eps": 0.05, "max_iter": 8, "grad": "unrolled", "rho_a": rho}
        r = sinkhorn(C, a, b, **options, backend=backend)
        outputs = r.f, r.g, r.value, r.cost, r.plan
        return *outputs, *torch.autograd.grad((r.value + r.cost).sum(), (C, a, b))

    got = solved("triton", C, a, b)
    close(got, solved("reference", *exact), 20 * DTYPES[dtype])
    again = solved("triton", C, a, b)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


def test_tol_stops_each_problem_on_the_device():
    C = torch.rand(6, 30, 20, device="cuda", dtype=torch.float64)
    eps = torch.tensor([1.0, 0.3, 0.1, 0.05, 0.03, 0.01], device="cuda")
    got, want = (
        sinkhorn(C, eps=eps, max_iter=200, tol=1e-6, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(got.n_iter, want.n_iter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (3, 65, 33, 100), (1, 512, 512, 1000)])
def test_l1(size, dtype):
    B, N, M, D = size
    x, y, G = (torch.randn(*s, device="cuda") for s in ((B, N, D), (B, M, D), (B, N, M)))
    x[..., ::3], y[..., ::3] = x[..., ::3].round(), y[..., ::3].round()

    def run(backend, dtype):
        p, q = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        C = cost_matrix(p, q, "l1", backend=backend)
        return C, *torch.autograd.grad(C, (p, q), G.to(dtype))

    close(run("triton", dtype), run("reference", torch.float64), DTYPES[dtype])
