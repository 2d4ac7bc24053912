"""The ops as citizens of PyTorch: opcheck, compile, autocast, half-way through a training step."""

import pytest
import torch
import torch._dynamo.testing
from references import problem

from otdd.backends import BackendError
from otdd.losses import OTDistillationLoss, OTLogitLoss, SinkhornLoss
from otdd.ops import (
    METRICS,
    barycentric,
    cost_matrix,
    partial,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_points,
)

BACKENDS = ("reference", "cpu", "cuda", "triton")
OPS = torch.ops.otdd
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def args_of(grad: str, backend: str) -> tuple:
    C, a, b = problem(3, 4, 5, torch.float32)
    eps = torch.full((3,), 0.1, dtype=torch.float64)
    problem_ = C, a, b, eps, None, 2 * eps, torch.zeros(3, 5)
    return *problem_, 3, 0.0, 0.0, "", grad, False, backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
def test_opcheck_sinkhorn(backend, grad):
    args = args_of(grad, backend)
    torch.library.opcheck(OPS.sinkhorn.default, args)
    C, a, b, eps, *_ = args
    f, g, _, _, _, n_iter, history = OPS.sinkhorn(*args)
    torch.library.opcheck(
        OPS.sinkhorn_plan.default, (C, f, g, a, b, eps, None, False, False, backend)
    )
    if grad != "envelope":
        problem_ = C, None, b, eps, 2 * eps, None, f, g, history, n_iter
        rest = torch.ones_like(f), torch.ones_like(g), torch.ones(3), grad, False, backend
        torch.library.opcheck(OPS.sinkhorn_backward.default, (*problem_, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_opcheck_cost_matrix(backend, metric):
    x, y = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    torch.library.opcheck(OPS.cost_matrix.default, (x, y, metric, backend))
    if metric in ("l1", "sqeuclidean"):
        args = torch.randn(2, 3, 5), x, y, metric
        torch.library.opcheck(OPS.cost_matrix_backward.default, (*args, True, True, backend))
        torch.library.opcheck(OPS.cost_matrix_backward.default, (*args, True, False, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_barycentric(backend):
    C, a, b, eps, *_ = args_of("envelope", backend)
    args = C, torch.zeros(3, 4), torch.zeros(3, 5), a, b, eps, torch.randn(3, 5, 2)
    torch.library.opcheck(OPS.barycentric.default, (*args, backend))
    grad = torch.randn(3, 4, 2)
    torch.library.opcheck(OPS.barycentric_backward.default, (grad, *args, True, backend))


def step(x: torch.Tensor, y: torch.Tensor, grad: str, backend: str) -> torch.Tensor:
    C = cost_matrix(x, y, "l1", backend=backend)
    result = sinkhorn(C, eps=0.5, max_iter=3, grad=grad, backend=backend)
    loss = result.value.sum() + result.cost.sum() + (result.plan**2).sum()
    return loss + barycentric(result, y).square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
def test_compile_fullgraph(backend, grad):
    torch._dynamo.reset()
    x, y = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want = step(x, y, grad, backend)
    got = compiled(x, y, grad, backend)
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(want, (x, y))
    torch.testing.assert_close(torch.autograd.grad(got, (x, y)), expected)


def test_compile_fullgraph_chooses_a_backend_by_itself():
    torch._dynamo.reset()
    C = torch.rand(2, 4, 5)
    compiled = torch.compile(
        lambda C: sinkhorn(C, eps=0.1, tol=1e-3).value, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(C), sinkhorn(C, eps=0.1, tol=1e-3).value)


SIZED = {
    "cost_matrix": lambda x, y: cost_matrix(x.mT, y[:1].expand_as(x).mT),
    "shared weights": lambda x, y: (
        sinkhorn(
            cost_matrix(x, y).expand(2, -1, -1), torch.ones_like(x[:, 0]) / len(x), eps=0.5
        ).value
    ),
    "sinkhorn_points": lambda x, y: sinkhorn_points(x.mT, y[:1].expand_as(x).mT, eps=3.0).value,
    "unrolled": lambda x, y: sinkhorn_points(x, y, eps=0.5, grad="unrolled").value,
    "SinkhornLoss": SinkhornLoss(eps=0.5, debias=False),
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_are_not_compiled_one_by_one(name):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(SIZED[name], fullgraph=True, dynamic=True, backend=counter)
    for N, M in ((6, 7), (8, 11), (13, 9), (12, 10)):
        x, y = torch.randn(N, 3), torch.randn(M, 3)
        torch.testing.assert_close(compiled(x, y), SIZED[name](x, y))
    assert counter.frame_count <= 2  # more rows than columns may be another graph


def test_loss_is_exported_with_its_sizes():
    class Step(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return SIZED["SinkhornLoss"](x, y)

    sizes = [{0: torch.export.Dim(name, min=2, max=100)} for name in "NM"]
    exported = torch.export.export(
        Step(), (torch.randn(6, 3), torch.randn(7, 3)), dynamic_shapes=sizes
    )
    x, y = torch.randn(9, 3), torch.randn(4, 3)
    torch.testing.assert_close(exported.module()(x, y), Step()(x, y))


class Tagged(torch.Tensor):
    """A subclass that results of operations on it are of, too."""


@pytest.mark.parametrize("grad", ["envelope", "unrolled"])
@pytest.mark.parametrize("which", ["a", "b", "eps", "init"])
def test_subclasses_do_not_leak_into_results(grad, which):
    C, options = torch.rand(4, 5), {"eps": torch.tensor(0.3, dtype=torch.float64)}
    options |= {"a": torch.full((4,), 0.25), "b": torch.full((5,), 0.2), "init": torch.zeros(5)}
    options[which] = options[which].as_subclass(Tagged)
    options["init"] = None, options["init"]
    result = sinkhorn(C, **options, max_iter=4, grad=grad)
    for name in ("value", "cost", "f", "g", "marginal_error", "n_iter"):
        assert type(getattr(result, name)) is torch.Tensor, name


def test_compiled_solve_follows_its_options():
    torch._dynamo.reset()
    C = torch.rand(2, 4, 5)

    def solve(C: torch.Tensor, eps: float, max_iter: int, tol: float) -> torch.Tensor:
        return sinkhorn(C, eps=eps, max_iter=max_iter, tol=tol).value

    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    for options in ((0.1, 5, 0.0), (0.2, 5, 0.0), (0.3, 9, 1e-3), (0.4, 12, 1e-2)):
        torch.testing.assert_close(compiled(C, *options), solve(C, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_autocast_leaves_the_ops_in_float32(backend, metric):
    x, y = torch.randn(2, 6, 30, requires_grad=True), torch.randn(2, 5, 30)
    options = {"eps": 0.5, "max_iter": 5, "backend": backend}
    want = sinkhorn(cost_matrix(x, y, metric, backend=backend), **options)
    want.value.sum().backward()
    expected, x.grad = x.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        C = cost_matrix(x, y, metric, backend=backend)
        got = sinkhorn(C, **options)
        image = barycentric(got, y)
        got.value.sum().backward()
    assert C.dtype == got.value.dtype == image.dtype == torch.float32
    torch.testing.assert_close(got.plan, want.plan)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_inside_autocast_and_compile(backend):
    torch._dynamo.reset()
    s, t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    options = {"eps": 0.5, "max_iter": 3, "backend": backend}
    for loss in (OTLogitLoss(**options), SinkhornLoss(**options)):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        seen, want = compiled(s, t), loss(s, t)
        torch.testing.assert_close(seen, want)
        torch.testing.assert_close(torch.autograd.grad(seen, s), torch.autograd.grad(want, s))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss(s, t).dtype == torch.float32


def test_compiled_losses_follow_options_that_are_set_later():
    x, y, labels = torch.rand(2, 5, 4), torch.rand(2, 5, 4), torch.arange(5) % 4
    both = x[0], y[0]
    cases = [
        (SinkhornLoss(eps=0.1), (x, y), "eps"),
        (OTLogitLoss(), both, "tau"),
        (OTDistillationLoss(soft="kl"), (*both, labels), "kappa_1"),
    ]
    for loss, args, name in cases:
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for value in (0.1, 0.2, 0.7):
            setattr(loss, name, value)
            torch.testing.assert_close(compiled(*args), loss(*args))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_problem_does_not_poison_its_batch(backend, monkeypatch):
    from otdd.ops import checks

    monkeypatch.setattr(checks, "values_are_checked", lambda t: False)
    C = torch.rand(3, 4, 5)
    clean = sinkhorn(C, eps=0.1, tol=1e-2, backend="reference")
    C[1, 2, 3] = torch.nan
    if backend == "cpu":
        with pytest.raises(ValueError, match="C: got nan"):  # the native solver always looks
            sinkhorn(C, eps=0.1, tol=1e-2, backend=backend)
        return
    result = sinkhorn(C, eps=0.1, tol=1e-2, backend=backend)
    assert result.converged.tolist() == [True, False, True]
    torch.testing.assert_close(result.value[::2], clean.value[::2])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
def test_products_with_the_plan_keep_their_precision_inside_autocast(backend, grad):
    torch.manual_seed(0)
    x, y, z = torch.rand(2, 6, 3), torch.rand(2, 5, 3), torch.randn(2, 5, 4)
    leaves = [t.requires_grad_() for t in (x, y, z)]

    def made() -> list[torch.Tensor]:
        options = {"eps": 0.5, "max_iter": 20, "grad": grad, "backend": backend}
        points = sinkhorn_points(x, y, **options)
        dense = sinkhorn(cost_matrix(x, y, "sqeuclidean", backend=backend), **options)
        out = points.apply(z), points.apply(x, transpose=True), barycentric(dense, z)
        out = *out, points.barycentric(z), dense.plan
        loss = sum(t.square().sum() for t in out[:-1]) + dense.value.sum()
        return [*out, *torch.autograd.grad(loss, leaves)]

    want = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = made()
    for seen, exact in zip(got, want, strict=True):
        torch.testing.assert_close(seen, exact)


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "cosine"])
def test_second_derivatives_of_costs_keep_their_precision_inside_autocast(metric):
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)

    def made() -> tuple[torch.Tensor, ...]:
        C = cost_matrix(x, y, metric)
        slopes = torch.autograd.grad(C.square().sum(), (x, y), create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in slopes), (x, y))

    want = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(), want)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize("checks", ["0", "1"])
def test_meta_tensors_get_shapes(backend, grad, checks, monkeypatch):
    monkeypatch.setenv("OTDD_CHECKS", checks)
    x, y = (torch.empty(2, n, 3, device="meta", requires_grad=True) for n in (6, 5))
    options = {"eps": 0.1, "tol": 1e-3, "grad": grad, "backend": backend}
    for metric in METRICS:
        result = sinkhorn(cost_matrix(x, y, metric, backend=backend), **options)
        points = sinkhorn_points(x, y, metric=metric, **options)
        images = barycentric(result, y), points.apply(y)
        assert all(t.shape == (2, 6, 3) and t.is_meta for t in images)
        assert result.plan.shape == result.C.shape == (2, 6, 5)
        for value in (result.value, result.cost, points.value):
            assert value.shape == (2,)
            assert torch.autograd.grad(value.sum(), x, retain_graph=True)[0].shape == x.shape
    assert sinkhorn_divergence(x, y, **options).value.is_meta
    assert partial(torch.empty(2, 6, 5, device="meta"), mass=0.5, **options).plan.is_meta
    with pytest.raises(BackendError, match="the inputs are on meta"):
        sinkhorn(torch.empty(2, 6, 5, device="meta"), eps=0.1, backend="cpu")


def negated(t: torch.Tensor) -> torch.Tensor:
    """`t` as a view of numbers of the other sign, which torch turns when it reads them."""
    seen = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert seen.is_neg()
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_the_other_sign(backend):
    C, a, b = problem(3, 4, 5)
    x, y, g = torch.rand(3, 4, 2).double(), torch.rand(3, 5, 2).double(), torch.rand(3, 5).double()
    eps, rho, along = (
        torch.tensor(t).double() for t in ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0], [1, 2, 3])
    )
    W, labels = torch.rand(1, 1).double(), torch.zeros(1, dtype=torch.int64)

    def made(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        C, a, b, x, y, g, eps, rho, along, W = tensors
        options = {"eps": eps, "rho_a": rho, "init": (None, g), "max_iter": 3, "backend": backend}
        leaves = [t.detach().clone().requires_grad_() for t in (C, x)]
        solved = sinkhorn(C, a, b, **options), sinkhorn(leaves[0], a, b, **options)
        points = sinkhorn_points(
            x, y, a, b, labels_x=labels, labels_y=labels, label_cost=W, **options
        )
        images = barycentric(solved[0], y), points.apply(y)
        costs = cost_matrix(leaves[1], y, "l1", backend=backend)
        slopes = (
            torch.autograd.grad(solved[1].value, leaves[0], along),
            torch.autograd.grad(costs, leaves[1], C),
        )
        part = partial(C, a, b, mass=eps, eps=rho, max_iter=3, backend=backend)
        return solved[0].value, points.value, *images, costs, part.cost, *slopes[0], *slopes[1]

    tensors = C, a, b, x, y, g, eps, rho, along, W
    for got, want in zip(made(*map(negated, tensors)), made(*tensors), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_traced_by_jit_is_run_again(backend, requires_grad):
    x, y = torch.randn(6, 3, requires_grad=requires_grad), torch.randn(6, 3)
    options = {"eps": 0.5, "max_iter": 5, "backend": backend}
    for op in (
        lambda x, y: sinkhorn(cost_matrix(x, y, backend=backend), **options).value,
        lambda x, y: sinkhorn_points(x, y, **options).value,
        lambda x, y: sinkhorn_divergence(x, y, **options).value,
        OTLogitLoss(max_iter=5, backend=backend),
    ):
        traced = torch.jit.trace(op, (x, y), check_trace=False)
        torch.testing.assert_close(traced(2 * x, y + 1), op(2 * x, y + 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_values_change_in_place(backend, batch, grad):
    """As a loss does that is divided by the steps of an accumulated gradient."""
    x = torch.rand(*batch, 4, 2, requires_grad=True)
    y = torch.rand(*batch, 5, 2)
    options = {"eps": 0.5, "max_iter": 5, "grad": grad, "backend": backend}

    def results():
        yield sinkhorn_points(x, y, **options)
        yield sinkhorn(cost_matrix(x, y), **options)
        yield partial(cost_matrix(x, y), mass=0.5, **options)

    for result in results():
        for loss in (result.value, result.cost):
            (whole,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
            loss /= 4
            (quarter,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
            torch.testing.assert_close(quarter, whole / 4)
