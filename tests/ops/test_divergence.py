"""The Sinkhorn divergence: never negative, zero at equality, the right gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import cost_oracle, sinkhorn_oracle

from otdd.losses import SinkhornLoss
from otdd.ops import METRICS, sinkhorn_divergence

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
        whole = sinkhorn_oracle(C, a, b, eps=eps, max_iter=2000, **options)["value"]
        if soft and rho == (float("inf"), float("inf")):  # the full dual counts masses there, too
            whole = whole - eps * (a.sum(-1) - a.sum(-1) ** 2)
        return whole

    total = value(x, y, a, b, rho_a, rho_b)
    total = total - (value(x, x, a, a, rho_a, rho_a) + value(y, y, b, b, rho_b, rho_b)) / 2
    if soft:
        total = total + eps / 2 * (a.sum(-1) - b.sum(-1)) ** 2
    return total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rho", [(None, None), (0.4, 0.4), (0.2, None), (None, 1.0)])
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_values_and_gradients_at_convergence(backend, metric, rho, grad):
    x, y, a, b = clouds(6, 9, 3)
    a = a if None in rho else 1.4 * a
    leaves = tuple(t.requires_grad_() for t in (x, y, a, b))
    soft = {k: r for k, r in zip(("rho_a", "rho_b"), rho, strict=True) if r is not None}
    options = {"metric": metric, "eps": 0.3} | soft
    got = sinkhorn_divergence(*leaves, **options, max_iter=2000, grad=grad, backend=backend)
    want = oracle(*leaves, **options)
    torch.testing.assert_close(got.value, want, rtol=1e-7, atol=1e-9)
    first = torch.autograd.grad(got.value.sum(), leaves)
    second = torch.autograd.grad(want.sum(), leaves)
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
    seed=st.integers(0, 999),
)
def test_never_negative_however_few_the_iterations(N, M, D, metric, eps, max_iter, rho, near, seed):
    x, y, a, b = clouds(N, M, D, seed)
    if near:  # where the divergence is small and its terms are not
        y, b = x + 1e-4 * torch.randn_like(x), a
    options = {"metric": metric, "eps": eps, "max_iter": max_iter, "rho_a": rho, "rho_b": rho}
    result = sinkhorn_divergence(x, y, a, b, **options)
    halves = [r.value / 2 for r in result.within]
    terms = max(t.abs().max().item() for t in (result.between.value, *halves))
    assert (result.value >= 0).all()
    # what was cut off is rounding: the bound holds before it, too
    from otdd.ops.divergence import _half

    soft = rho is not None
    whole = result.between.value - sum(_half(r, eps, rho, soft)[0] for r in result.within)
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
    with pytest.raises(ValueError, match="eps: got a tensor"):
        sinkhorn_divergence(x, y, eps=torch.ones(2), backend=backend)
    with pytest.raises(ValueError, match="rho_b: got -1"):
        SinkhornLoss(rho_b=-1.0)
    with pytest.raises(ValueError, match="a: got shape"):
        sinkhorn_divergence(x, y, b, a, eps=0.1, backend=backend)
