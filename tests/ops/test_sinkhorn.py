"""`sinkhorn`'s outputs against the float64 oracle, on every backend."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import gaussian_ot_1d, problem, sinkd_oracle, sinkhorn_oracle

from otdd.ops import (
    SinkhornResult,
    barycentric,
    cost_matrix,
    partial,
    sinkhorn,
    sinkhorn_points,
)

BACKENDS = ("reference", "cpu", "cuda", "triton")
SIZES = [(1, 1), (1, 9), (9, 1), (5, 7), (16, 16), (33, 50), (64, 64), (20, 300), (300, 20)]
FIELDS = ("f", "g", "plan", "value", "cost", "marginal_error")


def check(result: SinkhornResult, expected: dict, tol: float) -> None:
    for name in FIELDS:
        seen = getattr(result, name).double()
        scale = expected["cost" if name == "value" else name].abs().max().clamp(min=1).item()
        torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol * scale, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("max_iter", [1, 2, 25])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_values(backend, size, max_iter, dtype, tol):
    max_iter = min(max_iter, 5) if backend == "triton" else max_iter  # slow to interpret
    C, a, b = problem(3, *size, dtype)
    eps = torch.tensor([0.5, 0.05, 0.02], dtype=torch.float64)
    result = sinkhorn(C, a, b, eps=eps, max_iter=max_iter, backend=backend)
    expected = sinkhorn_oracle(C.double(), a.double(), b.double(), eps=eps, max_iter=max_iter)
    check(result, expected, tol)
    assert result.value.dtype == dtype
    assert (result.n_iter == max_iter).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [1e0, 1e1, 1e2, 3e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("kind", ["uniform", "points", "skewed"])
@pytest.mark.parametrize("decades", [0.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_ratio_of_cost_to_eps(backend, ratio, kind, decades, dtype):
    C, a, b = problem(2, 40, 50, dtype, decades)
    if kind == "points":
        x = torch.randn(2, 40, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
        y = torch.randn(2, 50, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
        C = cost_matrix(x, y, "sqeuclidean")
    elif kind == "skewed":
        C = C**8
    C = C / C.amax((1, 2), keepdim=True) * 1e6
    for max_iter in (1, 3, 8 if backend == "triton" else 30):  # slow to interpret
        result = sinkhorn(C, a, b, eps=1e6 / ratio, max_iter=max_iter, backend=backend)
        expected = sinkhorn_oracle(
            C.double(), a.double(), b.double(), eps=1e6 / ratio, max_iter=max_iter
        )
        error = (result.plan.double() - expected["plan"]).abs().sum((1, 2)).max().item()
        unit = 6e-8 if dtype == torch.float32 else 1e-15
        assert error <= unit * (40 + 10 * ratio)  # potentials are only as good as their digits
        # the constant between f and g drifts by rounding, and plain float32 loses range / eps
        tol = unit * (100 + (ratio / 20 if backend == "reference" else 0))
        for name in ("f", "g", "value", "cost"):
            seen = getattr(result, name).double()
            torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol * 1e6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_costs_of_wide_latents_do_not_overflow(backend):
    x, y = torch.randn(2, 8, 4096), torch.randn(2, 60, 4096)
    C = cost_matrix(x, y)  # about 4600, where exp(-C) is 0
    result = sinkhorn(C, eps=0.1 * C.std().item(), backend=backend)
    expected = sinkhorn_oracle(C.double(), eps=0.1 * C.std().item(), max_iter=100)
    torch.testing.assert_close(result.plan.double(), expected["plan"], rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problems", [1, 9])
@pytest.mark.parametrize("ratio", [1e1, 1e3])
def test_costs_near_the_largest_number_do_not_overflow(backend, problems, ratio):
    C = 1e38 * problem(problems, 6, 7, torch.float32)[0]
    options = {"eps": 1e38 / ratio, "max_iter": 9}
    result = sinkhorn(C, backend=backend, **options)
    expected = sinkhorn_oracle(C.double(), **options)
    for name in ("value", "cost"):
        got, want = getattr(result, name).double(), expected[name]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0.0, 1e6, -1e6, 3e38, -3e38])
def test_zero_weights_are_masks(backend, dtype, padding):
    if backend == "triton" and abs(padding / 0.1) > torch.finfo(dtype).max:
        pytest.skip("triton takes costs whose C / eps is finite")
    C, a, b = problem(4, 12, 20, dtype)
    keep_rows, keep_columns = [12, 7, 1, 5], [20, 3, 20, 1]
    for k, (n, m) in enumerate(zip(keep_rows, keep_columns, strict=True)):
        a[k, n:], b[k, m:] = 0, 0
        C[k, n:], C[k, :, m:] = padding, padding
    max_iter = 8 if backend == "triton" else 20
    result = sinkhorn(C, a, b, eps=0.1, max_iter=max_iter, backend=backend)
    tol = 1e-11 if dtype == torch.float64 else 1e-4
    for k, (n, m) in enumerate(zip(keep_rows, keep_columns, strict=True)):
        part = [t.double() for t in (C[k, :n, :m], a[k, :n], b[k, :m])]
        expected = sinkhorn_oracle(*part, eps=0.1, max_iter=max_iter)
        torch.testing.assert_close(
            result.plan[k, :n, :m].double(), expected["plan"], rtol=tol, atol=tol
        )
        torch.testing.assert_close(result.f[k, :n].double(), expected["f"], rtol=tol, atol=tol)
        torch.testing.assert_close(result.value[k].double(), expected["value"], rtol=tol, atol=tol)
        torch.testing.assert_close(result.cost[k].double(), expected["cost"], rtol=tol, atol=tol)
        assert (result.plan[k, n:] == 0).all()
        assert (result.plan[k, :, m:] == 0).all()
    for name in FIELDS:
        assert torch.isfinite(getattr(result, name)).all(), name


def test_masked_potentials_are_soft_c_transforms():
    C, a, b = problem(2, 6, 5)
    a[:, 4:], b[:, 3:] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    seen = [sinkhorn(C, a, b, eps=0.2, max_iter=9, backend=name) for name in BACKENDS[:2]]
    torch.testing.assert_close(seen[0].f, seen[1].f)
    torch.testing.assert_close(seen[0].g, seen[1].g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tolerance_stops_each_problem_by_itself(backend):
    C, a, b = problem(6, 30, 20)
    eps = torch.tensor([1.0, 0.3, 0.1, 0.05, 0.03, 0.01])
    result = sinkhorn(C, a, b, eps=eps, max_iter=200, tol=1e-6, backend=backend)
    assert len(set(result.n_iter.tolist())) > 3
    assert result.converged[:4].all()
    for k in range(6):
        n_iter = int(result.n_iter[k])
        expected = sinkhorn_oracle(C[k], a[k], b[k], eps=eps[k].double(), max_iter=n_iter)
        torch.testing.assert_close(result.plan[k], expected["plan"], rtol=1e-9, atol=1e-12)
        assert bool(result.converged[k]) == (expected["marginal_error"].item() <= 1e-6)
        if n_iter > 1:
            before = sinkhorn_oracle(C[k], a[k], b[k], eps=eps[k].double(), max_iter=n_iter - 1)
            assert before["marginal_error"] > 1e-6 * (1 - 1e-6)


def test_what_stops_at_a_tolerance_of_a_few_roundings_has_converged():
    C = torch.rand(1000, 20, 30, generator=torch.Generator().manual_seed(0))
    result = sinkhorn(C, eps=0.05, max_iter=2000, tol=1e-6, backend="cpu")
    assert (result.n_iter < 2000).all()
    assert result.converged.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_start_goes_on_where_it_was(backend):
    C, a, b = problem(3, 10, 12)
    whole = sinkhorn(C, a, b, eps=0.05, max_iter=30, backend=backend)
    half = sinkhorn(C, a, b, eps=0.05, max_iter=15, backend=backend)
    for init in (half, (half.f, half.g)):
        again = sinkhorn(C, a, b, eps=0.05, max_iter=15, init=init, backend=backend)
        torch.testing.assert_close(again.plan, whole.plan)
    stop = sinkhorn(C, a, b, eps=0.05, max_iter=500, tol=1e-7, backend=backend)
    warm = sinkhorn(C, a, b, eps=0.05, max_iter=500, tol=1e-7, init=stop, backend=backend)
    assert (warm.n_iter == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_sinkd_marginals(backend, size):
    C, _, _ = problem(2, *size)
    result = sinkhorn(C, eps=0.1, max_iter=20, marginals="sinkd", backend=backend)
    plan = sinkd_oracle(C, 0.1, 20)
    torch.testing.assert_close(result.plan, plan)
    torch.testing.assert_close(result.cost, (plan * C).sum((-1, -2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_dimensions_and_broadcasting(backend):
    C, a, b = problem(6, 5, 7)
    C = C.reshape(2, 3, 5, 7)
    eps = torch.tensor([[0.1], [0.2]])
    result = sinkhorn(C, a[0], b.reshape(2, 3, 7), eps=eps, max_iter=9, backend=backend)
    assert result.value.shape == (2, 3)
    assert result.plan.shape == C.shape
    assert result.f.shape == (2, 3, 5)
    alone = sinkhorn(C[1, 2], a[0], b[5], eps=float(eps[1, 0]), max_iter=9, backend=backend)
    assert alone.value.shape == ()
    torch.testing.assert_close(result.plan[1, 2], alone.plan)
    torch.testing.assert_close(result.f[1, 2], alone.f)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_do_not_matter(backend):
    C, a, b = problem(3, 20, 30)
    expected = sinkhorn(C, a, b, eps=0.1, max_iter=9, backend=backend).plan
    turned = C.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    strided = torch.empty(3, 20, 60, dtype=C.dtype)[..., ::2].copy_(C)
    a2, b2 = a.T.contiguous().T, torch.stack([b, b], -1)[..., 0]
    for layout in (turned, strided):
        torch.testing.assert_close(
            sinkhorn(layout, a2, b2, eps=0.1, max_iter=9, backend=backend).plan, expected
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_weights_and_eps_over_two_batch_dimensions(backend):
    C, a, b = (t.unflatten(0, (2, 3)) for t in problem(6, 5, 7))
    eps = torch.linspace(0.1, 0.6, 6, dtype=torch.float64).reshape(3, 2).T
    options = {"max_iter": 9, "tol": 1e-2, "backend": backend}
    expected = sinkhorn(C, a, b, eps=eps.contiguous(), **options)
    a, b = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (a, b))
    result = sinkhorn(C, a, b, eps=eps, **options)
    for name in ("value", "cost", "f", "g", "n_iter", "marginal_error", "plan"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
        assert getattr(result, name).is_contiguous() or backend == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    C = problem(2, 9, 8)[0].to(dtype).requires_grad_()
    result = sinkhorn(C, eps=0.1, max_iter=9, backend=backend)
    expected = sinkhorn(C.detach().float(), eps=0.1, max_iter=9, backend=backend)
    assert result.value.dtype == torch.float32
    torch.testing.assert_close(result.plan, expected.plan)
    result.value.sum().backward()
    assert C.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_numpy_are_numbers(backend):
    C = torch.rand(3, 4)
    numpy_result = sinkhorn(C, eps=np.float32(0.1), max_iter=np.int64(7), backend=backend)
    result = sinkhorn(C, eps=float(np.float32(0.1)), max_iter=7, backend=backend)
    assert torch.equal(numpy_result.f, result.f)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    C = torch.zeros(0, 3, 4, requires_grad=True)
    result = sinkhorn(C, eps=0.1, backend=backend)
    assert result.value.shape == (0,)
    assert result.plan.shape == (0, 3, 4)
    result.value.sum().backward()
    assert C.grad.shape == C.shape


def test_results_do_not_depend_on_threads():
    cases = [problem(5, 40, 60, torch.float32)[0], problem(1, 500, 700, torch.float32)[0]]
    before = torch.get_num_threads()
    try:
        for C in cases:
            seen = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                seen.append(sinkhorn(C, eps=0.01, max_iter=20, grad="unrolled", backend="cpu"))
            for other in seen[1:]:
                assert torch.equal(seen[0].f, other.f)
                assert torch.equal(seen[0].cost, other.cost)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gaussians_in_closed_form(backend):
    grid = torch.linspace(-6, 7, 400, dtype=torch.float64)
    a = torch.exp(-((grid / 0.8) ** 2) / 2)
    b = torch.exp(-(((grid - 1) / 1.2) ** 2) / 2)
    C = cost_matrix(grid[:, None], grid[:, None], "sqeuclidean")
    result = sinkhorn(
        C, a / a.sum(), b / b.sum(), eps=0.3, max_iter=2000, tol=1e-10, backend=backend
    )
    expected = gaussian_ot_1d(0, 0.8, 1, 1.2, 0.3)
    assert math.isclose(result.value.item(), expected, rel_tol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(
    N=st.integers(1, 40),
    M=st.integers(1, 40),
    exponent=st.floats(-3, 3),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 10**6),
)
def test_properties(backend, N, M, exponent, shift, seed):
    C, a, b = problem(1, N, M, decades=3, seed=seed)
    eps = 10**exponent
    result = sinkhorn(C, a, b, eps=eps, max_iter=300, tol=1e-9, backend=backend)
    plan = result.plan
    torch.testing.assert_close(plan.sum(-2), b, rtol=1e-9, atol=1e-12)  # columns are exact
    row_error = (plan.sum(-1) - a).abs().sum(-1)
    torch.testing.assert_close(row_error, result.marginal_error, rtol=1e-6, atol=1e-9)
    if not bool(result.converged):
        return
    # duality: value = <P, C> + eps KL(P | a x b)
    reference = a.unsqueeze(-1) * b.unsqueeze(-2)
    kl = (torch.xlogy(plan, plan / reference) - plan + reference).sum((-1, -2))
    torch.testing.assert_close(
        result.value, result.cost + eps * kl, rtol=1e-5, atol=1e-5 * max(1, eps)
    )
    # a constant added to the cost moves value and cost by it, and no plan
    moved = sinkhorn(C + shift, a, b, eps=eps, max_iter=300, tol=1e-9, backend=backend)
    torch.testing.assert_close(moved.plan, plan, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        moved.value, result.value + shift, rtol=1e-7, atol=1e-7 * max(1, eps)
    )
    # the transposed problem has the transposed plan
    turned = sinkhorn(C.mT, b, a, eps=eps, max_iter=2000, tol=1e-9, backend=backend)
    if bool(turned.converged):
        torch.testing.assert_close(turned.plan.mT, plan, rtol=1e-3, atol=1e-6)


NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"C": torch.full((2, 3, 4), NAN)}, ValueError, r"C: got nan at index \(0, 0, 0\)"),
        ({"C": torch.tensor([[1.0, -INF]])}, ValueError, "C: got -inf"),
        ({"C": torch.ones(3)}, ValueError, r"C: got shape \(3,\)"),
        ({"C": torch.ones(2, 0, 3)}, ValueError, "N >= 1"),
        ({"C": torch.ones(2, 3, dtype=torch.int32)}, TypeError, "torch.int32"),
        ({"C": [[1.0]]}, TypeError, "C: got list"),
        ({"eps": 0.0}, ValueError, "eps: got 0.0; accepted: numbers > 0"),
        ({"eps": -1}, ValueError, "eps: got -1"),
        ({"eps": NAN}, ValueError, "eps: got nan"),
        ({"eps": torch.tensor([0.1, 0.0])}, ValueError, "eps: got 0.0"),
        ({"eps": torch.ones(3)}, ValueError, r"eps: got shape \(3,\)"),
        ({"eps": torch.ones(2, requires_grad=True)}, ValueError, "eps: got a tensor that requires"),
        ({"eps": 1e-50}, ValueError, "eps: got 1e-50; accepted: numbers > 0 within torch.float32"),
        ({"eps": True}, TypeError, "eps: got bool"),
        ({"eps": torch.ones(2, dtype=torch.complex64)}, ValueError, "eps: got dtype"),
        ({"tol": None}, ValueError, "tol: got None"),
        ({"max_iter": True}, ValueError, "max_iter: got True"),
        ({"C": torch.ones(3, 4).to_sparse()}, TypeError, "C: got a tensor of layout"),
        (
            {"C": torch.nested.nested_tensor([torch.ones(2, 3)])},
            TypeError,
            "C: got a nested tensor",
        ),
        ({"eps": "small"}, TypeError, "eps: got str"),
        ({"max_iter": 0}, ValueError, "max_iter: got 0"),
        ({"max_iter": 2**31}, ValueError, r"max_iter: got 2147483648; .* and below 2\^31"),
        ({"max_iter": 2.5}, ValueError, "max_iter: got 2.5"),
        (
            {"max_iter": torch.tensor(5)},
            ValueError,
            r"max_iter: got tensor\(5\); accepted: a whole",
        ),
        ({"tol": torch.tensor(0.5)}, ValueError, r"tol: got tensor\(0.5000\); accepted: a finite"),
        ({"tol": -1.0}, ValueError, "tol: got -1.0"),
        ({"tol": NAN}, ValueError, "tol: got nan"),
        ({"grad": "magic"}, ValueError, "grad: got 'magic'.*envelope, unrolled, implicit"),
        ({"marginals": "free"}, ValueError, "marginals: got 'free'"),
        ({"a": torch.tensor([0.5, -0.5, 1.0])}, ValueError, "a: got a negative weight, -0.5"),
        ({"a": torch.zeros(3)}, ValueError, "a: got only zero weights"),
        ({"b": torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])}, ValueError, "b: got only zero"),
        ({"b": torch.tensor([NAN, 1, 1, 1])}, ValueError, "b: got nan"),
        ({"b": torch.tensor([INF, 1, 1, 1])}, ValueError, "b: got inf"),
        ({"a": torch.ones(4)}, ValueError, r"a: got shape \(4,\); accepted: \(2, 3\)"),
        ({"a": torch.ones(1)}, ValueError, r"a: got shape \(1,\).*, or \(\.\.\., 3\) that"),
        ({"b": torch.ones(5, 4)}, ValueError, r"b: got shape \(5, 4\)"),
        ({"a": torch.ones(3).double()}, TypeError, "a: got dtype torch.float64"),
        ({"a": torch.ones(3, device="meta")}, ValueError, "a: got device meta"),
        ({"init": torch.ones(4)}, ValueError, "init: got Tensor"),
        ({"init": (None, torch.ones(5))}, ValueError, "init, its g: got shape"),
        ({"init": (torch.ones(3), None)}, ValueError, "init, its g: got None; accepted: a tensor"),
        ({"init": (None, torch.full((4,), NAN))}, ValueError, "init: got nan"),
        ({"marginals": "sinkd", "a": torch.full((3,), 0.3)}, ValueError, "0 or 1"),
        ({"backend": "abacus"}, ValueError, "abacus"),
    ],
)
def test_bad_input(backend, kwargs, error, says):
    good = {"C": torch.rand(2, 3, 4), "eps": 0.1, "backend": backend}
    with pytest.raises(error, match=says):
        sinkhorn(**{**good, **kwargs})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "number", [np.float16, np.float32, np.float64, np.longdouble, np.int64, Fraction]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_other_types_do_not_overflow(backend, number, dtype):
    C, a, b = problem(2, 4, 5, dtype)
    options = {"max_iter": 3, "backend": backend}
    result = sinkhorn(C, a, b, eps=number(1), rho_a=number(2), rho_b=number(2), **options)
    want = sinkhorn(C, a, b, eps=1.0, rho_a=2.0, rho_b=2.0, **options)
    torch.testing.assert_close(result.value, want.value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^eps: got -1"):
        sinkhorn(C, eps=number(-1), backend=backend)


def test_barycentric_of_another_result_says_what_to_use():
    C, y = torch.rand(4, 5), torch.rand(5, 3)
    points = sinkhorn_points(torch.rand(4, 3), y, eps=0.1)
    with pytest.raises(ValueError, match=r"^potentials: got PointsResult.*result\.barycentric"):
        barycentric(points, y)
    part = partial(C, mass=0.5, eps=0.1)
    with pytest.raises(ValueError, match=r"^potentials: got PartialResult.*result\.extended"):
        barycentric(part, y)
    slack = torch.cat([y, torch.zeros(1, 3)])
    moved = barycentric(part.extended, slack)[:-1] * part.extended.a[:-1, None]
    torch.testing.assert_close(moved, part.plan @ y)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize("shape", [(0,), (40, 50), (3, 9, 11)])
def test_costs_replaced_before_the_derivative_are_refused(backend, grad, shape):
    C, a, b = torch.rand(9, 11), torch.full((9,), 1 / 9), torch.full((11,), 1 / 11)
    C.requires_grad_()
    value = sinkhorn(C, a, b, eps=0.5, max_iter=5, grad=grad, backend=backend).value
    C.data = torch.zeros(shape)
    with pytest.raises((ValueError, RuntimeError)):
        torch.autograd.grad(value, C)
