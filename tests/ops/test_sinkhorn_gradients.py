"""The gradients of `sinkhorn` and `barycentric` against autograd through the oracle."""

import pytest
import torch
from references import problem, sinkd_oracle, sinkhorn_oracle

from otdd.ops import barycentric, sinkhorn

BACKENDS = ("reference", "cpu", "cuda", "triton")
SIZES = [(1, 1), (1, 6), (6, 1), (5, 7), (17, 33), (40, 20)]
OUTPUTS = ("value", "cost", "plan", "f", "g")


def leaves(B: int, N: int, M: int, dtype=torch.float64, decades: float = 1.0):
    return [t.requires_grad_() for t in problem(B, N, M, dtype, decades)]


def loss_of(outputs: dict, names: tuple, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for name in names:
        t = outputs[name]
        w = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        total = total + (t.double() * w).sum()
    return total


def as_dict(result) -> dict:
    return {name: getattr(result, name) for name in OUTPUTS}


def gauge_free(grads) -> list:
    """Weights' gradients up to a constant, which no change of mass sees."""
    return [grads[0]] + [t - t.mean(-1, keepdim=True) for t in grads[1:]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("names", [("value",), ("cost",), ("plan",), ("f", "g"), OUTPUTS])
@pytest.mark.parametrize("max_iter", [1, 2, 9])
def test_unrolled_is_exact_at_any_iteration(backend, size, names, max_iter):
    C, a, b = leaves(2, *size)
    eps = torch.tensor([0.3, 0.05], dtype=torch.float64)
    result = sinkhorn(C, a, b, eps=eps, max_iter=max_iter, grad="unrolled", backend=backend)
    expected = sinkhorn_oracle(C, a, b, eps=eps, max_iter=max_iter)
    got = torch.autograd.grad(loss_of(as_dict(result), names), (C, a, b))
    want = torch.autograd.grad(loss_of(expected, names), (C, a, b))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_unrolled_at_every_ratio_of_cost_to_eps(backend, ratio, dtype, tol):
    C, a, b = leaves(2, 20, 30, dtype)
    wide = [t.detach().double().requires_grad_() for t in (C, a, b)]
    result = sinkhorn(C, a, b, eps=1 / ratio, max_iter=15, grad="unrolled", backend=backend)
    expected = sinkhorn_oracle(*wide, eps=1 / ratio, max_iter=15)
    got = torch.autograd.grad(result.cost.sum() + result.value.sum(), (C, a, b))
    want = torch.autograd.grad(expected["cost"].sum() + expected["value"].sum(), wide)
    for seen, exact in zip(got, want, strict=True):
        assert torch.isfinite(seen).all()
        gap = (seen.double() - exact).norm() / exact.norm()
        assert gap <= tol * max(1, ratio / 1e3), gap


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("names", [("value",), ("cost",), ("plan",), ("value", "cost", "plan")])
def test_implicit_is_exact_at_convergence(backend, size, names):
    C, a, b = leaves(2, *size)
    result = sinkhorn(C, a, b, eps=0.1, max_iter=300, grad="implicit", backend=backend)
    expected = sinkhorn_oracle(C, a, b, eps=0.1, max_iter=300)
    got = torch.autograd.grad(loss_of(as_dict(result), names), (C, a, b))
    want = torch.autograd.grad(loss_of(expected, names), (C, a, b))
    torch.testing.assert_close(gauge_free(got), gauge_free(want), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_envelope(backend, size, dtype, tol):
    C, a, b = leaves(2, *size, dtype)
    result = sinkhorn(C, a, b, eps=0.1, max_iter=300, backend=backend)
    wide = [t.detach().double().requires_grad_() for t in (C, a, b)]
    expected = sinkhorn_oracle(*wide, eps=0.1, max_iter=300)
    got = torch.autograd.grad(result.value.sum(), (C, a, b), retain_graph=True)
    want = torch.autograd.grad(expected["value"].sum(), wide)
    torch.testing.assert_close(
        [t.double() for t in gauge_free(got)], gauge_free(want), rtol=tol, atol=tol
    )
    torch.testing.assert_close(got[1:], (result.f, result.g))
    (held,) = torch.autograd.grad(result.cost.sum(), C)
    torch.testing.assert_close(held, result.plan)
    assert not result.plan.requires_grad
    assert not result.f.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize("padding", [0.0, 1e5])
def test_masks_have_no_gradient(backend, grad, padding):
    C, a, b = problem(3, 9, 8)
    rows, columns = [9, 4, 2], [3, 8, 5]
    for k, (n, m) in enumerate(zip(rows, columns, strict=True)):
        a[k, n:], b[k, m:] = 0, 0
        C[k, n:], C[k, :, m:] = padding, padding
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    C, a, b = (t.requires_grad_() for t in (C, a, b))
    steps = 5 if grad == "unrolled" else 300
    result = sinkhorn(C, a, b, eps=0.2, max_iter=steps, grad=grad, backend=backend)
    loss = result.value.sum() + (0 if grad == "envelope" else 2) * result.cost.sum()
    if grad != "envelope":
        loss = loss + (result.plan**2).sum()
    loss.backward()
    for k, (n, m) in enumerate(zip(rows, columns, strict=True)):
        part = [
            t[k].detach()[cut].requires_grad_()
            for t, cut in ((C, (slice(n), slice(m))), (a, slice(n)), (b, slice(m)))
        ]
        expected = sinkhorn_oracle(*part, eps=0.2, max_iter=steps)
        loss = expected["value"] + (0 if grad == "envelope" else 2) * expected["cost"]
        if grad != "envelope":
            loss = loss + (expected["plan"] ** 2).sum()
        want = torch.autograd.grad(loss, part)
        got = [C.grad[k, :n, :m], a.grad[k, :n], b.grad[k, :m]]
        if grad != "unrolled":
            got, want = gauge_free(got), gauge_free(want)
        torch.testing.assert_close(list(got), list(want), rtol=1e-7, atol=1e-8)
        assert (C.grad[k, n:] == 0).all()
        assert (C.grad[k, :, m:] == 0).all()
        assert (a.grad[k, n:] == 0).all()
        assert (b.grad[k, m:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrolled_stops_where_the_solve_stopped(backend):
    C, a, b = leaves(3, 8, 9)
    eps = torch.tensor([1.0, 0.2, 0.05], dtype=torch.float64)
    options = {"eps": eps, "max_iter": 60, "tol": 1e-4, "grad": "unrolled", "backend": backend}
    result = sinkhorn(C, a, b, **options)
    got = torch.autograd.grad(loss_of(as_dict(result), OUTPUTS), (C, a, b))
    parts = []
    for k in range(3):
        steps = int(result.n_iter[k])
        parts.append(sinkhorn_oracle(C[k], a[k], b[k], eps=eps[k], max_iter=steps))
    stacked = {name: torch.stack([p[name] for p in parts]) for name in OUTPUTS}
    want = torch.autograd.grad(loss_of(stacked, OUTPUTS), (C, a, b))
    assert result.n_iter.unique().numel() == 3
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrolled_after_a_warm_start(backend):
    C, a, b = leaves(2, 6, 7)
    g = torch.randn(2, 7, dtype=torch.float64)
    options = {"eps": 0.1, "max_iter": 4, "grad": "unrolled", "backend": backend}
    result = sinkhorn(C, a, b, init=(None, g), **options)
    expected = sinkhorn_oracle(C, a, b, eps=0.1, max_iter=4, g=g)
    got = torch.autograd.grad(loss_of(as_dict(result), OUTPUTS), (C, a, b))
    want = torch.autograd.grad(loss_of(expected, OUTPUTS), (C, a, b))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrolled_sinkd_is_autograd_through_the_normalisations(backend):
    C = problem(2, 6, 6)[0].requires_grad_()
    options = {"eps": 0.1, "max_iter": 20, "marginals": "sinkd", "backend": backend}
    result = sinkhorn(C, grad="unrolled", **options)
    (got,) = torch.autograd.grad(result.cost.sum(), C)
    (want,) = torch.autograd.grad((sinkd_oracle(C, 0.1, 20) * C).sum(), C)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_large_problem(backend):
    C, a, b = leaves(1, 400, 500, torch.float32)  # worked in parts, by all threads
    result = sinkhorn(C, a, b, eps=0.05, max_iter=5, grad="unrolled", backend=backend)
    wide = [t.detach().double().requires_grad_() for t in (C, a, b)]
    expected = sinkhorn_oracle(*wide, eps=0.05, max_iter=5)
    got = torch.autograd.grad(result.cost.sum(), (C, a, b))
    want = torch.autograd.grad(expected["cost"].sum(), wide)
    for seen, exact in zip(got, want, strict=True):
        assert (seen.double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
def test_an_offset_of_the_costs_costs_no_digits(backend, grad):
    torch.manual_seed(0)
    C = (torch.rand(2, 20, 33) + 80).requires_grad_()
    steps = 5 if grad == "unrolled" else 500
    result = sinkhorn(C, eps=0.05, max_iter=steps, grad=grad, backend=backend)
    wide = C.detach().double().requires_grad_()
    expected = sinkhorn_oracle(wide, eps=0.05, max_iter=steps)
    (got,) = torch.autograd.grad(result.cost.sum(), C)
    (want,) = torch.autograd.grad(expected["cost"].sum(), wide)
    tol = 2e-3 if backend == "cpu" else 2e-2
    assert (got.double() - want).norm() <= tol * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(5))
def test_implicit_where_the_plan_falls_into_blocks(backend, seed):
    torch.manual_seed(seed)
    C = torch.full((6, 6), 5.0)
    C[:3, :3], C[3:, 3:] = torch.rand(3, 3), torch.rand(3, 3)
    w = torch.randn(6, 6)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = C.to(dtype).requires_grad_()
        result = sinkhorn(leaf, eps=0.05, max_iter=2000, grad="implicit", backend=backend)
        grads.append(torch.autograd.grad((result.plan * w.to(dtype)).sum(), leaf)[0].double())
    assert (grads[0] - grads[1]).norm() <= 1e-2 * grads[1].norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rho", [(None, None), (0.4, 0.7), (None, 0.3), (0.3, None)])
def test_second_derivatives_of_value_are_those_of_the_fixed_point(backend, rho):
    C, a, b = problem(2, 4, 5)
    a, b = 1.2 * a, 1.2 * b
    leaves = tuple(t.requires_grad_() for t in (C, a, b))
    options = {"eps": 0.2, "max_iter": 100}
    soft = {name: r for name, r in zip(("rho_a", "rho_b"), rho, strict=True) if r is not None}
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.rand(t.shape, generator=generator, dtype=t.dtype) for t in leaves]
    if None in rho:  # moving mass on one side alone leaves no plan between hard marginals
        cotangents[1] = cotangents[1] - cotangents[1].mean(-1, keepdim=True)
        cotangents[2] = cotangents[2] - cotangents[2].mean(-1, keepdim=True)

    def products(value: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.tensor([0.5, 2.0], dtype=value.dtype)
        first = torch.autograd.grad((value * weights).sum(), leaves, create_graph=True)
        slope = sum((x * w).sum() for x, w in zip(first, cotangents, strict=True))
        second = list(torch.autograd.grad(slope, leaves))
        if None in rho:
            for k in (1, 2):
                second[k] = second[k] - second[k].mean(-1, keepdim=True)
        return second

    got = products(sinkhorn(*leaves, **options, **soft, backend=backend).value)
    want = products(sinkhorn_oracle(*leaves, **options, **soft)["value"])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rho", [(0.4, 0.7), (None, 0.3), (0.3, None)])
def test_masked_weights_have_no_second_derivative(rho):
    """Nor have others one with respect to them: a mask moves nothing."""
    leaves = tuple(problem(2, 4, 5))
    leaves[1][:, 1], leaves[2][:, 2] = 0, 0
    for t in leaves:
        t.requires_grad_()
    value = sinkhorn(*leaves, eps=0.2, max_iter=200, rho_a=rho[0], rho_b=rho[1]).value.sum()
    first = torch.autograd.grad(value, leaves, create_graph=True)
    slope = sum((t * torch.rand_like(t)).sum() for t in first)
    _, by_a, by_b = torch.autograd.grad(slope, leaves)
    for by, masked in ((by_a, 1), (by_b, 2)):
        assert (by[:, masked] == 0).all()
        assert (by[:, 0] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hessian_of_value_by_gradgradcheck(backend):
    C = problem(2, 3, 4)[0].requires_grad_()
    torch.autograd.gradgradcheck(
        lambda C: sinkhorn(C, eps=0.3, max_iter=100, backend=backend).value, C
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
def test_other_second_derivatives_are_refused_not_wrong(backend, grad):
    C = problem(1, 4, 4)[0].requires_grad_()
    result = sinkhorn(C, eps=0.1, grad=grad, backend=backend)
    loss = result.cost.sum() if grad == "envelope" else result.value.sum()
    (first,) = torch.autograd.grad(loss, C, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()
    value = sinkhorn(C, eps=0.1, backend=backend).value.sum()
    (first,) = torch.autograd.grad(value, C, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), C, create_graph=True)
    with pytest.raises(NotImplementedError, match="none has a third"):
        second.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize("size", SIZES)
def test_barycentric(backend, grad, size):
    C, a, b = leaves(2, *size)
    y = torch.randn(2, size[1], 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, size[0], 3, dtype=torch.float64)
    steps = 4 if grad == "unrolled" else 300
    result = sinkhorn(C, a, b, eps=0.1, max_iter=steps, grad=grad, backend=backend)
    image = barycentric(result, y)
    expected = sinkhorn_oracle(C, a, b, eps=0.1, max_iter=steps)
    exact = expected["plan"] @ y / a.unsqueeze(-1)
    torch.testing.assert_close(image, exact)
    if grad == "envelope":
        (got,) = torch.autograd.grad((image * w).sum(), y)
        (want,) = torch.autograd.grad((exact * w).sum(), y)
        torch.testing.assert_close(got, want)
        return
    got = torch.autograd.grad((image * w).sum(), (C, a, b, y))
    want = torch.autograd.grad((exact * w).sum(), (C, a, b, y))
    torch.testing.assert_close(got[3], want[3])
    got, want = (t[:3] if grad == "unrolled" else gauge_free(t[:3]) for t in (got, want))
    torch.testing.assert_close(list(got), list(want), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_barycentric_of_potentials_and_masks(backend):
    C, a, b = problem(2, 6, 5)
    a[:, 4:], b[:, 3:] = 0, 0
    result = sinkhorn(C, a, b, eps=0.1, backend=backend)
    y = torch.randn(5, 2, dtype=torch.float64)
    image = barycentric(result, y)
    assert (image[:, 4:] == 0).all()
    torch.testing.assert_close(image[:, :4], (result.plan @ y)[:, :4] / a[:, :4, None])
    again = barycentric((result.f, result.g), y, C=C, eps=0.1, a=a, b=b, backend=backend)
    torch.testing.assert_close(again, image)
    f, g = result.f.requires_grad_(), result.g.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, g, y, C: barycentric((f, g), y, C=C, eps=0.1, a=a, b=b, backend=backend),
        (f, g, y, C.requires_grad_()),
    )


def test_barycentric_bad_input():
    C = torch.rand(2, 3, 4)
    result = sinkhorn(C, eps=0.1)
    with pytest.raises(ValueError, match="y: got shape"):
        barycentric(result, torch.rand(5, 2))
    with pytest.raises(ValueError, match="C and eps"):
        barycentric((result.f, result.g), torch.rand(4, 2))
    f, g = result.f, result.g
    ok, y = {"C": C, "eps": 0.1}, torch.rand(4, 2)
    for bad, error, says in (
        ({"eps": torch.tensor(-1.0)}, ValueError, "eps: got -1.0"),
        ({"b": -torch.ones(4)}, ValueError, "b: got a negative weight"),
        ({"a": torch.zeros(3)}, ValueError, "a: got only zero weights"),
        ({"C": torch.full_like(C, torch.nan)}, ValueError, "C: got nan"),
    ):
        with pytest.raises(error, match=says):
            barycentric((f, g), y, **{**ok, **bad})
    with pytest.raises(ValueError, match="potentials: got tuple"):
        barycentric((None, None), y, **ok)
    with pytest.raises(ValueError, match="potentials: got Tensor"):
        barycentric(f, y, **ok)
    with pytest.raises(ValueError, match=r"y: got shape \(4,\)"):
        barycentric(result, torch.rand(4))
    with pytest.raises(ValueError, match="beside"):
        barycentric(result, torch.rand(4, 2), C=C)
    with pytest.raises(TypeError, match="y: got dtype"):
        barycentric(result, torch.rand(4, 2).double())
    with pytest.raises(ValueError, match="y: got nan"):
        barycentric(result, torch.full((4, 2), torch.nan))
