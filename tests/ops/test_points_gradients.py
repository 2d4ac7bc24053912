"""Gradients of `sinkhorn_points` against autograd through the oracle, and its place in PyTorch."""

import functools

import pytest
import torch
from points_backends import WAYS, iterations, points_backend
from references import clouds, cost_oracle, sinkhorn_oracle

from otdd.ops import METRICS, cost_matrix, sinkhorn, sinkhorn_points

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SIZES = [(1, 1, 1), (1, 9, 3), (9, 1, 2), (33, 70, 5)]


@pytest.fixture(params=WAYS)
def backend(request, monkeypatch) -> str:
    return points_backend(request.param, monkeypatch)


def centred(grads: tuple, rho: float | None) -> list:
    """Weights' gradients up to a constant where marginals are hard."""
    return [
        t - t.mean(-1, keepdim=True) if k >= 2 and rho is None else t for k, t in enumerate(grads)
    ]


@functools.cache
def exact_envelope(metric: str, size: tuple, rho: float | None, max_iter: int) -> tuple:
    """Gradients of the value, and of the cost of the plan that it ends with."""
    x, y, a, b = (t.requires_grad_() for t in clouds(2, *size, torch.float64))
    C = cost_oracle(x, y, metric)
    soft = {} if rho is None else {"rho_a": rho, "rho_b": rho}
    expected = sinkhorn_oracle(C, a, b, eps=0.8, max_iter=max_iter, **soft)
    value = torch.autograd.grad(expected["value"].sum(), (x, y, a, b), retain_graph=True)
    cost = torch.autograd.grad((expected["plan"].detach() * C).sum(), (x, y))
    return centred(value, rho), cost


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rho", [None, 0.7])
def test_envelope(backend, metric, size, rho):
    """Of the value at convergence, and of the cost with the plan held fixed."""
    if backend == "triton" and size != (1, 9, 3):
        pytest.skip("slow to interpret")
    leaves = tuple(t.requires_grad_() for t in clouds(2, *size, torch.float64))
    max_iter = 20 if backend == "triton" else iterations(metric, size)
    options = {"eps": 0.8, "max_iter": max_iter, "rho_a": rho, "rho_b": rho}
    r = sinkhorn_points(*leaves, metric=metric, **options, backend=backend)
    value, cost = exact_envelope(metric, size, rho, max_iter)
    got = centred(torch.autograd.grad(r.value.sum(), leaves, retain_graph=True), rho)
    torch.testing.assert_close(got, value, rtol=1e-7, atol=1e-7)
    got = torch.autograd.grad(r.cost.sum(), leaves[:2])
    torch.testing.assert_close(got, cost, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
def test_other_modes_are_those_of_sinkhorn(backend, metric, mode):
    x, y, *_ = (t.requires_grad_() for t in clouds(2, 6, 8, 3, torch.float64))
    options = {"eps": 0.9, "max_iter": 12, "grad": mode}
    r = sinkhorn_points(x, y, metric=metric, backend=backend, **options)
    dense = "reference" if backend == "triton" else backend
    s = sinkhorn(cost_matrix(x, y, metric, backend=dense), backend=dense, **options)
    z = torch.randn(8, 2, dtype=torch.float64)
    ours = (r.cost + r.f.square().sum(-1) + r.apply(z).square().sum((-1, -2))).sum()
    theirs = (s.cost + s.f.square().sum(-1) + (s.plan @ z).square().sum((-1, -2))).sum()
    got = torch.autograd.grad(ours, (x, y))
    torch.testing.assert_close(got, torch.autograd.grad(theirs, (x, y)), rtol=1e-8, atol=1e-10)


def test_float32_gradients_far_from_the_origin(backend):
    x, y, a, b = clouds(1, 40, 50, 3, torch.float32)
    x, y = (x + 1e4).requires_grad_(), y + 1e4
    wide = x.detach().double().requires_grad_()
    value = sinkhorn_points(x, y, a, b, eps=0.5, max_iter=50, backend=backend).value
    C = cost_oracle(wide, y.double(), "sqeuclidean")
    P = sinkhorn_oracle(C, a.double(), b.double(), eps=0.5, max_iter=50)["plan"].detach()
    (want,) = torch.autograd.grad((P * C).sum(), wide)
    (got,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean"])
def test_coinciding_points_have_finite_gradients(backend, metric):
    x = torch.rand(12, 3, dtype=torch.float64).requires_grad_()
    options = {"metric": metric, "eps": 0.01, "max_iter": 20, "backend": backend}
    result = sinkhorn_points(x, x.detach(), **options)
    (dx,) = torch.autograd.grad(result.value.sum(), x)
    assert torch.isfinite(dx).all()


def test_opcheck(backend):
    x, y, a, b = clouds(2, 4, 5, 3, torch.float32)
    eps, g = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(2, 5)
    problem = x, y, a, b, eps, 2 * eps, 3 * eps, None, None, None
    args = *problem, g, "l1", 5, 0.0, 0.0, "highest", backend
    torch.library.opcheck(torch.ops.otdd.sinkhorn_points.default, args)
    rest = None, None, None, y, "l1", "sign", False, "highest", backend
    args = *problem, torch.zeros(2, 4), g, *rest
    torch.library.opcheck(torch.ops.otdd.sinkhorn_points_product.default, args)


def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    x, y, *_ = (t.requires_grad_() for t in clouds(2, 6, 5, 3, torch.float32))

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = sinkhorn_points(x, y, metric="l2", eps=0.5, max_iter=7, backend=backend)
        return result.value.sum() + result.cost.sum() + result.barycentric(y).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want, got = step(x, y), compiled(x, y)
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(want, (x, y))
    torch.testing.assert_close(torch.autograd.grad(got, (x, y)), expected)


def test_vmap_is_a_batch(backend):
    x, y, a, b = clouds(4, 6, 5, 3, torch.float64)

    def value(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return sinkhorn_points(x, y[0], a, b[0], eps=0.5, max_iter=3, backend=backend).value

    torch.testing.assert_close(torch.func.vmap(value)(x, a), value(x, a))
    got = torch.func.vmap(torch.func.grad(value))(x, a)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(value(leaf, a).sum(), leaf)[0])


def test_a_masked_point_far_away_costs_no_digits(backend):
    x, y, *_ = clouds(1, 6, 6, 3, torch.float32)
    y[0, -1] = 1e7
    b = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2, 0.0]])
    options = {"eps": 6.0, "max_iter": 20}
    leaf = x.clone().requires_grad_()
    r = sinkhorn_points(leaf, y, None, b, **options, backend=backend)
    (got,) = torch.autograd.grad(r.value.sum(), leaf)
    wide = x.double().requires_grad_()
    far = sinkhorn_points(wide, y[:, :5].double(), None, b[:, :5].double(), **options)
    (want,) = torch.autograd.grad(far.value.sum(), wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
