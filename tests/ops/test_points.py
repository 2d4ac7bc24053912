"""`sinkhorn_points` against the dense float64 oracle: outputs, layouts, extremes, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import printed
from points_backends import MORE_OF_TRITON, WAYS, points_backend
from references import clouds, cost_oracle, gaussian_ot_1d, sinkhorn_oracle

from otdd.ops import METRICS, PointsResult, cost_matrix, sinkhorn, sinkhorn_points
from otdd.ops.points import cpu

FIELDS = ("f", "g", "plan", "value", "cost", "marginal_error")
NAN, INF = math.nan, math.inf


@pytest.fixture(params=WAYS)
def backend(request, monkeypatch) -> str:
    return points_backend(request.param, monkeypatch)


@pytest.fixture(params=[*WAYS, *MORE_OF_TRITON])
def every(request, monkeypatch) -> str:
    """Backends, in every way that they get their costs."""
    return points_backend(request.param, monkeypatch)


def check(result: PointsResult, expected: dict, tol: float) -> None:
    for name in FIELDS:
        seen = getattr(result, name).double()
        scale = expected["cost" if name == "value" else name].abs().max().clamp(min=1).item()
        torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol * scale, msg=name)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (1, 9, 3), (9, 1, 2), (5, 7, 64), (33, 50, 1), (20, 300, 4), (300, 20, 17)]
)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_values(every, metric, size, dtype, tol):
    backend = every
    x, y, a, b = clouds(3, *size, dtype)
    C = cost_oracle(x.double(), y.double(), metric)
    top = C.max().clamp(min=0.1).item()
    eps = top * torch.tensor([0.5, 0.05, 0.02], dtype=torch.float64)
    if backend == "triton":  # slow to interpret
        x, y, a, b, C, eps = (t[::2] for t in (x, y, a, b, C, eps))
    known = metric == "cosine" and size != (5, 7, 64)  # sqeuclidean of points that are scaled
    if backend == "triton" and (known or size[0] * size[1] > 2000):
        pytest.skip("slow to interpret")
    for max_iter in (3,) if backend == "triton" else (1, 2, 25):
        options = {"eps": eps, "max_iter": max_iter}
        result = sinkhorn_points(x, y, a, b, metric=metric, **options, backend=backend)
        expected = sinkhorn_oracle(C, a.double(), b.double(), **options)
        check(result, expected, tol)
        assert result.value.dtype == dtype
        assert (result.n_iter == max_iter).all()


@pytest.mark.parametrize("rho", [(0.5, 0.5), (0.03, INF), (INF, 0.3), (1e-3, 20.0)])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_penalties(every, rho, dtype, tol):
    backend = every
    x, y, a, b = clouds(2, 33, 50, 3, dtype)
    x, y, a = x / 5, y / 5, 1.7 * a
    C = cost_oracle(x.double(), y.double(), "sqeuclidean")
    for max_iter in (3,) if backend == "triton" else (1, 2, 25):
        options = {"eps": 0.05, "max_iter": max_iter, "rho_a": rho[0], "rho_b": rho[1]}
        result = sinkhorn_points(x, y, a, b, **options, backend=backend)
        check(result, sinkhorn_oracle(C, a.double(), b.double(), **options), tol)


@pytest.mark.parametrize("ratio", [1e0, 1e2, 3e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("soft", [None, 1e-3, 1e3])
@pytest.mark.parametrize("decades", [0.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_ratio_of_cost_to_eps(backend, ratio, soft, decades, dtype):
    if backend == "triton" and (soft == 1e3 or ratio in (1e2, 3e2, 1e4) or decades == 0):
        pytest.skip("slow to interpret")
    x, y, a, b = clouds(2, 40, 50, 3, dtype, decades)
    C = cost_oracle(x.double(), y.double(), "sqeuclidean")
    top = C.max().item()
    x, y = x * math.sqrt(1e6 / top), y * math.sqrt(1e6 / top)
    C = cost_oracle(x.double(), y.double(), "sqeuclidean")
    for max_iter in (8,) if backend == "triton" else (1, 3, 30):
        options = {"eps": 1e6 / ratio, "max_iter": max_iter}
        if soft:
            options |= {"rho_a": soft * 1e6 / ratio, "rho_b": 3 * soft * 1e6 / ratio}
        result = sinkhorn_points(x, y, a, b, **options, backend=backend)
        expected = sinkhorn_oracle(C, a.double(), b.double(), **options)
        error = (result.plan.double() - expected["plan"]).abs().sum((1, 2)).max().item()
        mass = expected["plan"].sum((1, 2)).max().item()
        unit = 6e-8 if dtype == torch.float32 else 1e-15
        assert error <= unit * (40 + 10 * ratio) * max(mass, 1e-30)
        tol = unit * (100 + (ratio / 20 if backend == "reference" else 0))
        for name in ("f", "g"):
            seen = getattr(result, name).double()
            torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol * 1e6)


def test_clouds_far_from_the_origin_keep_their_digits(backend):
    x, y, a, b = clouds(1, 30, 40, 3, torch.float32)
    x, y = (x + 1e4).contiguous(), (y + 1e4).contiguous()
    for metric in ("l1", "l2", "sqeuclidean"):
        C = cost_oracle(x.double(), y.double(), metric)
        options = {"eps": 0.3, "max_iter": 10 if backend == "triton" else 100}
        result = sinkhorn_points(x, y, a, b, metric=metric, **options, backend=backend)
        check(result, sinkhorn_oracle(C, a.double(), b.double(), **options), 3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clouds_far_from_each_other(backend, dtype):
    """No column keeps any mass after the first row step: all are done in the log domain."""
    x, y, a, b = clouds(1, 30, 40, 2, dtype)
    x, y = x * 100, y * 100 + 1000
    C = cost_oracle(x.double(), y.double(), "sqeuclidean")
    for max_iter in (1, 2, 20):
        result = sinkhorn_points(x, y, a, b, eps=10.0, max_iter=max_iter, backend=backend)
        expected = sinkhorn_oracle(C, a.double(), b.double(), eps=10.0, max_iter=max_iter)
        unit = 6e-8 if dtype == torch.float32 else 1e-15
        for name in ("f", "g", "value", "cost"):
            tol = unit * (C.max().item() / 10.0 if name == "cost" else 100)  # of potentials of 1e6
            seen = getattr(result, name).double()
            torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol * 1e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_weights_are_masks(every, dtype):
    backend = every
    x, y, a, b = clouds(4, 12, 20, 3, dtype)
    for k, (n, m) in enumerate(((12, 20), (7, 3), (1, 20), (5, 1))):
        a[k, n:], b[k, m:] = 0, 0
        x[k, n:], y[k, m:] = 1e3, -1e3
    z = torch.ones(20, 1, dtype=dtype)
    max_iter = 6 if backend == "triton" else 20
    result = sinkhorn_points(x, y, a, b, eps=1.0, max_iter=max_iter, backend=backend)
    tol = 1e-11 if dtype == torch.float64 else 1e-4
    for k, (n, m) in enumerate(((12, 20), (7, 3), (1, 20), (5, 1))):
        C = cost_oracle(x[k, :n].double(), y[k, :m].double(), "sqeuclidean")
        weights = a[k, :n].double(), b[k, :m].double()
        expected = sinkhorn_oracle(C, *weights, eps=1.0, max_iter=max_iter)
        for name, seen in (
            ("plan", result.plan[k, :n, :m]),
            ("f", result.f[k, :n]),
            ("g", result.g[k, :m]),
            ("value", result.value[k]),
            ("cost", result.cost[k]),
        ):
            torch.testing.assert_close(seen.double(), expected[name], rtol=tol, atol=tol)
        assert (result.plan[k, n:] == 0).all()
        assert (result.plan[k, :, m:] == 0).all()
        assert (result.apply(z)[k, n:] == 0).all()
    for name in FIELDS:
        assert torch.isfinite(getattr(result, name)).all(), name
    want = sinkhorn(cost_matrix(x, y, "sqeuclidean"), a, b, eps=1.0, max_iter=max_iter)
    torch.testing.assert_close(result.f, want.f, rtol=1e-5, atol=1e-3)  # masked ones too
    torch.testing.assert_close(result.g, want.g, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("far", [1e3, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_points_may_be_anywhere(every, dtype, far):
    """What they would cost, in units of eps, is more than float32 has digits for."""
    backend = every
    x, y, a, b = clouds(2, 13, 50, 3, dtype)
    x, y = x / 30, y / 30
    a[0, 12], a[1, :3], b[:, 7], b[1, 40:] = 0, 0, 0, 0
    x[a == 0], y[b == 0] = far, -far
    leaves, options = (x.requires_grad_(), y.requires_grad_()), {"eps": 1e-3, "max_iter": 6}
    C = cost_oracle(*(t.detach().double() for t in leaves), "sqeuclidean")
    expected = sinkhorn_oracle(C, a.double(), b.double(), **options)
    r = sinkhorn_points(*leaves, a, b, **options, backend=backend)
    tol = 1e-11 if dtype == torch.float64 else 2e-4
    for name in ("plan", "value", "cost", "marginal_error"):
        seen = getattr(r, name).double()
        torch.testing.assert_close(seen, expected[name], rtol=tol, atol=tol * 0.02, msg=name)
    torch.testing.assert_close(r.apply(r.y), r.plan @ y, rtol=tol, atol=1e-9)
    for potential in (r.f, r.g):
        assert torch.isfinite(potential).all()
    P, (dx, dy) = expected["plan"], torch.autograd.grad(r.value.sum(), leaves)
    used, goal = torch.where(b.unsqueeze(-1) > 0, y, 0).detach().double(), x.detach().double()
    want = 2 * (P.sum(-1, keepdim=True) * goal - P @ used)
    torch.testing.assert_close(dx.double(), want, rtol=tol, atol=tol)
    assert not dy[b == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forbidden_pairs_of_labels(every, dtype):
    """Costs of 1e10 eps, which no plan uses, beside costs of 200 eps, which it does."""
    x, y, a, b = clouds(2, 13, 50, 3, dtype)
    labels_x, labels_y = torch.arange(13) % 3, torch.arange(50) % 3
    between = 1e9 * (1 - torch.eye(3, dtype=dtype))
    shares = torch.zeros(2, 3, dtype=dtype)
    masses = shares.index_add(1, labels_x, a) / shares.index_add(1, labels_y, b)
    b, y = b * masses[:, labels_y], y + 3
    C = cost_oracle(x.double(), y.double(), "sqeuclidean") + between.double()[labels_x][:, labels_y]
    options = {"eps": 0.1, "max_iter": 4}
    given = {"labels_x": labels_x, "labels_y": labels_y, "label_cost": between}
    r = sinkhorn_points(x, y, a, b, **options, **given, backend=every)
    expected = sinkhorn_oracle(C, a.double(), b.double(), **options)
    tol = 1e-9 if dtype == torch.float64 else 1e-3
    for name in ("plan", "value", "cost"):
        seen, exact = getattr(r, name).double(), expected[name]
        torch.testing.assert_close(seen, exact, rtol=tol, atol=tol * exact.max().item(), msg=name)
    torch.testing.assert_close(r.apply(y), r.plan @ y, rtol=tol, atol=tol)


def test_tolerance_stops_each_problem_by_itself(every):
    backend = every
    x, y, a, b = clouds(4, 30, 20, 2, torch.float64)
    eps, options = torch.tensor([10.0, 5.0, 2.0, 0.05]), {"max_iter": 16, "tol": 1e-4}
    result = sinkhorn_points(x, y, a, b, eps=eps, **options, backend=backend)
    assert len(set(result.n_iter.tolist())) == 4
    C = cost_oracle(x, y, "sqeuclidean")
    for k in range(4):
        n_iter = int(result.n_iter[k])
        expected = sinkhorn_oracle(C[k], a[k], b[k], eps=eps[k].double(), max_iter=n_iter)
        torch.testing.assert_close(result.plan[k], expected["plan"], rtol=1e-9, atol=1e-12)
        assert bool(result.converged[k]) == (expected["marginal_error"].item() <= 1e-4)


def test_warm_start_goes_on(backend):
    x, y, a, b = clouds(2, 30, 40, 3, torch.float64)
    whole = sinkhorn_points(x, y, a, b, eps=0.3, max_iter=5, backend=backend)
    first = sinkhorn_points(x, y, a, b, eps=0.3, max_iter=2, backend=backend)
    for init in (first, (first.f, first.g), (None, first.g)):
        rest = sinkhorn_points(x, y, a, b, eps=0.3, max_iter=3, init=init, backend=backend)
        torch.testing.assert_close(rest.plan, whole.plan)


def test_layouts_and_batches(backend):
    x, y, a, b = clouds(6, 9, 8, 5, torch.float64)
    options = {"eps": 1.0, "max_iter": 3, "backend": backend}
    want = sinkhorn_points(x, y, a, b, **options)
    strided = sinkhorn_points(x.mT.contiguous().mT, y.repeat(1, 1, 2)[..., :5], a, b, **options)
    torch.testing.assert_close(strided.plan, want.plan)
    grid = sinkhorn_points(*(t.reshape(2, 3, *t.shape[1:]) for t in (x, y, a, b)), **options)
    assert grid.value.shape == (2, 3)
    torch.testing.assert_close(grid.plan.flatten(0, 1), want.plan)
    shared = sinkhorn_points(x, y[0], a, b[0], **options)
    torch.testing.assert_close(shared.plan[0], want.plan[0])
    one = sinkhorn_points(x[0], y[0], a[0], b[0], **options)
    assert one.value.shape == ()
    torch.testing.assert_close(one.plan, want.plan[0])
    none = sinkhorn_points(x[:0], y[:0], **options)
    assert none.plan.shape == (0, 9, 8)
    assert none.apply(y[:0]).shape == (0, 9, 5)


def test_products_with_the_plan(every):
    backend = every
    x, y, a, b = clouds(2, 37, 70, 3, torch.float64)
    result = sinkhorn_points(x, y, a, b, metric="l1", eps=0.5, max_iter=2, backend=backend)
    z, w = torch.randn(2, 70, 6).double(), torch.randn(37, 1).double()
    torch.testing.assert_close(result.apply(z), result.plan @ z)
    torch.testing.assert_close(result.apply(w, transpose=True), result.plan.mT @ w)
    torch.testing.assert_close(result.barycentric(z), result.plan @ z / a.unsqueeze(-1))
    z.requires_grad_()
    (got,) = torch.autograd.grad((result.apply(z) ** 2).sum(), z)
    (want,) = torch.autograd.grad(((result.plan @ z) ** 2).sum(), z)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r"z: got shape \(36, 1\); accepted: \(2, 37\)"):
        result.apply(w[1:], transpose=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    x, y, *_ = clouds(1, 9, 8, 5, torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    options = {"eps": 1.0, "max_iter": 9, "backend": backend}
    result = sinkhorn_points(x, y, **options)
    want = sinkhorn_points(x.float(), y.float(), **options)
    assert result.value.dtype == torch.float32
    torch.testing.assert_close(result.value, want.value)


def test_zero_vectors_under_cosine(backend):
    x, y, a, b = clouds(1, 6, 7, 3, torch.float64)
    x[0, 2], y[0, 3], y[0, 4] = 0, 0, x[0, 1]
    leaves = x.requires_grad_(), y.requires_grad_()
    C = cost_matrix(x, y, "cosine", backend="reference")
    want = sinkhorn(C, a, b, eps=0.1, max_iter=9, backend="reference")
    result = sinkhorn_points(x, y, a, b, metric="cosine", eps=0.1, max_iter=9, backend=backend)
    torch.testing.assert_close(result.plan, want.plan)
    slopes, exact = (
        torch.autograd.grad(r.value.sum(), leaves, create_graph=True) for r in (result, want)
    )
    torch.testing.assert_close(slopes, exact)
    assert not slopes[0][0, 2].any()
    again = torch.autograd.grad(sum(t.square().sum() for t in slopes), leaves)
    assert all(t.isfinite().all() for t in again)


def test_gaussians_in_closed_form(backend):
    if backend == "triton":
        pytest.skip("slow to interpret")
    x = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400).unsqueeze(-1)
    result = sinkhorn_points(x, 2 * x + 1, eps=0.5, tol=1e-9, max_iter=300, backend=backend)
    assert abs(result.value.item() - gaussian_ot_1d(0, 1, 1, 2, 0.5)) < 1e-2


@settings(max_examples=15)
@given(
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(1, 6),
    st.sampled_from(METRICS),
    st.floats(0.05, 10),
)
def test_symmetry_translation_and_order(N, M, D, metric, eps):
    x, y, a, b = clouds(1, N, M, D, torch.float64)
    stored, cpu.STORED = cpu.STORED, 0
    try:
        options = {"metric": metric, "eps": eps, "max_iter": 400, "tol": 1e-13}
        r = sinkhorn_points(x, y, a, b, **options)
        if not bool(r.converged):
            return
        other = sinkhorn_points(y, x, b, a, **options)
        torch.testing.assert_close(other.plan, r.plan.mT, rtol=1e-6, atol=1e-11)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(N))
        shuffled = sinkhorn_points(x[:, order], y, a[:, order], b, **options)
        torch.testing.assert_close(shuffled.plan, r.plan[:, order], rtol=1e-6, atol=1e-11)
        if metric != "cosine":
            moved = sinkhorn_points(x + 7, y + 7, a, b, **options)
            torch.testing.assert_close(moved.value, r.value, rtol=1e-9, atol=1e-11)
    finally:
        cpu.STORED = stored


def test_results_do_not_depend_on_threads(monkeypatch):
    x, y, a, b = clouds(1, 700, 900, 3, torch.float32)
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(cpu, "STORED", 0)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            r = sinkhorn_points(leaf, y, a, b, eps=0.05, max_iter=20)
            seen.append([r.f, r.g, r.cost, *torch.autograd.grad(r.value.sum(), leaf)])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for s, t in zip(seen[0], other, strict=True):
            assert torch.equal(s, t)


MEMORY = """
import resource, sys, torch
from otdd.ops import sinkhorn_points
n, backend = int(sys.argv[1]), sys.argv[2]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x, y = torch.rand(n, 3, requires_grad=True), torch.rand(n, 3)
small = sinkhorn_points(x[:64], y[:64], eps=0.1, max_iter=1, backend=backend)
torch.autograd.grad(small.value, x)
before = peak()
r = sinkhorn_points(x, y, eps=0.1, max_iter=1, backend=backend)
torch.autograd.grad(r.value + r.cost, x)
r.barycentric(y)
print(peak() - before)
"""


@pytest.mark.parametrize(("name", "n", "limit"), [("cpu", 6000, 40), ("reference", 4000, 50)])
def test_memory_is_that_of_the_points(name, n, limit):
    """6000 x 6000 costs would be 144 MB, 4000 x 4000 64 MB."""
    assert printed(MEMORY, n, name) < limit


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"x": torch.rand(3)}, ValueError, r"x: got shape \(3,\); accepted: \(\.\.\., N, D\)"),
        ({"y": torch.rand(2, 0, 3)}, ValueError, r"y: got shape \(2, 0, 3\)"),
        ({"y": torch.rand(2, 5, 4)}, ValueError, "y: got D = 4; accepted: D of x, 3"),
        ({"y": torch.rand(3, 5, 3)}, ValueError, r"y: got leading dimensions \(3,\)"),
        ({"y": torch.rand(2, 5, 3).double()}, TypeError, "y: got dtype torch.float64"),
        ({"x": torch.ones(2, 4, 3, dtype=torch.int64)}, TypeError, "x: got dtype torch.int64"),
        ({"x": torch.full((4, 3), NAN)}, ValueError, "x: got nan"),
        ({"y": torch.full((5, 3), INF)}, ValueError, "y: got inf"),
        ({"x": torch.full((4, 3), 1e30)}, ValueError, "x and y: got points 1e[+]30 apart"),
        ({"x": torch.full((4, 3), 1e30), "metric": "l2"}, ValueError, "whose squared l2 cost"),
        ({"metric": "dot"}, ValueError, "metric: got 'dot'; accepted: l1, l2"),
        ({"eps": 0.0}, ValueError, "eps: got 0.0"),
        ({"eps": torch.ones(3)}, ValueError, r"eps: got shape \(3,\)"),
        ({"rho_a": -1.0}, ValueError, "rho_a: got -1.0"),
        ({"max_iter": 0}, ValueError, "max_iter: got 0"),
        ({"tol": NAN}, ValueError, "tol: got nan"),
        ({"grad": "magic"}, ValueError, "grad: got 'magic'"),
        ({"a": torch.ones(5)}, ValueError, r"a: got shape \(5,\)"),
        ({"a": torch.ones(4).double()}, TypeError, "a: got dtype .*; accepted: that of x, torch"),
        ({"a": torch.tensor([0.5, -0.5, 1.0, 1.0])}, ValueError, "a: got a negative weight"),
        ({"b": torch.zeros(5)}, ValueError, "b: got only zero weights"),
        ({"init": (None, torch.full((5,), NAN))}, ValueError, "init: got nan"),
        ({"backend": "abacus"}, ValueError, "abacus"),
    ],
)
def test_bad_input(backend, kwargs, error, says):
    good = {"x": torch.rand(2, 4, 3), "y": torch.rand(2, 5, 3), "eps": 0.1, "backend": backend}
    with pytest.raises(error, match=says):
        sinkhorn_points(**{**good, **kwargs})
