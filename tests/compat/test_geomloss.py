"""The drop-in for GeomLoss, against the definitions and, where it is installed, GeomLoss."""

import inspect
import math
import warnings

import pytest
import torch
from references import cost_oracle, sinkhorn_oracle

from otdd.compat.geomloss import SamplesLoss

BLUR, REACH = 0.3, 0.6


def clouds(B=2, N=8, M=6, D=3, dtype=torch.float64, masses=(1.0, 1.0), seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(B, N, D, generator=g, dtype=torch.float64)
    y = 0.7 * torch.rand(B, M, D, generator=g, dtype=torch.float64) + 0.2
    a, b = (torch.rand(B, n, generator=g, dtype=torch.float64) + 0.1 for n in (N, M))
    a, b = (m * w / w.sum(-1, keepdim=True) for m, w in zip(masses, (a, b), strict=True))
    return tuple(t.to(dtype) for t in (a, x, b, y))


def cost(x, y, p):
    return cost_oracle(x, y, "l2") if p == 1 else cost_oracle(x, y, "sqeuclidean") / 2


def oracle(a, x, b, y, p=2, reach=None, debias=True, blur=BLUR):
    """The definition, differentiable through the iterations."""
    eps, rho = blur**p, math.inf if reach is None else reach**p

    def transport(a, x, b, y):
        options = {"eps": eps, "max_iter": 800, "rho_a": rho, "rho_b": rho}
        return sinkhorn_oracle(cost(x, y, p), a, b, **options)["value"]

    value = transport(a, x, b, y)
    if debias:
        value = value - (transport(a, x, a, x) + transport(b, y, b, y)) / 2
        if reach:
            value = value + eps / 2 * (a.sum(-1) - b.sum(-1)).square()
    return value


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, REACH])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("backend", ["tensorized", "online"])
def test_value_and_gradients_are_those_of_the_definition(p, reach, debias, backend):
    masses = (1.0, 1.7) if reach and debias else (1.0, 1.0)
    leaves = [t.requires_grad_() for t in clouds(masses=masses)]
    loss = SamplesLoss("sinkhorn", p=p, blur=BLUR, reach=reach, debias=debias, backend=backend)
    got, want = loss(*leaves), oracle(*leaves, p, reach, debias)
    assert got.shape == (2,)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    seen, exact = (torch.autograd.grad(t.sum(), leaves) for t in (got, want))
    for i in (1, 3):
        torch.testing.assert_close(seen[i], exact[i], rtol=1e-5, atol=1e-8)
    for i in (0, 2):
        off = seen[i] - exact[i]
        if reach is None:  # up to a constant
            off = off - off.mean(-1, keepdim=True)
        elif not debias:  # GeomLoss's value has another constant, of the masses
            continue
        assert float(off.abs().max()) < 1e-6


@pytest.mark.parametrize("backend", ["tensorized", "online"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calls(backend, dtype):
    a, x, b, y = clouds(dtype=dtype)
    loss = SamplesLoss(blur=BLUR, backend=backend)
    exact = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    both = loss(a, x, b, y)
    assert both.dtype == dtype
    one = loss(a[0], x[0], b[0], y[0])
    assert one.shape == ()
    torch.testing.assert_close(one, both[0], **exact)
    torch.testing.assert_close(loss(a[..., None], x, b[..., None], y), both)
    uniform = [torch.full_like(w, 1 / w.shape[-1]) for w in (a, b)]
    torch.testing.assert_close(loss(x, y), loss(uniform[0], x, uniform[1], y), **exact)
    assert loss(a, x, a, x.clone()).abs().max() < 1e-6


def test_masked_points_take_no_part():
    a, x, b, y = clouds(B=1)
    a = a.clone()
    a[:, 2] = 0
    a = a / a.sum()
    x.requires_grad_()
    keep = a[0] > 0
    for backend in ("tensorized", "online"):
        loss = SamplesLoss(blur=BLUR, backend=backend)
        value = loss(a, x, b, y)
        torch.testing.assert_close(value, loss(a[:, keep], x[:, keep], b, y), rtol=1e-6, atol=1e-9)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert bool((grad[0, 2] == 0).all())


def test_a_cost_of_ones_own():
    a, x, b, y = clouds()
    seen = SamplesLoss(blur=BLUR, cost=lambda x, y: cost(x, y, 2))(a, x, b, y)
    torch.testing.assert_close(seen, SamplesLoss(blur=BLUR)(a, x, b, y), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["tensorized", "online"])
@pytest.mark.parametrize("scaling", [0.3, 0.9])
def test_small_blur_converges_whatever_the_scaling(backend, scaling):
    args = clouds(B=1, N=40, M=30, D=2)
    loss = SamplesLoss(blur=0.1, scaling=scaling, backend=backend)
    torch.testing.assert_close(loss(*args), oracle(*args, blur=0.1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reach", [None, REACH])
def test_few_streamed_points_converge(reach):
    """Transports of a cloud to itself, which iterations alone are slow at."""
    for seed in range(10):
        _, x, _, y = clouds(B=1, N=4, M=5, D=2, seed=seed)
        with warnings.catch_warnings(action="error"):
            got = SamplesLoss(blur=0.1, reach=reach, backend="online")(x, y)
        want = SamplesLoss(blur=0.1, reach=reach, backend="tensorized")(x, y)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, REACH])
def test_potentials_are_slopes_in_the_weights(debias, reach):
    a, x, b, y = clouds()
    loss = SamplesLoss(blur=BLUR, reach=reach, debias=debias, potentials=True)
    F, G = loss(a, x, b, y)
    assert F.shape == a.shape
    assert G.shape == b.shape
    single = loss(a[0, :, None], x[0], b[0, :, None], y[0])
    assert single[0].shape == (8, 1)
    assert loss(x[0], y[0])[0].shape == (8,)
    if reach is None:  # the value is <a, F> + <b, G>
        value = SamplesLoss(blur=BLUR, debias=debias)(a, x, b, y)
        torch.testing.assert_close((a * F).sum(-1) + (b * G).sum(-1), value)
    else:
        rho = REACH**2
        C = cost(x, y, 2)
        f, _ = (
            sinkhorn_oracle(C, a, b, eps=BLUR**2, max_iter=800, rho_a=rho, rho_b=rho)[k]
            for k in "fg"
        )
        if not debias:
            torch.testing.assert_close(F, f, rtol=1e-6, atol=1e-8)


def test_warns_where_it_does_not_converge(capsys, monkeypatch):
    monkeypatch.setattr("otdd.compat.geomloss._MAX_ITER", 1)
    _, x, _, y = clouds()
    with pytest.warns(UserWarning, match="did not converge: marginal error .* iterations"):
        SamplesLoss(blur=0.05, scaling=0.1, debias=False, verbose=True)(x, y)
    assert "marginal error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "energy"}, "^loss: got 'energy'; accepted: 'sinkhorn'; GeomLoss has"),
        ({"p": 3}, "^p: got 3"),
        ({"blur": 0}, "^blur: got 0"),
        ({"blur": torch.tensor([0.1, 0.2])}, r"^blur: got shape \(2,\); accepted: one number"),
        ({"p": torch.tensor([1, 2])}, r"^p: got shape \(2,\); accepted: one number"),
        ({"p": torch.tensor(2)}, "^p: got a tensor; accepted: 1, 2, or a number"),
        ({"reach": -1.0}, "^reach: got -1"),
        ({"diameter": 0}, "^diameter: got 0"),
        ({"scaling": "a"}, r"^scaling: got a; accepted: a number in"),
        ({"scaling": 1.0}, r"^scaling: got 1.0; accepted: a number in \(0, 1\)"),
        ({"truncate": None}, "^truncate: got None; accepted: 5"),
        ({"kernel": 1}, "^kernel: got 1"),
        ({"cluster_scale": 0.1}, "^cluster_scale: got 0.1"),
        ({"cost": "Norm2(X-Y)"}, "^cost: got 'Norm2"),
        ({"backend": "multiscale"}, "^backend: got 'multiscale'; accepted: auto, tensorized"),
        ({"backend": "online", "cost": torch.cdist}, "^backend: got 'online' beside a cost"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        SamplesLoss(**options)


def test_refused_arguments():
    a, x, b, y = clouds()
    loss = SamplesLoss()
    with pytest.raises(TypeError, match="unexpected keyword argument 'eps'"):
        SamplesLoss(eps=1.0)
    with pytest.raises(ValueError, match=r"^args: got 6 of them; accepted: \(x, y\)"):
        loss(a, a, x, b, b, y)
    with pytest.raises(ValueError, match=r"^x and y: got shapes \(8, 3\) and \(2, 6, 3\)"):
        loss(x[0], y)
    with pytest.raises(ValueError, match=r"^a: got shape \(6,\); accepted: \(2, 8\)"):
        loss(a[0, :6], x, b, y)
    with pytest.raises(TypeError, match=r"^x: got dtype torch.int64"):
        loss(x.long(), y.long())
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 0, 3\); accepted: at least one"):
        loss(x[:, :0], y)
    with pytest.raises(ValueError, match=r"^y: got shape \(2, 0, 3\); accepted: at least one"):
        loss(x, y[:, :0])
    with pytest.raises(TypeError, match=r"^b: got dtype torch.float32; accepted: that of y"):
        loss(a, x, b.float(), y)


@pytest.mark.parametrize("name", ["p", "blur", "reach", "scaling", "backend"])
def test_options_set_later_are_checked_too(name):
    _, x, _, y = clouds()
    loss = SamplesLoss(blur=BLUR, p=1)
    loss.blur, loss.p = 0.5, 2  # as users who anneal do
    torch.testing.assert_close(loss(x, y), SamplesLoss(blur=0.5)(x, y))
    setattr(loss, name, -1)
    with pytest.raises(ValueError, match=f"^{name}: got -1"):
        loss(x, y)


@pytest.mark.parametrize("debias", [True, False])
def test_masses_that_differ_are_refused_without_a_reach(debias):
    a, x, b, y = clouds()
    accepted = r"^a and b: got masses of 2 and 1; accepted: equal masses, or a reach"
    for args in ((2 * a, x, b, y), (2 * a[1], x[1], b[1, :, None], y[1])):
        for reach in (None, math.inf):
            with pytest.raises(ValueError, match=accepted):
                SamplesLoss(blur=BLUR, debias=debias, reach=reach)(*args)
        assert SamplesLoss(blur=BLUR, debias=debias, reach=REACH)(*args).isfinite().all()


@pytest.mark.parametrize("backend", ["tensorized", "online"])
def test_weights_that_were_rounded_converge(backend, capsys):
    """Their masses differ by more than the tolerance, so that no plan has both marginals."""
    a, x, b, y = clouds()
    want = SamplesLoss(blur=BLUR, backend=backend)(a, x, b, y)
    a, b = a.float().double(), b.float().double()
    with warnings.catch_warnings(action="error"):
        got = SamplesLoss(blur=BLUR, backend=backend, verbose=True)(a, x, b, y)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    said = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 3
    assert max(said) < 500


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda C: C[0], ValueError, r"^cost: got shape \(8, 6\); accepted: \(2, 8, 6\)"),
        (lambda C: C.mT, ValueError, r"^cost: got shape \(2, 6, 8\); accepted: \(2, 8, 6\)"),
        (lambda C: C.float(), TypeError, r"^cost: got dtype torch.float32; accepted: that of x"),
        (lambda C: C.numpy(), TypeError, r"^cost: got ndarray; accepted: torch.Tensor"),
    ],
)
def test_what_a_cost_gives_is_checked_by_its_name(made, error, message):
    a, x, b, y = clouds()
    with pytest.raises(error, match=message):
        SamplesLoss(cost=lambda x, y: made(cost(x, y, 2)))(a, x, b, y)


@pytest.mark.parametrize("backend", ["tensorized", "online"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_values_are_named(backend, bad):
    loss = SamplesLoss(backend=backend)
    for k, name in enumerate("axby"):
        args = list(clouds())
        args[k][1, 2] = bad
        if bad == -1 and name in "xy":
            continue
        with pytest.raises(ValueError, match=f"^{name}: got"):
            loss(*args)


@pytest.mark.parametrize("backend", ["tensorized", "online"])
@pytest.mark.parametrize("reach", [None, REACH])
@pytest.mark.parametrize("p", [1, 2])
def test_a_debiased_value_is_not_negative(backend, reach, p):
    loss = SamplesLoss(p=p, blur=BLUR, reach=reach, backend=backend)
    for seed in range(6):
        a, x, _, _ = clouds(B=1, N=30, dtype=torch.float32, seed=seed)
        x.requires_grad_()
        turned = x.detach().flip(1)
        value = loss(a, x, a.flip(1), turned)
        assert bool((value >= 0).all())
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert bool(grad.isfinite().all())


def test_a_clamped_value_keeps_its_gradient(monkeypatch):
    a, x, b, y = clouds(B=1)
    x.requires_grad_()
    loss = SamplesLoss(blur=BLUR)
    (want,) = torch.autograd.grad(loss(a, x, b, y).sum(), x)
    exact = SamplesLoss._value
    monkeypatch.setattr(
        SamplesLoss, "_value", lambda self, r, v, w: exact(self, r, v, w) + (10.0 if v is w else 0)
    )
    value = loss(a, x, b, y)
    assert value.item() == 0
    (seen,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(seen, want, rtol=0, atol=0)


# With GeomLoss itself. Its annealing lags behind by about 1 - scaling.

THEIRS = {"scaling": 0.999, "backend": "tensorized"}


@pytest.fixture
def geomloss():
    return pytest.importorskip("geomloss")


def test_signature_is_that_of_geomloss(geomloss):
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(c).parameters.values()]
        for c in (SamplesLoss, geomloss.SamplesLoss)
    )
    assert ours == theirs


def distance(x, y):
    """Exact, where GeomLoss's own takes at least 1e-4."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, REACH])
@pytest.mark.parametrize("debias", [True, False])
def test_agrees_with_geomloss(geomloss, p, reach, debias):
    """By no more than its annealing lags behind."""
    masses = (1.0, 1.7) if reach else (1.0, 1.0)
    leaves = [t.requires_grad_() for t in clouds(masses=masses)]
    options = {"p": p, "blur": BLUR, "reach": reach, "debias": debias}
    theirs = THEIRS | {"cost": distance if p == 1 else None}
    got = SamplesLoss(**options)(*leaves)
    want = geomloss.SamplesLoss(**options, **theirs)(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-4 if reach else 1e-6, atol=0)
    ours = SamplesLoss(**options, potentials=True)(*leaves)
    others = geomloss.SamplesLoss(**options, **theirs, potentials=True)(*leaves)
    for seen, exact in zip(ours, others, strict=True):
        off = (seen - exact).detach()
        off = off - off.mean(-1, keepdim=True) if reach is None else off
        assert float(off.abs().max()) < 5e-5
    eps, rho = BLUR**p, (reach or 0) ** p
    wrong = (rho + eps / 2) / (rho + eps) if reach else 1  # the factor of GeomLoss 0.3.1
    seen, exact = (torch.autograd.grad(t.sum(), leaves[1::2]) for t in (got, want))
    for dx, other in zip(seen, exact, strict=True):
        assert float((wrong * dx - other).abs().max()) < 1e-3 * float(other.abs().max())


def test_parameters_of_a_cost_have_the_gradient_of_the_value(geomloss):
    """GeomLoss's is twice as large; should this fail, our docstring's line has gone out of date."""
    _, x, _, y = clouds()
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def scaled(x, y):
        return cost(scale * x, scale * y, 2)

    points = [(scale * t).detach().requires_grad_() for t in (x, y)]
    by_x, by_y = torch.autograd.grad(SamplesLoss(blur=BLUR)(*points).sum(), points)
    want = (by_x * x).sum((0, 1)) + (by_y * y).sum((0, 1))
    for module, options, factor in ((SamplesLoss, {}, 1), (geomloss.SamplesLoss, THEIRS, 2)):
        value = module(blur=BLUR, cost=scaled, **options)(x, y).sum()
        (seen,) = torch.autograd.grad(value, scale)
        torch.testing.assert_close(seen, factor * want, rtol=1e-3, atol=0)
