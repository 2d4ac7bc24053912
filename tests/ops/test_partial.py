"""Partial transport on every backend, against exact linear programming and properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import problem
from scipy.optimize import linprog

from otdd.ops import partial, sinkhorn, sinkhorn_points

BACKENDS = ("reference", "cpu")


def exact(C: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mass: float) -> float:
    """Least cost of transporting `mass` with at most a and b on the marginals."""
    n, m = C.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    result = linprog(
        C.flatten().numpy(),
        A_ub=np.vstack([rows, columns]),
        b_ub=np.concatenate([a.numpy(), b.numpy()]),
        A_eq=np.ones((1, n * m)),
        b_eq=[mass],
    )
    return float(result.fun)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 1.0])
def test_small_eps_reaches_the_linear_program(backend, share):
    C, a, b = problem(3, 7, 9)
    a = 2 * a
    mass = share * b.sum(-1)
    result = partial(C, a, b, mass=mass, eps=0.004, max_iter=20000, tol=1e-9, backend=backend)
    assert result.converged.all()
    torch.testing.assert_close(result.plan.sum((-1, -2)), mass, rtol=1e-7, atol=1e-9)
    assert (result.plan.sum(-1) <= a + 1e-8).all()
    assert (result.plan.sum(-2) <= b + 1e-8).all()
    torch.testing.assert_close(result.cost, (result.plan * C).sum((-1, -2)))
    for k in range(3):
        least = exact(C[k], a[k], b[k], float(mass[k]))
        assert least - 1e-8 <= result.cost[k].item() <= least + 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_the_mass_is_balanced_transport(backend):
    C, a, b = problem(2, 6, 8)
    whole = partial(C, a, b, mass=1.0, eps=0.1, max_iter=500, backend=backend)
    balanced = sinkhorn(C, a, b, eps=0.1, max_iter=500, backend=backend)
    torch.testing.assert_close(whole.plan, balanced.plan, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_costs_and_masks(backend, dtype):
    C, a, b = problem(2, 20, 30, dtype, decades=6)
    a[:, 15:], b[:, 4] = 0, 0
    C = 1e6 * C
    mass = 0.5 * torch.minimum(a.sum(-1), b.sum(-1))
    result = partial(C, a, b, mass=mass, eps=1e3, max_iter=4000, backend=backend)
    tol = 1e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(result.plan.sum((-1, -2)), mass, rtol=tol, atol=0)
    assert (result.plan[:, 15:] == 0).all()
    assert (result.plan[..., 4] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
def test_gradients(backend, grad):
    C, a, b = problem(1, 3, 4)
    leaves = tuple(t.requires_grad_() for t in (C, a, b))
    iterations = 6 if grad == "unrolled" else 300  # converged

    def cost(C: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return partial(
            C, a, b, mass=0.6, eps=0.2, max_iter=iterations, grad=grad, backend=backend
        ).cost

    torch.autograd.gradcheck(cost, leaves, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
def test_slopes_in_the_weights_are_those_of_the_value(backend, grad):
    """The masses are free here, so no constant is left open."""
    C, a, b = problem(1, 3, 4)
    leaves = [t[0].clone().requires_grad_() for t in (C, a, 1.5 * b)]

    def value(C, a, b):
        options = {"mass": 0.4, "eps": 0.3, "max_iter": 300, "grad": grad, "backend": backend}
        return partial(C, a, b, **options).value

    torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_small_masses_and_small_eps_converge_when_accelerated(backend, scale):
    C, a, b = problem(2, 6, 5)
    mass, eps, schedule = (1e-3, 0.01, None) if scale == 1 else (0.5, 10.0, 0.5)
    options = {"tol": 1e-6 * mass, "max_iter": 3000, "backend": backend}
    options |= {"schedule": schedule, "accelerate": "anderson"}
    got = partial(scale * C, a, b, mass=mass, eps=eps, **options)
    assert got.converged.all()
    wanted = torch.full((2,), mass, dtype=torch.float64)
    torch.testing.assert_close(got.plan.sum((-1, -2)), wanted, rtol=1e-5, atol=0)


@given(share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_more_mass_costs_more(share, seed):
    C, a, b = problem(1, 5, 6, seed=seed)
    options = {"eps": 0.05, "max_iter": 3000}
    less = partial(C, a, b, mass=share, **options)
    more = partial(C, a, b, mass=share + 0.01, **options)
    assert less.cost.item() <= more.cost.item() + 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mass", "message"),
    [
        (0.0, "mass: got 0.0; accepted: numbers > 0"),
        (-1.0, "mass: got -1.0"),
        (1.5, "mass: got 1.5; accepted: numbers > 0 and at most the mass of each side, here 1"),
        (torch.tensor([0.5, 2.0]), "mass: got 2.0"),
        (torch.ones(3), r"mass: got shape \(3,\)"),
        (float("nan"), "mass: got nan"),
    ],
)
def test_bad_mass(backend, mass, message):
    with pytest.raises(ValueError, match=message):
        partial(torch.rand(2, 4, 5), mass=mass, eps=0.1, backend=backend)


def test_results_are_printed_in_a_line():
    C, x = torch.rand(2, 30, 40), torch.rand(30, 3)
    shown = [
        repr(sinkhorn(C, eps=0.1)),
        repr(sinkhorn_points(x, x, eps=0.1)),
        repr(partial(C, mass=0.5, eps=0.1)),
    ]
    assert "f=float32 (2, 30)" in shown[0]
    assert "C=float32 (2, 30, 40)" in shown[0]
    assert shown[1].startswith("PointsResult(value=float32 ()")
    assert shown[2].startswith("PartialResult(extended=SinkhornResult(")
    assert all("tensor" not in text and "\n" not in text and len(text) < 400 for text in shown)
