"""`torch.func` over the ops: vmap, grad, jacrev, hessians; what is refused says so."""

import pytest
import torch
from references import problem
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from otdd.losses import OTLogitLoss
from otdd.ops import (
    barycentric,
    cost_matrix,
    partial,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_points,
)

BACKENDS = ("reference", "cpu", "cuda", "triton")
GRADS = ("envelope", "unrolled", "implicit")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_mode", GRADS)
def test_vmap_is_a_batch(backend, grad_mode):
    C, a, b = problem(6, 4, 5)
    options = {"eps": 0.1, "max_iter": 4, "rho_a": 0.5, "grad": grad_mode, "backend": backend}
    names = ("value", "cost", "f", "g", "plan", "marginal_error", "n_iter", "converged")

    def fields(C: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None = None) -> tuple:
        result = sinkhorn(C, a, b, **options)
        return tuple(getattr(result, name) for name in names)

    want = fields(C, a, b)
    for x, y in zip(vmap(fields)(C, a, b), want, strict=True):
        torch.testing.assert_close(x, y)
    nested = vmap(vmap(fields))(*(t.reshape(2, 3, *t.shape[1:]) for t in (C, a, b)))
    for x, y in zip(nested, want, strict=True):
        torch.testing.assert_close(x.flatten(0, 1), y)
    shared = vmap(fields, in_dims=(2, None))(C.permute(1, 2, 0), a[0])
    for x, y in zip(shared, fields(C, a[0]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", GRADS)
def test_gradients_of_each_problem_of_a_batch(backend, mode):
    C, a, b = problem(4, 5, 6)

    def loss(C: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = sinkhorn(C, a, b, eps=0.2, max_iter=5, rho_b=1.0, grad=mode, backend=backend)
        return result.value + result.cost.square()

    got = vmap(grad(loss, argnums=(0, 1, 2)))(C, a, b)
    leaves = tuple(t.clone().requires_grad_() for t in (C, a, b))
    want = torch.autograd.grad(loss(*leaves).sum(), leaves)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    outside = grad(lambda C: vmap(loss)(C, a, b).sum())(C)
    torch.testing.assert_close(outside, want[0])
    rows = jacrev(lambda C: loss(C, a, b))(C)
    torch.testing.assert_close(rows.sum(1), want[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_hessian_of_value(backend):
    C = problem(2, 3, 4)[0]

    def value(C: torch.Tensor) -> torch.Tensor:
        return sinkhorn(C, eps=0.3, max_iter=500, backend=backend).value

    hessian = vmap(jacrev(jacrev(value)))(C).reshape(2, 12, 12)
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-6, atol=1e-8)
    assert (torch.linalg.eigvalsh(hessian) < 1e-7).all()  # the value is concave in the cost
    step = 1e-4 * torch.randn(2, 3, 4, dtype=C.dtype)
    moved = grad(lambda C: value(C).sum())(C + step) - grad(lambda C: value(C).sum())(C - step)
    product = (hessian @ (2 * step).reshape(2, 12, 1)).reshape(2, 3, 4)
    torch.testing.assert_close(moved, product, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_barycentric_under_vmap_and_grad(backend):
    C, a, b = problem(3, 4, 5)
    y = torch.rand(3, 5, 2, dtype=C.dtype)

    def image(C: torch.Tensor, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = sinkhorn(C, a, b, eps=0.2, max_iter=9, grad="implicit", backend=backend)
        return barycentric(result, y)

    torch.testing.assert_close(vmap(image)(C, a, b, y), image(C, a, b, y))

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return image(*tensors).square().sum()

    leaves = tuple(t.clone().requires_grad_() for t in (C, a, b, y))
    want = torch.autograd.grad(loss(*leaves), leaves)
    for x, t in zip(vmap(grad(loss, argnums=(0, 1, 2, 3)))(C, a, b, y), want, strict=True):
        torch.testing.assert_close(x, t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused_not_zero(backend):
    def value(C):
        return sinkhorn(C, eps=0.1, max_iter=2, backend=backend).value

    C = torch.rand(3, 4)
    for forward in (
        lambda: jvp(value, (C,), (C,)),
        lambda: jvp(vmap(value), (C[None],), (C[None],)),
        lambda: vmap(lambda C: jvp(value, (C,), (C,)))(C[None]),
        lambda: hessian(value)(C),
    ):
        with pytest.raises(NotImplementedError, match=r"forward-mode derivatives.*jacrev"):
            forward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_are_refused_not_constant(backend, requires_grad):
    t, options = torch.rand(4, 4), {"eps": 0.1, "max_iter": 2, "backend": backend}
    fixed = sinkhorn(t, **options)
    for op in (
        lambda C: sinkhorn(C, **options),
        lambda a: sinkhorn(t, a[0], **options),
        lambda C: partial(C, mass=0.5, **options),
        lambda x: sinkhorn_points(x, t, **options),
        lambda x: sinkhorn_divergence(t, x, **options),
        lambda x: cost_matrix(x, t, backend=backend),
        lambda y: barycentric(fixed, y),
        lambda x: OTLogitLoss(max_iter=2, backend=backend)(x, t),
    ):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(t.clone().requires_grad_(requires_grad), t)
            with pytest.raises(NotImplementedError, match="forward-mode"):
                op(dual)
    with forward_ad.dual_level():  # without a dual number all is as ever
        torch.testing.assert_close(sinkhorn(t, **options).value, fixed.value)
    C = t.clone().requires_grad_()
    value = sinkhorn(C, **options).value
    with forward_ad.dual_level():
        along = forward_ad.make_dual(torch.ones(()), torch.ones(()))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.autograd.grad(value, C, along)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients_of_autograd_are_refused_in_a_line(backend):
    C = torch.rand(2, 3, 4)

    def value(C: torch.Tensor) -> torch.Tensor:
        return sinkhorn(C, eps=0.1, max_iter=2, backend=backend).value

    with pytest.raises(NotImplementedError, match=r"batched gradients .* torch\.func\.vmap"):
        torch.autograd.functional.jacobian(value, C, vectorize=True)
    want = torch.autograd.functional.jacobian(value, C)
    torch.testing.assert_close(jacrev(value)(C), want)
