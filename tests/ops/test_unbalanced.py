"""Unbalanced and semi-unbalanced transport: outputs and gradients, on every backend."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import problem, sinkhorn_oracle, unbalanced_primal

from otdd.ops import barycentric, sinkhorn

BACKENDS = ("reference", "cpu", "cuda", "triton")
SIZES = [(1, 1), (1, 9), (9, 1), (5, 7), (33, 50), (20, 300)]
PENALTIES = [(0.5, 0.5), (0.03, math.inf), (math.inf, 0.3), (1e-3, 20.0), (1e4, 1e-4)]
FIELDS = ("f", "g", "plan", "value", "cost", "marginal_error")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rho", PENALTIES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_values(backend, size, rho, dtype, tol):
    C, a, b = problem(2, *size, dtype)
    a = 1.7 * a  # masses need not be equal
    for max_iter in (1, 6) if backend == "triton" else (1, 2, 25):  # slow to interpret
        options = {"eps": 0.05, "max_iter": max_iter, "rho_a": rho[0], "rho_b": rho[1]}
        result = sinkhorn(C, a, b, **options, backend=backend)
        expected = sinkhorn_oracle(C.double(), a.double(), b.double(), **options)
        for name in FIELDS:
            seen = getattr(result, name).double()
            scale = expected["cost" if name == "value" else name].abs().max().clamp(min=1).item()
            torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol * scale, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
def test_a_problem_that_threads_share(backend, grad):
    C, a, b = problem(1, 400, 390)
    C = C.requires_grad_()
    options = {
        "eps": 0.05,
        "max_iter": 12 if grad == "unrolled" else 300,
        "rho_a": 0.3,
        "rho_b": 2.0,
    }
    result = sinkhorn(C, a, b, **options, grad=grad, backend=backend)
    expected = sinkhorn_oracle(C, a, b, **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(result, name), expected[name], rtol=1e-9, atol=1e-12)
    (got,) = torch.autograd.grad((result.value + result.cost).sum(), C)
    (want,) = torch.autograd.grad((expected["value"] + expected["cost"]).sum(), C)
    tol = 1e-8 if grad == "unrolled" else 1e-5
    torch.testing.assert_close(got, want, rtol=tol, atol=tol * want.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [1e0, 1e2, 1e3, 1e5])
@pytest.mark.parametrize("soft", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("decades", [0.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_ratio_of_cost_and_penalty_to_eps(backend, ratio, soft, decades, dtype):
    C, a, b = problem(2, 40, 50, dtype, decades)
    C = C / C.amax((1, 2), keepdim=True) * 1e6
    eps = 1e6 / ratio
    max_iter = 8 if backend == "triton" else 30  # slow to interpret
    options = {"eps": eps, "max_iter": max_iter, "rho_a": soft * eps, "rho_b": 3 * soft * eps}
    result = sinkhorn(C, a, b, **options, backend=backend)
    expected = sinkhorn_oracle(C.double(), a.double(), b.double(), **options)
    error = (result.plan.double() - expected["plan"]).abs().sum((1, 2)).max().item()
    unit = 6e-8 if dtype == torch.float32 else 1e-15
    mass = expected["plan"].sum((1, 2)).max().item()
    assert error <= unit * (40 + 10 * ratio) * max(mass, 1e-30)
    tol = unit * (100 + (ratio / 20 if backend == "reference" else 0))
    for name in ("f", "g"):
        torch.testing.assert_close(
            getattr(result, name).double(), expected[name], rtol=tol, atol=tol * 1e6
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rho", [1e-6, 1e-12, 1e-17, 1e-30])
@pytest.mark.parametrize("soft", [("rho_a",), ("rho_b",), ("rho_a", "rho_b")])
def test_the_lightest_penalties_keep_their_digits(backend, rho, soft):
    """Potentials are then far smaller than the logarithms of weights beside which they are kept."""
    C, a, b = problem(2, 20, 30)
    leaves = [t.requires_grad_() for t in (C, a, b)]
    max_iter = 6 if backend == "triton" else 20
    options = {"eps": 0.1, "max_iter": max_iter, **dict.fromkeys(soft, rho)}
    got = sinkhorn(*leaves, **options, grad="unrolled", backend=backend)
    want = sinkhorn_oracle(*leaves, **options)
    for name in ("value", "cost", "plan"):
        torch.testing.assert_close(getattr(got, name), want[name], rtol=1e-9, atol=0)
    first = torch.autograd.grad(got.value.sum(), leaves)
    second = torch.autograd.grad(want["value"].sum(), leaves)
    for seen, exact in zip(first, second, strict=True):
        assert (seen - exact).abs().max() <= 1e-8 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_penalty_is_a_hard_marginal(backend):
    C, a, b = problem(3, 9, 12)
    hard = sinkhorn(C, a, b, eps=0.1, max_iter=20, backend=backend)
    inf = sinkhorn(C, a, b, eps=0.1, max_iter=20, rho_a=math.inf, rho_b=math.inf, backend=backend)
    torch.testing.assert_close(inf.plan, hard.plan, rtol=0, atol=0)
    torch.testing.assert_close(inf.value, hard.value, rtol=0, atol=0)
    mixed = torch.tensor([0.2, math.inf, 0.4], dtype=torch.float64)
    some = sinkhorn(C, a, b, eps=0.1, max_iter=20, rho_a=mixed, rho_b=mixed, backend=backend)
    torch.testing.assert_close(some.value[1], hard.value[1])
    alone = sinkhorn(C[2], a[2], b[2], eps=0.1, max_iter=20, rho_a=0.4, rho_b=0.4, backend=backend)
    torch.testing.assert_close(some.plan[2], alone.plan)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rho", [(0.4, 0.4), (0.2, math.inf), (math.inf, 1.0)])
def test_the_value_is_the_primal_optimum(backend, rho):
    C, a, b = problem(1, 8, 11)
    a = 1.3 * a
    options = {"eps": 0.1, "rho_a": rho[0], "rho_b": rho[1]}
    result = sinkhorn(C, a, b, max_iter=3000, tol=1e-13, **options, backend=backend)
    assert result.converged.all()
    P, finite = result.plan[0], [r if math.isfinite(r) else 0.0 for r in rho]

    def primal(P: torch.Tensor) -> float:
        return float(unbalanced_primal(P, C[0], a[0], b[0], 0.1, *finite))

    assert result.value.item() == pytest.approx(primal(P), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # no feasible plan nearby is better
        move = torch.randn(P.shape, generator=generator, dtype=P.dtype)
        if math.isinf(rho[0]):
            move -= move.mean(1, keepdim=True)
        if math.isinf(rho[1]):
            move -= move.mean(0, keepdim=True)
        other = P + 0.3 * P.min() * move / move.abs().max()
        assert primal(other) > primal(P)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0.0, 1e6, -1e6])
def test_zero_weights_are_masks(backend, dtype, padding):
    C, a, b = problem(2, 12, 20, dtype)
    a[1, 7:], b[1, 3:] = 0, 0
    C[1, 7:], C[1, :, 3:] = padding, padding
    C = C.requires_grad_()
    options = {"eps": 0.1, "max_iter": 20, "rho_a": 0.02, "rho_b": 0.3}
    tol = 1e-11 if dtype == torch.float64 else 1e-4
    for grad in ("envelope", "unrolled", "implicit"):
        result = sinkhorn(C, a, b, **options, grad=grad, backend=backend)
        part = [t.detach().double() for t in (C[1, :7, :3], a[1, :7], b[1, :3])]
        expected = sinkhorn_oracle(*part, **options)
        seen = result.plan[1, :7, :3].double()
        torch.testing.assert_close(seen, expected["plan"], rtol=tol, atol=tol)
        for name in ("value", "cost"):
            seen = getattr(result, name)[1].double()
            torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol)
        (dC,) = torch.autograd.grad(result.value.sum() + result.cost.sum(), C)
        assert torch.isfinite(dC).all()
        assert (dC[1, 7:] == 0).all()
        assert (dC[1, :, 3:] == 0).all()


def gradients(loss: torch.Tensor, leaves: tuple) -> list[torch.Tensor]:
    return [t.double() for t in torch.autograd.grad(loss, leaves, retain_graph=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rho", PENALTIES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_unrolled_is_autograd_through_the_loop(backend, size, rho, dtype, tol):
    C, a, b = problem(2, *size, dtype)
    leaves = tuple(t.requires_grad_() for t in (C, 1.7 * a, b))
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    options = {"eps": 0.05, "max_iter": 8, "rho_a": rho[0], "rho_b": rho[1]}
    result = sinkhorn(*leaves, **options, grad="unrolled", backend=backend)
    expected = sinkhorn_oracle(*exact, **options)
    generator = torch.Generator().manual_seed(0)
    for name in ("value", "cost", "f", "g", "plan"):
        seen, want = getattr(result, name), expected[name]
        weight = torch.rand(want.shape, generator=generator, dtype=torch.float64)
        got = torch.autograd.grad(
            (seen * weight.to(dtype)).sum(), leaves, retain_graph=True, allow_unused=True
        )
        want = torch.autograd.grad((want * weight).sum(), exact, retain_graph=True)
        for x, y in zip(got, want, strict=True):
            floor = 1e-2 if dtype == torch.float64 else 0.1  # digits of f over eps
            scale = y.abs().max().clamp(min=floor).item()
            torch.testing.assert_close(x.double(), y, rtol=tol, atol=tol * scale, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rho", [(0.5, 0.5), (0.2, math.inf), (math.inf, 0.3), (0.05, 2.0)])
def test_implicit_and_envelope_at_convergence(backend, rho):
    C, a, b = problem(2, 9, 13)
    leaves = tuple(t.requires_grad_() for t in (C, 1.7 * a, b))
    options = {"eps": 0.1, "rho_a": rho[0], "rho_b": rho[1], "max_iter": 400}
    expected = sinkhorn_oracle(*leaves, **options)
    implicit = sinkhorn(*leaves, **options, grad="implicit", backend=backend)
    for name in ("value", "cost", "f", "g", "plan"):
        want = expected[name]
        weight = torch.rand(want.shape, dtype=torch.float64)
        got = gradients((getattr(implicit, name) * weight).sum(), leaves)
        want = torch.autograd.grad((want * weight).sum(), leaves, retain_graph=True)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8, msg=name)
    envelope = sinkhorn(*leaves, **options, backend=backend)
    want = torch.autograd.grad(expected["value"].sum(), leaves)
    for x, y in zip(gradients(envelope.value.sum(), leaves), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_start_tol_and_barycentric(backend):
    C, a, b = problem(3, 10, 12)
    options = {"eps": 0.05, "rho_a": 0.3, "rho_b": 0.7, "backend": backend}
    result = sinkhorn(C, a, b, max_iter=2000, tol=1e-9, **options)
    assert result.converged.all()
    assert (result.n_iter < 500).all()  # a penalty makes the iteration contract faster
    again = sinkhorn(C, a, b, max_iter=2000, tol=1e-8, init=result, **options)
    assert (again.n_iter == 1).all()
    y = torch.rand(3, 12, 4, dtype=C.dtype)
    image = barycentric(result, y)
    torch.testing.assert_close(image, result.plan @ y / a.unsqueeze(-1))


@given(shift=st.floats(-3, 3), rho=st.floats(0.01, 10), seed=st.integers(0, 99))
def test_symmetry_and_a_constant_in_the_cost(shift, rho, seed):
    C, a, b = problem(1, 6, 7, seed=seed)
    options = {"eps": 0.1, "rho_a": rho, "rho_b": rho, "max_iter": 3000}
    one = sinkhorn(C, a, b, **options)
    other = sinkhorn(C.mT, b, a, **options)
    torch.testing.assert_close(one.value, other.value, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(one.plan, other.plan.mT, rtol=1e-6, atol=1e-9)
    moved = sinkhorn(C + shift, a, b, **options)  # moves mass between plan and penalties
    factor = math.exp(-shift / (2 * rho + 0.1))
    torch.testing.assert_close(moved.plan, one.plan * factor, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho_a": 0.0}, "rho_a: got 0.0; accepted: numbers > 0"),
        ({"rho_b": -1.0}, "rho_b: got -1.0"),
        ({"rho_b": float("nan")}, "rho_b: got nan"),
        ({"rho_a": torch.tensor([1.0, 0.0])}, "rho_a: got 0.0"),
        ({"rho_a": torch.ones(3)}, r"rho_a: got shape \(3,\)"),
        ({"rho_a": torch.ones(2, requires_grad=True)}, "rho_a: got a tensor that requires grad"),
        ({"rho_a": 1.0, "marginals": "sinkd"}, "rho_a and rho_b: got one beside"),
    ],
)
def test_bad_input(backend, options, message):
    C = torch.rand(2, 4, 5)
    with pytest.raises(ValueError, match=message):
        sinkhorn(C, eps=0.1, **options, backend=backend)
    with pytest.raises(TypeError, match="rho_a: got str"):
        sinkhorn(C, eps=0.1, rho_a="1", backend=backend)
