"""`sinkhorn_points` with costs between labels, and its schedule, against the dense oracle."""

import math
from dataclasses import replace

import pytest
import torch
from points_backends import WAYS, points_backend
from references import clouds, cost_oracle, sinkhorn_oracle

from otdd.ops import METRICS, checks, sinkhorn, sinkhorn_points
from otdd.ops.points import cpu
from otdd.ops.points.levels import through_levels
from otdd.ops.points.reference import Clouds, points_reference
from otdd.ops.sinkhorn.accelerate import levels


@pytest.fixture(params=WAYS)
def backend(request, monkeypatch) -> str:
    return points_backend(request.param, monkeypatch)


def labelled(B: int, N: int, M: int, D: int, dtype: torch.dtype, K: int = 4, L: int = 6) -> tuple:
    """Clouds with weights, labels of each side and costs between labels."""
    generator = torch.Generator().manual_seed(N + M)
    lx = torch.randint(0, K, (B, N), generator=generator)
    ly = torch.randint(0, L, (B, M), generator=generator)
    W = 3 * torch.rand(B, K, L, generator=generator, dtype=torch.float64)
    return *clouds(B, N, M, D, dtype), lx, ly, W.to(dtype)


def dense(x, y, lx, ly, W, metric) -> torch.Tensor:
    between = torch.stack([w[i][:, j] for w, i, j in zip(W, lx, ly, strict=True)])
    return cost_oracle(x, y, metric) + between


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 9, 3), (33, 50, 1), (20, 90, 20)])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
def test_values_and_gradients(backend, metric, size, dtype, tol):
    *points, lx, ly, W = labelled(2, *size, dtype)
    leaves = [t.requires_grad_() for t in (*points, W)]
    x, y, a, b, W = leaves
    labels = {"labels_x": lx, "labels_y": ly, "label_cost": W}
    options = {"eps": 0.7, "max_iter": 3 if backend == "triton" else 60}
    r = sinkhorn_points(x, y, a, b, metric=metric, backend=backend, **options, **labels)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    C = dense(doubles[0], doubles[1], lx, ly, doubles[4], metric)
    expected = sinkhorn_oracle(C, *doubles[2:4], **options)
    for name in ("f", "g", "plan", "value", "cost"):
        got, want = getattr(r, name).double(), expected[name]
        torch.testing.assert_close(got, want, rtol=tol, atol=tol, msg=name)
    z = torch.rand(2, size[1], 3, dtype=dtype)
    torch.testing.assert_close(r.apply(z), r.plan @ z, rtol=tol, atol=tol)
    P = expected["plan"].detach()
    got = torch.autograd.grad((r.value + 2 * r.cost).sum(), (x, y, W))
    want = torch.autograd.grad(3 * (P * C).sum(), (doubles[0], doubles[1], doubles[4]))
    for s, t in zip(got, want, strict=True):
        torch.testing.assert_close(s.double(), t, rtol=tol, atol=10 * tol)


@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
@pytest.mark.parametrize("backend", ["reference"])
def test_other_gradients_keep_the_labels(backend, grad):
    x, y, a, b, lx, ly, W = labelled(2, 9, 11, 3, torch.float64)
    x.requires_grad_(), W.requires_grad_()
    labels = {"labels_x": lx, "labels_y": ly, "label_cost": W}
    options = {"eps": 2.0, "max_iter": 300, "grad": grad}
    r = sinkhorn_points(x, y, a, b, **options, **labels, backend=backend)
    C = dense(x, y, lx, ly, W, "sqeuclidean")
    plan = sinkhorn_oracle(C, a, b, eps=2.0, max_iter=300)["plan"]
    got = torch.autograd.grad(r.plan.square().sum(), (x, W))
    torch.testing.assert_close(got, torch.autograd.grad(plan.square().sum(), (x, W)))


def test_labels_that_all_problems_share(backend):
    x, y, a, b, lx, ly, W = labelled(3, 9, 11, 2, torch.float64)
    options = {"eps": 0.5, "max_iter": 6, "backend": backend}
    shared = {"labels_x": lx[0], "labels_y": ly[0], "label_cost": W[0]}
    alone = sinkhorn_points(x[1], y[1], a[1], b[1], **shared, **options)
    torch.testing.assert_close(sinkhorn_points(x, y, a, b, **shared, **options).f[1], alone.f)


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
@pytest.mark.parametrize("shift", [-50.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_costs_between_labels_of_any_sign_and_size(backend, metric, shift, dtype):
    """Some labels far from all others, and costs all negative or far above those of the points."""
    x, y, a, b, lx, ly, W = labelled(2, 21, 70, 3, dtype)
    W = W + shift
    W[:, 3] += 1e3
    W[:, :, 5] += 1e3
    max_iter = 6 if backend == "triton" else 30  # slow to interpret
    options = {"metric": metric, "eps": 0.5, "max_iter": max_iter}
    labels = {"labels_x": lx, "labels_y": ly, "label_cost": W}
    r = sinkhorn_points(x, y, a, b, **options, **labels, backend=backend)
    doubles = (t.double() for t in (x, y))
    C = dense(*doubles, lx, ly, W.double(), metric)
    expected = sinkhorn_oracle(C, a.double(), b.double(), eps=0.5, max_iter=max_iter)
    unit = 6e-8 if dtype == torch.float32 else 1e-15
    size = C.abs().max().item()
    for name in ("f", "g", "value"):
        got = getattr(r, name).double()
        torch.testing.assert_close(got, expected[name], rtol=0, atol=unit * 100 * size, msg=name)
    bound = unit * (40 + 20 * size / 0.5)  # as many roundings of costs over eps
    assert (r.plan.double() - expected["plan"]).abs().sum() < bound
    assert (r.cost.double() - expected["cost"]).abs().max() < bound * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_that_only_labels_keep_apart(backend, dtype):
    """No column keeps any mass after the first row step: all are done in the log domain."""
    x, y, a, b, lx, ly, W = labelled(1, 30, 40, 2, dtype)
    W = W + 1e5 * torch.arange(6).to(dtype)
    labels = {"labels_x": lx, "labels_y": ly, "label_cost": W}
    C = dense(x.double(), y.double(), lx, ly, W.double(), "sqeuclidean")
    a[0, ::3], b[0, ::4] = 0, 0
    for max_iter in (1, 2, 20):
        r = sinkhorn_points(x, y, a, b, eps=1.0, max_iter=max_iter, **labels, backend=backend)
        expected = sinkhorn_oracle(C, a.double(), b.double(), eps=1.0, max_iter=max_iter)
        unit = 6e-8 if dtype == torch.float32 else 1e-15
        for name in ("f", "g"):
            seen = getattr(r, name).double()
            torch.testing.assert_close(seen, expected[name], rtol=0, atol=unit * 100 * 6e5)


def test_masked_points_may_have_any_label(backend):
    x, y, a, b, lx, ly, W = labelled(1, 12, 20, 3, torch.float64)
    a[0, 9:], b[0, 13:] = 0, 0
    options = {"eps": 0.5, "max_iter": 40, "backend": backend, "label_cost": W}
    cut = x[:, :9], y[:, :13], a[:, :9], b[:, :13]
    alone = sinkhorn_points(*cut, labels_x=lx[:, :9], labels_y=ly[:, :13], **options)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    for label in (0, 3):
        lx[0, 9:], ly[0, 13:] = label, label
        r = sinkhorn_points(*leaves, a, b, labels_x=lx, labels_y=ly, **options)
        torch.testing.assert_close((r.value, r.f[:, :9]), (alone.value, alone.f))
        dx, dy = torch.autograd.grad(r.cost.sum(), leaves)
        assert not dx[0, 9:].any()
        assert not dy[0, 13:].any()


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
def test_points_in_the_same_place_with_different_labels(backend, metric):
    """The L2 gradient divides by the distance, which is 0 here, and not by the cost."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    W = torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64)
    labels = {"labels_x": torch.tensor([0, 0, 1]), "labels_y": torch.tensor([1, 0, 1])}
    x.requires_grad_()
    r = sinkhorn_points(x, y, metric=metric, eps=1.0, label_cost=W, **labels, backend=backend)
    C = cost_oracle(x, y, metric) + W[labels["labels_x"]][:, labels["labels_y"]]
    want = torch.autograd.grad((r.plan.detach() * C).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(r.value, x), want)


@pytest.mark.parametrize("side", ["labels_x", "labels_y"])
@pytest.mark.parametrize("label", [-1, 6])
def test_native_code_reads_no_cost_that_is_not_there(side, label, monkeypatch):
    """Where values are not looked at before, the kernels still do."""
    monkeypatch.setattr(cpu, "STORED", 0)
    monkeypatch.setattr(checks, "values_are_checked", lambda t: False)
    x, y, a, b, lx, ly, W = labelled(1, 9, 11, 2, torch.float64, K=6)
    labels = {"labels_x": lx, "labels_y": ly, "label_cost": W}
    r = sinkhorn_points(x, y, a, b, eps=1.0, **labels, backend="cpu")
    labels[side][0, -1] = label
    with pytest.raises(ValueError, match="sinkhorn_points: got values that the kernel refuses"):
        sinkhorn_points(x, y, a, b, eps=1.0, **labels, backend="cpu")
    with pytest.raises(ValueError, match="a product with the plan: got values that the kernel"):
        replace(r, labels=(lx, ly, W)).apply(torch.rand(1, 11, 2, dtype=torch.float64))


LABELS = {
    "labels_x": torch.zeros(4, dtype=torch.int64),
    "labels_y": torch.zeros(5, dtype=torch.int64),
    "label_cost": torch.rand(2, 3),
}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"labels_x": None}, ValueError, "labels_x: got None beside the others; accepted: labels_"),
        ({"label_cost": None}, ValueError, "label_cost: got None beside the others"),
        (
            {"labels_y": torch.zeros(5)},
            TypeError,
            "labels_y: got torch.float32; accepted: a tensor",
        ),
        ({"labels_y": [0] * 5}, TypeError, "labels_y: got list"),
        (
            {"labels_x": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"labels_x: got shape \(3,\)",
        ),
        ({"labels_x": torch.full((4,), 2)}, ValueError, "labels_x: got labels from 2 to 2; acc"),
        ({"labels_y": torch.full((5,), -1)}, ValueError, "labels_y: got labels from -1 to -1"),
        ({"label_cost": torch.rand(3)}, ValueError, r"label_cost: got shape \(3,\)"),
        ({"label_cost": torch.rand(2, 3).double()}, TypeError, "label_cost: got dtype"),
        ({"label_cost": torch.full((2, 3), math.nan)}, ValueError, "label_cost: got nan"),
    ],
)
def test_bad_labels(change, error, says):
    x, y = torch.rand(4, 3), torch.rand(5, 3)
    with pytest.raises(error, match=says):
        sinkhorn_points(x, y, eps=1.0, **(LABELS | change))


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("metric", METRICS)
def test_schedule_starts_nearer_to_the_same_solution(name, metric, monkeypatch):
    monkeypatch.setattr(cpu, "STORED", 0)
    x, y, a, b = clouds(3, 30, 40, 3, torch.float64)
    scale = torch.tensor([1.0, 0.3, 1.0], dtype=torch.float64)
    x, y = x * scale[:, None, None], y * scale[:, None, None]
    small = 0.2 if metric == "sqeuclidean" else 0.04  # of larger costs
    eps = torch.tensor([small, small, 100.0], dtype=torch.float64)
    options = {"metric": metric, "eps": eps, "backend": name}
    plain = sinkhorn_points(x, y, a, b, max_iter=20000, tol=1e-8, **options)
    r = sinkhorn_points(x, y, a, b, max_iter=20000, tol=1e-8, schedule=0.3, **options)
    assert r.converged.all()
    torch.testing.assert_close(r.plan, plain.plan, rtol=1e-3, atol=1e-7)
    first = [
        sinkhorn_points(x, y, a, b, max_iter=1, schedule=schedule, **options).marginal_error[0]
        for schedule in (None, 0.3)
    ]
    assert first[1] < first[0] / 3
    assert r.n_iter[2] == plain.n_iter[2]  # above the range of its costs there are no levels
    alone = sinkhorn_points(
        x[1], y[1], a[1], b[1], max_iter=20000, tol=1e-8, schedule=0.3, **options | {"eps": small}
    )
    assert alone.n_iter == r.n_iter[1]  # whatever the other problems of its batch are
    torch.testing.assert_close(alone.f, r.f[1])
    with pytest.raises(ValueError, match=r"schedule: got 1\.5; accepted: None, or a ratio in"):
        sinkhorn_points(x, y, eps=1.0, schedule=1.5)


def test_precision_is_one_of_three():
    x, y, *_ = clouds(1, 4, 5, 3, torch.float32)
    with pytest.raises(ValueError, match="precision: got 'tf32'; accepted: highest, high, medium"):
        sinkhorn_points(x, y, eps=1.0, precision="tf32")
    low = sinkhorn_points(x, y, eps=1.0, precision="medium", backend="reference")
    assert torch.equal(low.f, sinkhorn_points(x, y, eps=1.0, backend="reference").f)


def test_a_schedule_ends_where_costs_are_infinite():
    """On a GPU values are not looked at."""
    x, y, a, b = clouds(2, 4, 5, 3, torch.float32)
    x[0, 1] = math.inf
    eps, hard = torch.full((2,), 0.1).double(), torch.full((2,), math.inf).double()
    p = Clouds(x, y, a, b, eps, hard, hard, None, None, None)
    r = through_levels(points_reference, p, torch.zeros(2, 5), "sqeuclidean", 5, 0.0, 0.3)
    assert r.n_iter[0] == 5
    assert r.n_iter[1] > 5
    C = torch.tensor([[[0.0, math.inf], [1.0, 2.0]]])
    assert next(levels(C, a[:1, :2], b[:1, :2], eps[:1], 0.3), None) is None


def test_label_costs_that_overflow_are_told():
    x = torch.tensor([[0.0], [1.7e19]])
    labels = {"labels_x": torch.zeros(2).long(), "labels_y": torch.zeros(2).long()}
    with pytest.raises(ValueError, match=r"x and y: got points 1\.7e\+19 apart; accepted: points"):
        sinkhorn_points(x, x, eps=1e37, **labels, label_cost=torch.tensor([[2e38]]))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_schedule_from_a_range_beyond_the_dtype(streamed, monkeypatch):
    monkeypatch.setattr(cpu, "STORED", 0 if streamed else 1 << 20)
    W, names = torch.tensor([[2e38], [-2e38]]), {"labels_y": torch.zeros(1).long()}
    options = {"eps": 1e36, "max_iter": 3, "schedule": 0.5}
    x = torch.zeros(2, 1)
    labels = {"labels_x": torch.arange(2), "label_cost": W, **names}
    for name in ("reference", "cpu"):
        r = sinkhorn_points(x, x[:1], **options, **labels, backend=name)
        assert torch.isfinite(r.value)
        assert torch.isfinite(sinkhorn(W, **options, backend=name).value)
