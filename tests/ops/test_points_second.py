"""Second derivatives of the value between point clouds, against autograd through the oracle."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points_backends import OF_THE_FIXED_POINT, iterations, points_backend
from references import clouds, cost_oracle, sinkhorn_oracle
from torch.func import grad, jacrev, vmap

from otdd.ops import cost_matrix, sinkhorn, sinkhorn_divergence, sinkhorn_points
from otdd.ops.points import cpu, implicit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMOOTH = ("sqeuclidean", "l2", "cosine")


@pytest.fixture(params=OF_THE_FIXED_POINT)
def backend(request, monkeypatch) -> str:
    return points_backend(request.param, monkeypatch)


def balanced(t: torch.Tensor) -> torch.Tensor:
    return t - t.mean(-1, keepdim=True)


def directions(leaves: tuple, hard: bool) -> list[torch.Tensor]:
    """One for each leaf; moving mass on one side alone leaves no plan between hard marginals."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in leaves]
    return [balanced(w) if hard and k in (2, 3) else w for k, w in enumerate(drawn)]


def products(value, leaves: tuple, along: list, hard: bool) -> list[torch.Tensor]:
    """The Hessian's products with `along`, weights' up to a constant."""
    scale = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype)
    first = torch.autograd.grad((value * scale).sum(), leaves, create_graph=True)
    slope = sum((t.double() * w).sum() for t, w in zip(first, along, strict=True))
    second = torch.autograd.grad(slope, leaves)
    return [balanced(t) if hard and k in (2, 3) else t for k, t in enumerate(second)]


def leaves_of(size: tuple) -> tuple:
    return tuple(t.requires_grad_() for t in clouds(2, *size, torch.float64))


def options_of(metric: str, size: tuple, rho: tuple) -> dict:
    eps = torch.tensor([0.8, 1.5], dtype=torch.float64)
    options = {"eps": eps, "max_iter": iterations(metric, size)}
    return options | {k: v for k, v in zip(("rho_a", "rho_b"), rho, strict=True) if v is not None}


@functools.cache
def exact_products(metric: str, size: tuple, rho: tuple) -> list[torch.Tensor]:
    leaves, hard = leaves_of(size), None in rho
    C = cost_oracle(*leaves[:2], metric)
    value = sinkhorn_oracle(C, *leaves[2:], **options_of(metric, size, rho))["value"]
    return products(value, leaves, directions(leaves, hard), hard)


@pytest.mark.parametrize("metric", SMOOTH)
@pytest.mark.parametrize("size", [(1, 6, 3), (6, 1, 2), (33, 20, 5)])
@pytest.mark.parametrize("rho", [(None, None), (0.7, 0.7), (None, 2.0)])
def test_hessian_products(backend, metric, size, rho):
    leaves, hard = leaves_of(size), None in rho
    value = sinkhorn_points(
        *leaves, metric=metric, **options_of(metric, size, rho), backend=backend
    ).value
    got = products(value, leaves, directions(leaves, hard), hard)
    torch.testing.assert_close(got, exact_products(metric, size, rho), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("only", range(5))
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
def test_one_input_at_a_time_and_labels(only, metric, monkeypatch):
    """One direction alone, and the gradient of one leaf alone, costs between labels among them."""
    monkeypatch.setattr(implicit, "KEPT", 0)
    generator = torch.Generator().manual_seed(3)
    W = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in (*clouds(2, 7, 9, 3, torch.float64), W))
    lx = torch.randint(0, 3, (2, 7), generator=generator)
    ly = torch.randint(0, 4, (2, 9), generator=generator)
    options = {"eps": 1.3, "max_iter": 300, "rho_a": 0.9, "rho_b": 0.5}
    between = torch.stack([w[i][:, j] for w, i, j in zip(W, lx, ly, strict=True)])
    labels = {"labels_x": lx, "labels_y": ly, "label_cost": W}
    C = cost_oracle(*leaves[:2], metric) + between
    theirs = sinkhorn_oracle(C, *leaves[2:4], **options)["value"].sum()
    ours = sinkhorn_points(
        *leaves[:4], metric=metric, **options, **labels, backend="reference"
    ).value.sum()
    w = directions(leaves, False)[only]

    def slope(value: torch.Tensor) -> torch.Tensor:
        return (torch.autograd.grad(value, leaves[only], create_graph=True)[0] * w).sum()

    exact = torch.autograd.grad(slope(theirs), leaves)
    for leaf, want in zip(leaves, exact, strict=True):
        (got,) = torch.autograd.grad(slope(ours), leaf, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("metric", SMOOTH)
def test_gradgradcheck(backend, metric):
    leaves = tuple(t.requires_grad_() for t in clouds(2, 3, 4, 2, torch.float64))

    def value(x, y, a, b):
        options = {"eps": 0.8, "max_iter": 100, "backend": backend}
        return sinkhorn_points(x, y, a.softmax(-1), b.softmax(-1), metric=metric, **options).value

    torch.autograd.gradgradcheck(value, leaves, fast_mode=True)


@settings(max_examples=15)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from(SMOOTH),
    st.floats(0.5, 5),
)
def test_hessian_is_symmetric_and_blind_to_translations(N, M, D, metric, eps):
    x, y, a, b = clouds(1, N, M, D, torch.float64)
    x.requires_grad_(), y.requires_grad_()
    r = sinkhorn_points(x, y, a, b, metric=metric, eps=eps, max_iter=2000, tol=1e-13)
    if not bool(r.converged.all()):
        return
    first = torch.autograd.grad(r.value.sum(), (x, y), create_graph=True)

    def product(u: torch.Tensor, v: torch.Tensor) -> tuple:
        slope = (first[0] * u).sum() + (first[1] * v).sum()
        return torch.autograd.grad(slope, (x, y), retain_graph=True)

    generator = torch.Generator().manual_seed(N)
    p, q = (
        [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (x, y)] for _ in range(2)
    )
    Hp, Hq = product(*p), product(*q)
    left, right = (sum((s * t).sum() for s, t in zip(*pair, strict=True)) for pair in (
        (q, Hp), (p, Hq)
    ))  # fmt: skip
    torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-8)
    if metric != "cosine":
        still = product(torch.ones_like(x), torch.ones_like(y))
        assert max(t.abs().max() for t in still) < 1e-8


def test_float32_far_from_the_origin(backend):
    x, y, a, b = clouds(1, 40, 50, 3, torch.float32)
    narrow = tuple(t.requires_grad_() for t in (x + 1e4, y + 1e4, a, b))
    wide = tuple(t.detach().double().requires_grad_() for t in narrow)
    along = directions(narrow, True)
    seen, exact = (
        products(
            sinkhorn_points(*leaves, eps=0.5, max_iter=300, backend=name).value, leaves, along, True
        )
        for leaves, name in ((narrow, backend), (wide, "reference"))
    )
    for s, t in zip(seen, exact, strict=True):
        assert (s.double() - t).norm() < 1e-4 * t.norm()


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
def test_masks_and_coinciding_points(backend, metric):
    x, y, a, b = clouds(1, 8, 9, 2, torch.float64)
    a[0, 5:], b[0, 6:] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    x[0, 5:], y[0, 6:] = 1e3, -1e3
    y[0, :3] = x[0, :3]
    leaves = tuple(t.requires_grad_() for t in (x, y, a, b))
    options = {"eps": 0.8, "max_iter": 300, "backend": backend}
    along = directions(leaves, True)
    got = products(sinkhorn_points(*leaves, metric=metric, **options).value, leaves, along, False)
    # The dense ops of the library are their own oracle for the gradient 0 of a distance 0.
    C = cost_matrix(*leaves[:2], metric, backend="reference")
    want = products(sinkhorn(C, *leaves[2:], **options).value, leaves, along, False)
    for k, n in ((2, 5), (3, 6)):
        got[k], want[k] = balanced(got[k][:, :n]), balanced(want[k][:, :n])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert (got[0][0, 5:] == 0).all()
    assert (got[1][0, 6:] == 0).all()


def test_torch_func_hessian(backend):
    x, y, a, b = clouds(2, 3, 4, 2, torch.float64)

    def value(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sinkhorn_points(x, y, a, b, eps=0.8, max_iter=300, backend=backend).value

    hessian = vmap(jacrev(jacrev(value)))(x, y, a, b)
    assert hessian.shape == (2, 3, 2, 3, 2)
    v = torch.randn(2, 3, 2, dtype=torch.float64)

    def slope(x: torch.Tensor) -> torch.Tensor:
        return (grad(lambda t: value(t, y, a, b).sum())(x) * v).sum()

    got = torch.einsum("bndme,bme->bnd", hessian, v)
    torch.testing.assert_close(got, grad(slope)(x), rtol=1e-7, atol=1e-9)
    step = 1e-4 * v
    moved = [grad(lambda t: value(t, y, a, b).sum())(x + s) for s in (step, -step)]
    torch.testing.assert_close((moved[0] - moved[1]) / 2e-4, got, rtol=1e-4, atol=1e-8)


def test_what_has_no_second_derivative_says_so(backend):
    x, y, *_ = (t.requires_grad_() for t in clouds(1, 5, 6, 2, torch.float64))
    r = sinkhorn_points(x, y, metric="l1", eps=0.5, backend=backend)
    (dx,) = torch.autograd.grad(r.value.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="with metric l1 has no second derivative"):
        dx.sum().backward()
    r = sinkhorn_points(x, y, eps=0.5, backend=backend)
    (dx,) = torch.autograd.grad(r.cost.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="the gradient of `cost`, which then has no"):
        dx.sum().backward()
    (dx,) = torch.autograd.grad(r.value.sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="and none has a third"):
        ddx.sum().backward()


def test_slopes_in_the_weights_move_with_the_points_under_l1_too(backend):
    leaves = tuple(t.requires_grad_() for t in clouds(1, 7, 9, 2, torch.float64))
    options = {"eps": 0.8, "max_iter": 300}
    ours = sinkhorn_points(*leaves, metric="l1", **options, backend=backend).value
    theirs = sinkhorn_oracle(cost_oracle(*leaves[:2], "l1"), *leaves[2:], **options)["value"]
    w = directions(leaves, True)[2]
    got, want = (
        torch.autograd.grad(
            (torch.autograd.grad(v.sum(), leaves[2], create_graph=True)[0] * w).sum(), leaves[:2]
        )
        for v in (ours, theirs)
    )
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("rho", [None, 0.6])
def test_of_the_divergence(kept, rho, monkeypatch):
    monkeypatch.setattr("otdd.ops.points.KEPT", kept)
    monkeypatch.setattr(cpu, "STORED", 0)
    leaves = tuple(t.requires_grad_() for t in clouds(2, 5, 7, 2, torch.float64))
    soft = {} if rho is None else {"rho_a": rho, "rho_b": rho}

    def oracle(x, y, a, b) -> torch.Tensor:
        C = cost_oracle(x, y, "sqeuclidean")
        return sinkhorn_oracle(C, a, b, eps=0.8, max_iter=300, **soft)["value"]

    x, y, a, b = leaves
    theirs = oracle(x, y, a, b) - (oracle(x, x, a, a) + oracle(y, y, b, b)) / 2
    if soft:
        theirs = theirs + 0.4 * (a.sum(-1) - b.sum(-1)).square()
    ours = sinkhorn_divergence(*leaves, eps=0.8, max_iter=300, **soft).value
    along = directions(leaves, rho is None)
    got, want = (products(v, leaves, along, rho is None) for v in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
