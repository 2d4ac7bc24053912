"""The Sinkhorn divergence: never negative, zero at equality, the right gradients."""

import functools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peak_memory import printed
from references import cost_oracle, sinkhorn_oracle

from otdd import backends
from otdd.losses import SinkhornLoss
from otdd.ops import METRICS, PointsResult, cost_matrix, sinkhorn, sinkhorn_divergence

BACKENDS = ("reference", "cpu", "cuda")


def clouds(N: int, M: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, N, D, generator=generator, dtype=dtype)
    y = torch.rand(2, M, D, generator=generator, dtype=dtype) + 0.3
    a = torch.rand(2, N, generator=generator, dtype=dtype)
    b = torch.rand(2, M, generator=generator, dtype=dtype)
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def oracle(x, y, a, b, metric, eps, rho_a=float("inf"), rho_b=float("inf")):
    soft = rho_a < float("inf") or rho_b < float("inf")

    def value(x, y, a, b, *rho):
        C = cost_oracle(x, y, metric)
        options = {"rho_a": rho[0], "rho_b": rho[1]}
        whole = sinkhorn_oracle(C, a, b, eps=eps, max_iter=200, **options)["value"]
        if soft and rho == (float("inf"), float("inf")):  # the full dual counts masses there, too
            whole = whole - eps * (a.sum(-1) - a.sum(-1) ** 2)
        return whole

    total = value(x, y, a, b, rho_a, rho_b)
    total = total - (value(x, x, a, a, rho_a, rho_a) + value(y, y, b, b, rho_b, rho_b)) / 2
    if soft:
        total = total + eps / 2 * (a.sum(-1) - b.sum(-1)) ** 2
    return total


@functools.cache
def converged(metric: str, rho: tuple) -> tuple:
    """Arguments of a problem, then the value and its gradients; at eps = 0.3, 200 steps do."""
    x, y, a, b = clouds(6, 9, 3)
    a = a if None in rho else 1.4 * a
    leaves = tuple(t.requires_grad_() for t in (x, y, a, b))
    soft = {k: r for k, r in zip(("rho_a", "rho_b"), rho, strict=True) if r is not None}
    options = {"metric": metric, "eps": 0.3} | soft
    value = oracle(*leaves, **options)
    return leaves, options, value.detach(), torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rho", [(None, None), (0.4, 0.4), (0.2, None), (None, 1.0)])
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_values_and_gradients_at_convergence(backend, metric, rho, grad):
    leaves, options, want, second = converged(metric, rho)
    got = sinkhorn_divergence(*leaves, **options, max_iter=200, grad=grad, backend=backend)
    torch.testing.assert_close(got.value, want, rtol=1e-7, atol=1e-9)
    first = torch.autograd.grad(got.value.sum(), leaves)
    for k, (s, t) in enumerate(zip(first, second, strict=True)):
        if k >= 2 and rho == (None, None):  # the masses are equal: up to a constant
            s, t = (v - v.mean(-1, keepdim=True) for v in (s, t))
        torch.testing.assert_close(s, t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_potentials_are_the_slopes_in_the_weights(backend):
    x, y, a, b = clouds(6, 9, 3)
    a = a.requires_grad_()
    result = sinkhorn_divergence(x, y, a, b, eps=0.1, max_iter=1000, backend=backend)
    (slope,) = torch.autograd.grad(result.value.sum(), a)
    centred = [t - t.mean(-1, keepdim=True) for t in (slope, result.f)]
    torch.testing.assert_close(*centred, rtol=1e-6, atol=1e-8)


@given(
    N=st.integers(1, 9),
    M=st.integers(1, 9),
    D=st.integers(1, 5),
    metric=st.sampled_from(METRICS),
    eps=st.sampled_from([1e-3, 0.03, 1.0]),
    max_iter=st.integers(1, 5),
    rho=st.sampled_from([None, 0.1, 10.0]),
    near=st.booleans(),
    kept=st.booleans(),
    seed=st.integers(0, 999),
)
def test_never_negative_however_few_the_iterations(
    N, M, D, metric, eps, max_iter, rho, near, kept, seed
):
    x, y, a, b = clouds(N, M, D, seed)
    if near:  # where the divergence is small and its terms are not
        y, b = x + 1e-4 * torch.randn_like(x), a
    options = {"metric": metric, "eps": eps, "max_iter": max_iter, "rho_a": rho, "rho_b": rho}
    with mock.patch("otdd.ops.points.KEPT", 1 << 22 if kept else 0):
        result = sinkhorn_divergence(x, y, a, b, **options)
    halves = [r.value / 2 for r in result.within]
    terms = max(t.abs().max().item() for t in (result.between.value, *halves))
    assert (result.value >= 0).all()
    # what was cut off is rounding: the bound holds before it, too
    from otdd.ops.divergence import half_within

    soft = rho is not None
    penalty = torch.full((2,), rho, dtype=torch.float64) if soft else None
    whole = result.between.value - sum(half_within(r, penalty, soft)[0] for r in result.within)
    if soft:
        whole = whole + eps / 2 * (a.sum(-1) - b.sum(-1)) ** 2
    assert (whole >= -1e-12 * max(terms, 1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_zero_at_equality(backend, dtype, metric):
    x, _, a, _ = clouds(7, 7, 3, dtype=dtype)
    x = x.requires_grad_()
    loss = SinkhornLoss(metric, 0.3, max_iter=200, backend=backend)
    value = loss(x, x.detach(), a, a)
    assert (value >= 0).all()
    assert value.max() < (1e-6 if dtype == torch.float32 else 1e-12)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope.abs().max() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mass", [0.2, 3.0])
@pytest.mark.parametrize("other", [math.inf, 1e9])
def test_an_infinite_penalty_is_none(backend, mass, other):
    x, y, a, b = clouds(5, 4, 2)
    options = {"eps": 0.1, "max_iter": 1000, "backend": backend}
    want = sinkhorn_divergence(x, y, mass * a, mass * b, **options).value
    soft = sinkhorn_divergence(x, y, mass * a, mass * b, rho_a=other, rho_b=other, **options).value
    torch.testing.assert_close(soft, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_that_differ_need_a_penalty(backend):
    x, y, a, b = clouds(5, 4, 2)
    with pytest.raises(ValueError, match=r"a and b: got masses of 2 and 1; accepted: equal masses"):
        sinkhorn_divergence(x, y, 2 * a, b, eps=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"a and b: got masses of 1 and 0\.5"):
        sinkhorn_divergence(x, y, None, b / 2, eps=0.1, backend=backend)
    slightly = sinkhorn_divergence(x, y, a * (1 + 1e-6), b, eps=0.1, backend=backend).value
    exact = sinkhorn_divergence(x, y, a, b, eps=0.1).value
    torch.testing.assert_close(slightly, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_name_the_side(backend):
    x, y, a, b = clouds(5, 4, 2)
    options = {"eps": 0.1, "backend": backend}
    with pytest.raises(ValueError, match="y: got nan"):
        sinkhorn_divergence(x, y / 0 * 0, a, b, **options)
    with pytest.raises(ValueError, match="b: got a negative weight"):
        sinkhorn_divergence(x, y, a, -b, **options)
    with pytest.raises(ValueError, match="y: got leading dimensions"):
        sinkhorn_divergence(x, y.expand(3, 2, 4, 2)[:, :1].squeeze(1), a, b, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    x, y, a, b = clouds(3, 4, 2)
    with pytest.raises(ValueError, match="rho_a: got 0"):
        sinkhorn_divergence(x, y, eps=0.1, rho_a=0.0, backend=backend)
    for eps, kind in ((torch.ones(2), "Tensor"), ([0.1], "list")):
        with pytest.raises(TypeError, match=f"^eps: got {kind}; accepted: a number$"):
            sinkhorn_divergence(x, y, eps=eps, backend=backend)
    with pytest.raises(ValueError, match="rho_b: got a tensor; accepted: a number, inf or None"):
        sinkhorn_divergence(x, y, eps=0.1, rho_b=torch.ones(2), backend=backend)
    with pytest.raises(ValueError, match="rho_b: got -1"):
        SinkhornLoss(rho_b=-1.0)
    with pytest.raises(ValueError, match="a: got shape"):
        sinkhorn_divergence(x, y, b, a, eps=0.1, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
def test_the_same_without_the_costs(backend, metric, grad, monkeypatch):
    leaves = tuple(t.requires_grad_() for t in clouds(6, 9, 3))
    options = {"metric": metric, "eps": 0.3, "max_iter": 300, "grad": grad, "backend": backend}
    options |= {"rho_a": 0.8}
    seen = []
    for kept in (1 << 22, 0):
        monkeypatch.setattr("otdd.ops.points.KEPT", kept)
        r = sinkhorn_divergence(*leaves, **options)
        loss = SinkhornLoss(debias=False, **options)(*leaves)
        assert all(isinstance(s, PointsResult) for s in (r.between, *r.within))
        assert {s.backend for s in (r.between, *r.within)} == {backend}
        grads = torch.autograd.grad(r.value.sum() + loss.sum(), leaves)
        seen.append([r.value, r.f, r.g, loss, *grads])
    torch.testing.assert_close(*seen, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("metric", ["sqeuclidean", "l1"])
@pytest.mark.parametrize("ratio", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("max_iter", [4, 20, 100])
def test_a_self_transport_is_nearer_than_twice_as_many_plain_iterations_come(
    metric, ratio, max_iter
):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 2, generator=generator, dtype=torch.float64)
    a = torch.rand(150, generator=generator, dtype=torch.float64) ** 2 + 1e-3
    a = a / a.sum()
    C = cost_matrix(x, x, metric)
    eps = ratio * C.mean().item()

    def half(p: torch.Tensor) -> float:
        P = ((p[:, None] + p - C) / eps).exp() * a[:, None] * a
        return ((a * p).sum() - eps / 2 * (P.sum() - 1)).item()

    def mean(r) -> torch.Tensor:
        return (r.f + r.g) / 2

    p = torch.zeros_like(a)
    for _ in range(300):
        p = mean(sinkhorn(C, a, a, eps=eps, max_iter=1, init=(None, p)))
    exact = half(p)
    plain = half(mean(sinkhorn(C, a, a, eps=eps, max_iter=max_iter)))
    result = sinkhorn_divergence(x, x, a, a, metric=metric, eps=eps, max_iter=max_iter)
    for r in result.within:
        assert r.n_iter == 2 * -(-max_iter // 4)
        seen = half(mean(r))
        assert seen <= exact + 1e-12  # a dual value
        assert exact - seen <= 0.5 * (exact - plain) + 1e-12


def test_each_solve_stops_by_itself():
    x, y, a, b = clouds(30, 40, 2)
    r = sinkhorn_divergence(x, y, a, b, eps=0.05, max_iter=400, tol=1e-9)
    for solve in (r.between, *r.within):
        assert solve.converged.all()
        assert (solve.n_iter < 200).all()


def test_without_the_native_module_where_costs_are_few(monkeypatch):
    for name in ("cpu", "triton"):
        monkeypatch.setitem(backends._REASONS, name, "not there")
    x, y, a, b = clouds(5, 4, 2)
    assert sinkhorn_divergence(x, y, a, b, eps=0.1).between.backend == "reference"


@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_compile_fullgraph(kept, debias, grad, monkeypatch):
    monkeypatch.setattr("otdd.ops.points.KEPT", kept)
    torch._dynamo.reset()
    loss = SinkhornLoss(eps=0.5, max_iter=7, debias=debias, rho_a=0.5, rho_b=0.5, grad=grad)
    leaves = tuple(t.requires_grad_() for t in clouds(6, 9, 3))
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    want = loss(*leaves)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(t.sum(), leaves) for t in (got, want)]
    torch.testing.assert_close(*grads)


MEMORY = """
import resource, sys, torch
from otdd.losses import SinkhornLoss
n, debias = int(sys.argv[1]), sys.argv[2] == "True"
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x, y = torch.rand(n, 3, requires_grad=True), torch.rand(300, 3)
loss = SinkhornLoss(eps=0.1, max_iter=1, debias=debias)
torch.autograd.grad(loss(x[:64], y), x)
before = peak()
torch.autograd.grad(loss(x, y if debias else x.detach()), x)
print(peak() - before)
"""


@pytest.mark.parametrize("debias", [True, False])
def test_memory_is_that_of_the_points(debias):
    """8000 x 8000 costs would be 244 MB, also where only one of the clouds is large."""
    assert printed(MEMORY, 8000, debias) < 60


def test_results_are_shown_in_a_line():
    x, y, a, b = clouds(3, 4, 2)
    said = repr(sinkhorn_divergence(x, y, a, b, eps=0.1))
    assert said.startswith(f"Divergence(value=float64 {tuple(x.shape[:-2])}, f=float64 ")
    assert said.endswith("within=2 results)")
