"""On a GPU no op waits for the device or copies from the host: it can be captured in a CUDA graph.

Tensors are fake ones on `cuda`: their values cannot be looked at, and every call they take is seen.
Forward only: a graph of derivatives needs the device itself (tests marked gpu capture whole steps).
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from otdd import backends
from otdd.losses import DatasetDistance, OTDistillationLoss, OTLogitLoss
from otdd.ops import barycentric, cost_matrix, pointers, sinkhorn, sinkhorn_points, watch
from otdd.ops.moves import transport_moves
from otdd.ops.points import tiles
from otdd.ops.points.reference import Clouds


class Calls(TorchDispatchMode):
    """Names of the calls, and of those that copy between host and device."""

    def __init__(self):
        super().__init__()
        self.names, self.moves = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.names.add(name)
        inputs = {t.device.type for t in args if isinstance(t, torch.Tensor)}
        result = out.device.type if isinstance(out, torch.Tensor) else None
        copies = ("aten::_to_copy", "aten::copy_", "aten::lift_fresh")
        if name in copies and result and inputs - {result}:
            self.moves.append(name)
        return out


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.delenv("OTDD_CHECKS", raising=False)
    monkeypatch.setitem(backends._REASONS, "cuda", None)
    with FakeTensorMode(allow_non_fake_inputs=True), Calls() as calls:
        yield calls
    assert not calls.moves, calls.moves


def fake(*shape, **options):
    return torch.empty(*shape, device="cuda", **options)


@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize("eps", [0.1, "tensor"])
def test_solve(calls, grad, eps):
    x, y = fake(3, 20, 7), fake(3, 30, 7)
    a = fake(3, 20)
    eps = fake(3) if eps == "tensor" else eps
    C = cost_matrix(x, y, "l1")
    result = sinkhorn(C, a, eps=eps, max_iter=5, grad=grad, tol=1e-4)
    assert result.backend == "cuda"
    barycentric(result, y)
    assert result.plan.shape == C.shape
    assert {"otdd::cost_matrix", "otdd::sinkhorn"} <= calls.names


@pytest.mark.parametrize("metric", ["l1", "cosine"])
@pytest.mark.parametrize("gradient", [True, False])
def test_moves(calls, metric, gradient):
    points = fake(3, 20, 7), fake(3, 30, 7), fake(3, 25), fake(3, 30)
    options = {"lambda_1": 0.1, "metric": metric, "max_iter": 5, "gradient": gradient}
    moves = transport_moves(*points, **options, given=fake(3, 5, 30))
    assert moves.of_x.shape == (3, 20, 7)
    assert "otdd::transport_moves" in calls.names


def test_unbalanced(calls):
    result = sinkhorn(fake(2, 8, 9), eps=0.1, rho_a=0.5, max_iter=5, init=(fake(2, 8), fake(2, 9)))
    assert result.backend == "cuda"


def test_logit_loss(calls):
    OTLogitLoss()(fake(16, 10), fake(16, 10))


@pytest.mark.parametrize("soft", ["mse", "kl"])
def test_distillation_loss(calls, soft):
    labels = fake(16, dtype=torch.int64)
    OTDistillationLoss(soft=soft)(fake(16, 10), fake(16, 10), labels, parts=True)


@pytest.mark.parametrize("labels", ["sinkhorn", "given"])
def test_dataset_distance(calls, monkeypatch, labels):
    """One read, of the sizes of the classes; none where their costs are given."""
    monkeypatch.setitem(backends._REASONS, "triton", None)
    reads = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda t: reads.append(t) or [3, 7, 1, 8])
    x, y = fake(10, 3), fake(2, 9, 3)
    lx, ly = fake(10, dtype=torch.int64), fake(2, 9, dtype=torch.int64)
    options = {"num_classes": 2} if labels == "sinkhorn" else {"labels": fake(2, 2)}
    assert DatasetDistance(**options)(x, lx, y, ly).shape == (2,)
    assert len(reads) == (labels == "sinkhorn")
    assert "otdd::sinkhorn_points" in calls.names


class NoKernel:
    """Launched, does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


class Unseen:
    """A look that never arrives."""

    def __init__(self, flag):
        assert flag.shape == ()

    def arrived(self):
        return False


def test_points(calls):
    x, y = fake(3, 20, 7), fake(3, 30, 7)
    result = sinkhorn_points(x, y, fake(3, 20), eps=0.1, max_iter=5, tol=1e-4)
    assert result.backend == "cuda"
    result.barycentric(y)
    assert {"otdd::sinkhorn_points", "otdd::sinkhorn_points_product"} <= calls.names


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("keep", ["resident", "nothing", "all", "panels"])
@pytest.mark.parametrize("tol", [0.0, 1e-4])
def test_points_by_triton(monkeypatch, tol, keep, precision):
    """All that the host does around the kernels, but the look at whether all have stopped.

    On `meta`, whose values cannot be looked at either: fake ones on `cuda` can't be sliced here.
    """
    triton = pytest.importorskip("otdd.ops.points.triton")
    for name in ("softmin", "merge", "decide", "tile"):
        monkeypatch.setattr(triton.kernels, f"{name}_kernel", NoKernel())
    solves = pointers.triton_kernels("sinkhorn").triton_solve
    for name in ("solve_resident", "values"):
        monkeypatch.setattr(solves, name, NoKernel())
    monkeypatch.setattr(triton, "_processors", lambda device: 132)
    monkeypatch.setattr(tiles, "RESIDENT", 1 << 16 if keep == "resident" else 0)
    monkeypatch.setattr(watch, "Look", Unseen)
    monkeypatch.setattr(tiles, "STORED", 0 if keep == "panels" else 1 << 20)
    monkeypatch.setattr(tiles, "PANEL", 1 << 9)
    D = 20 if keep == "nothing" else 100
    x, y, a, b, g = (
        torch.empty(3, *shape, device="meta") for shape in ((20, D), (30, D), (20,), (30,), (30,))
    )
    eps = torch.empty(3, dtype=torch.float64, device="meta")
    p = Clouds(x, y, a, b, eps, eps, eps, None, None, None)
    with Calls() as calls:
        r = triton.points_triton(p, g, "sqeuclidean", 5, tol, precision)
        rest = r.f, r.g, a, g, eps, y
        dx = triton.product_triton(p, *rest, "sqeuclidean", "difference", False, precision)
    assert (r.f.shape, dx.shape) == (a.shape, x.shape)
    assert not calls.moves, calls.moves
    assert calls.names


def test_a_look_at_a_value_is_seen(calls):
    with pytest.raises(Exception, match="_local_scalar_dense"):
        fake(3).sum().item()
