"""Plans and gradients keep the digits of float32 where torch is allowed fewer for its products."""

import pytest
import torch
from points_backends import WAYS, points_backend
from references import clouds

from otdd.losses import DatasetDistance
from otdd.ops import METRICS, barycentric, cost_matrix, sinkhorn, sinkhorn_points
from otdd.ops.matmul import matmul
from otdd.ops.moves import transport_moves

BACKENDS = ("reference", "cpu", "cuda", "triton")


@pytest.fixture(params=["allowed by torch", "allowed for the CPU"])
def reduced(request, monkeypatch):
    """Products of float32 may be those of bfloat16, and every one that torch is asked for fails."""
    if request.param == "allowed by torch":
        torch.set_float32_matmul_precision("medium")
    else:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    for place, name in ((torch.Tensor, "__matmul__"), (torch, "einsum")):
        monkeypatch.setattr(place, name, _of_float64(getattr(place, name)))
    yield
    torch.set_float32_matmul_precision("highest")


def _of_float64(multiplied):
    def run(*args):
        assert all(t.dtype != torch.float32 for t in args if isinstance(t, torch.Tensor))
        return multiplied(*args)

    return run


def gradients(value, leaves):
    return torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_costs(reduced, backend, metric):
    x, y, *_ = clouds(2, 5, 6, 3, torch.float32)
    leaves = x.requires_grad_(), y.requires_grad_()
    C = cost_matrix(*leaves, metric, backend=backend)
    slopes = torch.autograd.grad(C.square().sum(), leaves, create_graph=metric != "l1")
    if metric != "l1":
        gradients(slopes[0].square(), leaves)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("metric", METRICS)
def test_clouds(reduced, way, metric, monkeypatch):
    x, y, *_ = clouds(2, 5, 6, 3, torch.float32)
    labels = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
    leaves = x.requires_grad_(), y.requires_grad_(), torch.ones(2, 1, 1, requires_grad=True)
    given = {"labels_x": labels[0], "labels_y": labels[1], "label_cost": leaves[2]}
    options = {"eps": 1.0, "max_iter": 2, "backend": points_backend(way, monkeypatch), **given}
    for grad in ("envelope", "implicit", "unrolled"):
        r = sinkhorn_points(*leaves[:2], metric=metric, grad=grad, **options)
        image = r.barycentric(leaves[1]).sum()
        gradients(r.value.sum() + r.cost.sum() + image, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_and_moves(reduced, backend):
    x, y, *_ = clouds(2, 5, 6, 3, torch.float32)
    C = cost_matrix(x, y, "l1", backend=backend)
    for grad in ("envelope", "implicit"):
        z = y.clone().requires_grad_()
        r = sinkhorn(C.requires_grad_(), eps=1.0, max_iter=2, grad=grad, backend=backend)
        gradients(barycentric(r, z).square(), z)
    a, b = x.new_ones(2, 5), y.new_ones(2, 6)
    options = {"lambda_1": 1.0, "metric": "cosine", "max_iter": 2, "backend": backend}
    for gradient in (False, True):
        transport_moves(x, y, a, b, gradient=gradient, **options)


@pytest.mark.parametrize("labels", ["sinkhorn", "gaussian"])
def test_data_sets(reduced, labels):
    x, y, *_ = clouds(1, 5, 6, 3, torch.float32)
    x, y = x[0].requires_grad_(), y[0].requires_grad_()
    lx, ly = torch.arange(5) % 2, torch.arange(6) % 2
    gradients(DatasetDistance(eps=1.0, labels=labels, max_iter=4)(x, lx, y, ly), (x, y))


def test_products_are_those_of_float64_rounded(reduced):
    p, q = torch.rand(3, 40, 50), torch.rand(3, 50, 20)
    want = (p.double() @ q.double()).float()
    assert torch.equal(matmul(p, q), want)
    assert torch.equal(torch.compile(matmul, fullgraph=True, backend="aot_eager")(p, q), want)
