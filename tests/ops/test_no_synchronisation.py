"""On a GPU no op waits for the device or copies from the host: it can be captured in a CUDA graph.

Tensors are fake ones on `cuda`: their values cannot be looked at, and every call they take is seen.
Forward only: a graph of derivatives needs the device itself (tests marked gpu capture whole steps).
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from otdd import backends
from otdd.losses import DatasetDistance, OTLogitLoss
from otdd.ops import barycentric, cost_matrix, sinkhorn


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


def test_unbalanced(calls):
    result = sinkhorn(fake(2, 8, 9), eps=0.1, rho_a=0.5, max_iter=5, init=(fake(2, 8), fake(2, 9)))
    assert result.backend == "cuda"


def test_logit_loss(calls):
    OTLogitLoss()(fake(16, 10), fake(16, 10))


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


def test_a_look_at_a_value_is_seen(calls):
    with pytest.raises(Exception, match="_local_scalar_dense"):
        fake(3).sum().item()
