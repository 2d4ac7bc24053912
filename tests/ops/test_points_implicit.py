"""Derivatives of the fixed point of `sinkhorn_points` against autograd through the oracle."""

import functools

import pytest
import torch
from peak_memory import printed
from points_backends import OF_THE_FIXED_POINT, iterations, points_backend
from references import clouds, cost_oracle, sinkhorn_oracle

from otdd.ops import METRICS, sinkhorn_points
from otdd.ops.points import implicit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SIZES = [(1, 9, 3), (9, 1, 2), (33, 20, 5)]
OUTPUTS = ("value", "cost", "f", "g", "image", "back", "projection")


@pytest.fixture(params=OF_THE_FIXED_POINT)
def backend(request, monkeypatch) -> str:
    return points_backend(request.param, monkeypatch)


def leaves_of(size: tuple, dtype: torch.dtype = torch.float64) -> tuple:
    return tuple(t.requires_grad_() for t in clouds(2, *size, dtype))


def loss_of(outputs: dict, names: tuple, hard: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    total = 0
    for name in names:
        t = outputs[name]
        w = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        if hard and name in "fg":  # f + c, g - c are as good
            w = w - w.mean(-1, keepdim=True)
        total = total + (t.double() * w).sum()
    return total


def images(z, w, plan, a) -> dict:
    return {
        "image": plan @ z,
        "back": plan.mT @ w,
        "projection": plan @ z / a.unsqueeze(-1),
    }


def values(N: int, M: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(2, M, 3, **draw), torch.randn(2, N, 2, **draw)


def outputs_of(r, z, w) -> dict:
    made = {"image": r.apply(z), "back": r.apply(w, transpose=True)}
    made["projection"] = r.barycentric(z)
    return made | {name: getattr(r, name) for name in ("value", "cost", "f", "g")}


def gauge_free(grads: tuple, hard: bool) -> list:
    """Weights' gradients up to a constant, which no change of mass sees."""
    return [
        t - t.mean(-1, keepdim=True) if hard and k in (2, 3) else t for k, t in enumerate(grads)
    ]


def gradients_of(outputs: dict, leaves: tuple, rho: tuple) -> list:
    """Of some outputs, and of all of them, up to what hard marginals leave open."""
    hard, found = rho == (None, None), []
    for names in (("value",), ("cost",), ("f", "g"), OUTPUTS):
        grads = torch.autograd.grad(loss_of(outputs, names, hard), leaves, retain_graph=True)
        # With one penalty a change of mass has no slope between hard marginals.
        found.append(gauge_free(grads, None in rho))
    return found


def options_of(metric: str, size: tuple, rho: tuple) -> dict:
    eps = torch.tensor([0.8, 1.5], dtype=torch.float64)
    options = {"eps": eps, "max_iter": iterations(metric, size)}
    return options | {k: v for k, v in zip(("rho_a", "rho_b"), rho, strict=True) if v is not None}


@functools.cache
def exact_gradients(metric: str, size: tuple, rho: tuple) -> list:
    leaves = leaves_of(size)
    C = cost_oracle(*leaves[:2], metric)
    expected = sinkhorn_oracle(C, *leaves[2:], **options_of(metric, size, rho))
    expected |= images(*values(*size[:2]), expected["plan"], leaves[2])
    return gradients_of(expected, leaves, rho)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rho", [(None, None), (0.7, 0.7), (0.4, None)])
def test_implicit_is_exact_at_convergence(backend, metric, size, rho):
    leaves = leaves_of(size)
    options = {
        "metric": metric,
        "grad": "implicit",
        "backend": backend,
        **options_of(metric, size, rho),
    }
    r = sinkhorn_points(*leaves, **options)
    got = gradients_of(outputs_of(r, *values(*size[:2])), leaves, rho)
    want = exact_gradients(metric, size, rho)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_gradcheck(backend):
    x, y, a, b = leaves_of((4, 5, 2))

    def outputs(x, y, a, b, z):
        r = sinkhorn_points(
            x, y, a.softmax(-1), b.softmax(-1), eps=0.8, max_iter=100, grad="implicit",
            backend=backend,
        )  # fmt: skip
        f, g = (t - t.mean(-1, keepdim=True) for t in (r.f, r.g))
        return r.value, r.cost, f, g, r.apply(z), r.barycentric(z)

    z = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(outputs, (x, y, a, b, z), fast_mode=True)


@pytest.mark.parametrize("metric", METRICS)
def test_labels(metric, monkeypatch):
    for kept in (0, 1 << 20):
        monkeypatch.setattr(implicit, "KEPT", kept)
        generator = torch.Generator().manual_seed(3)
        x, y, a, b = leaves_of((9, 11, 3))
        lx = torch.randint(0, 4, (2, 9), generator=generator)
        ly = torch.randint(0, 6, (2, 11), generator=generator)
        W = torch.rand(2, 4, 6, generator=generator, dtype=torch.float64).requires_grad_()
        labels = {"labels_x": lx, "labels_y": ly, "label_cost": W}
        options = {"metric": metric, "eps": 2.0, "max_iter": 400}
        r = sinkhorn_points(x, y, a, b, **options, **labels, grad="implicit", backend="reference")
        between = torch.stack([w[i][:, j] for w, i, j in zip(W, lx, ly, strict=True)])
        C = cost_oracle(x, y, metric) + between
        expected = sinkhorn_oracle(C, a, b, eps=2.0, max_iter=400)
        z, w = values(9, 11)
        expected |= images(z, w, expected["plan"], a)
        leaves = x, y, a, b, W
        got, want = (
            gauge_free(torch.autograd.grad(loss_of(o, OUTPUTS, True), leaves), True)
            for o in (outputs_of(r, z, w), expected)
        )
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean"])
def test_on_gpu_backends(backend, metric, monkeypatch):
    """The same as plain PyTorch makes of the same potentials, converged or not."""
    points_backend(backend, monkeypatch)
    leaves, (z, w) = leaves_of((9, 12, 3)), values(9, 12)
    options = {"metric": metric, "eps": 2.0, "max_iter": 5, "rho_a": 0.7}
    grads = []
    for name in (backend, "reference"):
        r = sinkhorn_points(*leaves, **options, grad="implicit", backend=name)
        loss = loss_of(outputs_of(r, z, w), OUTPUTS, False)
        grads.append(torch.autograd.grad(loss, leaves))
        if metric != "l1":
            value = sinkhorn_points(*leaves, **options, backend=name).value.sum()
            first = torch.autograd.grad(value, leaves, create_graph=True)
            slope = sum(t.square().sum() for t in first)
            grads[-1] += torch.autograd.grad(slope, leaves)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_masks_have_no_gradient(backend):
    x, y, a, b = clouds(3, 12, 10, 3, torch.float64)
    sizes = (12, 10), (5, 3), (1, 7)
    for k, (n, m) in enumerate(sizes):
        a[k, n:], b[k, m:] = 0, 0
        x[k, n:], y[k, m:] = 1e3, -1e3
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    leaves = tuple(t.requires_grad_() for t in (x, y, a, b))
    z = torch.randn(10, 2, dtype=torch.float64)
    options = {"eps": 0.9, "max_iter": 500}
    r = sinkhorn_points(*leaves, **options, grad="implicit", backend=backend)
    got = torch.autograd.grad((r.value + r.cost + r.apply(z).square().sum((1, 2))).sum(), leaves)
    for k, (n, m) in enumerate(sizes):
        cuts = slice(n), slice(m), slice(n), slice(m)
        parts = [t[k].detach()[cut].requires_grad_() for t, cut in zip(leaves, cuts, strict=True)]
        e = sinkhorn_oracle(cost_oracle(*parts[:2], "sqeuclidean"), *parts[2:], **options)
        loss = e["value"] + e["cost"] + (e["plan"] @ z[:m]).square().sum()
        want = gauge_free(torch.autograd.grad(loss, parts), True)
        seen = gauge_free([t[k][cut] for t, cut in zip(got, cuts, strict=True)], True)
        torch.testing.assert_close(seen, want, rtol=1e-7, atol=1e-7)
        assert all((t[k][c.stop :] == 0).all() for t, c in zip(got, cuts, strict=True))


def test_float32_far_from_the_origin(backend):
    x, y, a, b = clouds(1, 40, 50, 3, torch.float32)
    narrow = tuple(t.requires_grad_() for t in (x + 1e4, y + 1e4, a, b))
    wide = tuple(t.detach().double().requires_grad_() for t in narrow)
    w = torch.randn(40, 3, dtype=torch.float64)
    grads = []
    for leaves, name in ((narrow, backend), (wide, "reference")):
        options = {"eps": 0.5, "max_iter": 300, "grad": "implicit", "backend": name}
        r = sinkhorn_points(*leaves, **options)
        images = (r.barycentric(leaves[1] - 1e4).double() * w).sum() + r.cost.sum()
        grads.append(gauge_free(torch.autograd.grad(images, leaves), True))
    for seen, exact in zip(*grads, strict=True):
        gap = (seen.double() - exact).norm() / exact.norm()
        assert gap < 1e-4


def test_a_cloud_that_all_problems_share(backend):
    x, y, *_ = clouds(3, 9, 8, 5, torch.float64)
    shared = y[0].requires_grad_()
    options = {"eps": 2.0, "max_iter": 300, "grad": "implicit", "backend": backend}
    cost = sinkhorn_points(x, shared, **options).cost
    alone = sum(sinkhorn_points(t, shared, **options).cost for t in x)
    got, want = (torch.autograd.grad(t.sum(), shared) for t in (cost, alone))
    torch.testing.assert_close(got, want)


def test_unrolled_images_are_those_of_the_iterations(backend):
    leaves = leaves_of((6, 8, 3))
    options = {"eps": 0.9, "max_iter": 3}
    r = sinkhorn_points(*leaves, **options, grad="unrolled", backend=backend)
    expected = sinkhorn_oracle(cost_oracle(*leaves[:2], "sqeuclidean"), *leaves[2:], **options)
    z, w = values(6, 8)
    expected |= images(z, w, expected["plan"], leaves[2])
    got, want = (
        torch.autograd.grad(loss_of(o, OUTPUTS, False), leaves)
        for o in (outputs_of(r, z, w), expected)
    )
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_only_unrolled_is_refused_above_the_size_of_a_cost_matrix():
    x = torch.rand(6000, 2)
    with pytest.raises(ValueError, match="grad: got 'unrolled' for 36000000 costs; accepted"):
        sinkhorn_points(x, x, eps=0.1, grad="unrolled")


def test_there_is_no_second_derivative(backend):
    x, y, *_ = leaves_of((5, 6, 2))
    r = sinkhorn_points(x, y, eps=0.5, grad="implicit", backend=backend)
    for loss in (r.value, r.cost, r.apply(y)):
        (dx,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="sinkhorn_points: only `value` under"):
            dx.sum().backward()


def test_opcheck(backend):
    x, y, a, b = clouds(2, 4, 5, 3, torch.float32)
    eps, g = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(2, 5)
    problem = x, y, a, b, eps, 2 * eps, 3 * eps, None, None, None
    f, scale = torch.zeros(2, 4), torch.ones(2)
    needs, options = (True, False, False), ("l2", "highest", backend)
    ops = torch.ops.otdd
    args = *problem, f, g, f, g, scale, *needs, *options
    torch.library.opcheck(ops.sinkhorn_points_implicit.default, args)
    args = *problem, f, g, scale, x, None, a, None, None, *needs, *options
    torch.library.opcheck(ops.sinkhorn_points_second.default, args)
    args = *problem, f, g, y, x, *needs, "l1", backend
    torch.library.opcheck(ops.sinkhorn_points_image_backward.default, args)


def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    x, y, *_ = (t.requires_grad_() for t in clouds(2, 6, 5, 3, torch.float32))

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        options = {"eps": 0.5, "max_iter": 7, "grad": "implicit", "backend": backend}
        result = sinkhorn_points(x, y, metric="l2", **options)
        return result.value.sum() + result.cost.sum() + result.barycentric(y).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want, got = step(x, y), compiled(x, y)
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(want, (x, y))
    torch.testing.assert_close(torch.autograd.grad(got, (x, y)), expected)


def test_vmap_and_grad_are_a_batch(backend):
    x, y, a, b = clouds(4, 6, 5, 3, torch.float64)

    def loss(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        options = {"eps": 0.5, "max_iter": 9, "grad": "implicit", "backend": backend}
        r = sinkhorn_points(x, y[0], a, b[0], **options)
        return r.cost + r.apply(y[0]).square().sum((-1, -2))

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, a)
    leaves = x.clone().requires_grad_(), a.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves).sum(), leaves))


MEMORY = """
import resource, sys, torch
from otdd.ops import sinkhorn_points
from otdd.ops.points import blocks, cpu, implicit, reference
n, backend = int(sys.argv[1]), sys.argv[2]
cpu.STORED = implicit.KEPT = 0
blocks._BLOCK = reference._BLOCK = 1 << 16
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(x, y):
    r = sinkhorn_points(x, y, eps=1.0, max_iter=3, grad="implicit", backend=backend)
    torch.autograd.grad(r.value + r.cost + r.apply(y).square().sum(), x)
    value = sinkhorn_points(x, y, eps=1.0, max_iter=3, backend=backend).value
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    torch.autograd.grad(dx.square().sum(), x)
x, y = torch.rand(n, 3, requires_grad=True), torch.rand(n, 3)
run(x[:64], y[:64])
before = peak()
run(x, y)
print(peak() - before)
"""


@pytest.mark.parametrize(("name", "n", "limit"), [("cpu", 3000, 40), ("reference", 2000, 20)])
def test_memory_is_that_of_the_points(name, n, limit):
    """3000 x 3000 costs in float64 would be 69 MB, 2000 x 2000 31 MB, or half in float32."""
    assert printed(MEMORY, n, name) < limit
