"""Weights whose total is far from 1: the problem scales, and so must its solution."""

import pytest
import torch
from references import problem, sinkhorn_oracle

from otdd.ops import sinkhorn, sinkhorn_points

BACKENDS = ("reference", "cpu", "cuda", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mass", [1e-25, 1e-20, 1e-6, 1e6, 1e20, 1e25])
@pytest.mark.parametrize("decades", [0.0, 6.0])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("grad", ["envelope", "unrolled"])
def test_total_weight(backend, mass, decades, dtype, tol, grad):
    C, a, b = problem(2, 30, 20, dtype, decades)
    C, a, b = (t.requires_grad_() for t in (C, a * mass, b * mass))
    wide = [t.detach().double().requires_grad_() for t in (C, a, b)]
    options = {"eps": 0.05, "max_iter": 4 if backend == "triton" else 10}  # slow to interpret
    result = sinkhorn(C, a, b, **options, grad=grad, backend=backend)
    expected = sinkhorn_oracle(*wide, **options)
    for name, unit in (("f", 1), ("g", 5), ("value", 5 * mass), ("cost", mass), ("plan", mass)):
        seen, exact = getattr(result, name).double(), expected[name]
        torch.testing.assert_close(seen, exact, rtol=tol, atol=tol * unit)
    assert (result.marginal_error.double() - expected["marginal_error"]).abs().max() <= tol * mass
    if grad == "unrolled":
        got = torch.autograd.grad((result.cost / mass).sum(), (C, a, b))
        want = torch.autograd.grad((expected["cost"] / mass).sum(), wide)
        for seen, exact in zip(got, want, strict=True):
            unit = exact.abs().max()
            assert (seen.double() / unit - exact / unit).abs().max() <= 10 * tol


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", [sinkhorn, sinkhorn_points])
@pytest.mark.parametrize(
    ("dtype", "weight", "message"),
    [
        (torch.float32, 1e-39, "a: got weights of at most 1e-39"),
        (torch.float64, 1e-310, "a: got weights of at most 1e-310"),
        (torch.float64, 1e308, "a: got weights of up to 1e\\+308"),
    ],
)
def test_weights_without_a_mass_that_is_a_number(backend, op, dtype, weight, message):
    a = torch.full((2, 3), 1 / 3, dtype=dtype)
    a[1] = weight
    C, x, y = (torch.rand(2, *shape, dtype=dtype) for shape in ((3, 4), (3, 2), (4, 2)))
    clouds = (C,) if op is sinkhorn else (x, y)
    with pytest.raises(ValueError, match=message):
        op(*clouds, a, eps=0.1, backend=backend)
