"""`transport_moves`, what guidance does with the transport of its classes, by every backend."""

import emulated
import pytest
import torch
from references import cost_oracle, sinkhorn_oracle
from torch.func import vmap

from otdd.distill.config import GuidanceConfig
from otdd.distill.guidance import OTGuidance
from otdd.ops import METRICS
from otdd.ops.moves import transport_moves
from otdd.ops.moves.cuda import moves_cuda

BACKENDS = ("reference", "cpu", "cuda", "triton")
OPTIONS = {"lambda_1": 0.3, "metric": "l1", "max_iter": 6, "gradient": True}
CHIP = 4, 227 << 10, 16
# N, L, M, D: of a warp, a block, more, with sums cut into slices.
SIZES = [
    (1, 0, 1, 1),
    (1, 0, 9, 4),
    (5, 2, 7, 3),
    (33, 0, 50, 20),
    (70, 6, 101, 9),
    (3, 1, 40, 3000),
]


def problem(B, N, L, M, D, dtype=torch.float64, masked=True):
    """Points, weights of mass 1 (some 0), given costs, and a start."""
    generator = torch.Generator().manual_seed(N + 7 * M + D)

    def draw(*shape):
        return torch.randn(B, *shape, generator=generator, dtype=torch.float64)

    x, y, given, g = draw(N, D), draw(M, D) + 0.5, D + draw(L, M).abs(), draw(M)
    a, b = (draw(n).exp() for n in (N + L, M))
    if masked and N > 2:
        a[0, 1], b[-1, :2] = 0, 0
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    tensors = {"x": x, "y": y, "a": a, "b": b, "given": given if L else None, "g": g}
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def oracle(x, y, a, b, given, g, lambda_1, metric, max_iter, gradient):
    """Images or gradients, f, g and eps in float64, a class at a time."""
    classes = []
    for k in range(len(x)):
        leaf, to = x[k].double().requires_grad_(), y[k].double()
        C = cost_oracle(leaf, to, metric)
        costs = C.detach() if given is None else torch.cat([C.detach(), given[k].double()])
        own_a, own_b = a[k].double(), b[k].double()
        used = costs[own_a > 0][:, own_b > 0]
        eps = lambda_1 * used.std(unbiased=False).clamp_min(1e-6 * used.mean().abs() + 1e-12)
        start = None if g is None else g[k].double()
        r = sinkhorn_oracle(costs, own_a, own_b, eps=eps, max_iter=max_iter, g=start)
        P = r["plan"][: len(leaf)]
        if gradient:
            (of_x,) = torch.autograd.grad((P * C).sum(), leaf)
        else:
            weights = own_a[: len(leaf), None]
            of_x = torch.where(weights > 0, P @ to / weights, 0)
        classes.append((of_x, r["f"], r["g"], eps))
    return [torch.stack(each) for each in zip(*classes, strict=True)]


def run(tensors, backend, **options):
    moves = transport_moves(**tensors, **(OPTIONS | options), backend=backend)
    return moves.of_x, moves.f, moves.g, moves.eps


def assert_like(seen, want, dtype):
    digits = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    for got, exact in zip(seen, want, strict=True):
        assert got.dtype == dtype
        unit = exact.abs().max().clamp_min(1e-3)
        torch.testing.assert_close(got.double() / unit, exact / unit, rtol=0, atol=digits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_values(backend, dtype, gradient, size):
    tensors = problem(2, *size, dtype=dtype)
    if size == (1, 0, 1, 1):
        tensors["g"] = None  # eps is then 1e-6 of the cost, of which no start keeps the digits
    want = oracle(**tensors, **(OPTIONS | {"gradient": gradient}))
    assert_like(run(tensors, backend, gradient=gradient), want, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gradient", [True, False])
def test_every_metric(backend, metric, gradient):
    tensors, options = problem(2, 7, 3, 12, 5), {"metric": metric, "gradient": gradient}
    assert_like(
        run(tensors, backend, **options), oracle(**tensors, **(OPTIONS | options)), torch.float64
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", ["l1", "sqeuclidean"])
def test_half_precision_is_as_if_widened_first(backend, metric, half):
    tensors = problem(2, 5, 2, 7, 6, dtype=torch.float32)
    narrow = tensors | {name: tensors[name].to(half) for name in ("x", "y")}
    wide = narrow | {name: narrow[name].float() for name in ("x", "y")}
    for gradient in (True, False):
        seen, want = (run(t, backend, metric=metric, gradient=gradient) for t in (narrow, wide))
        assert all(map(torch.equal, seen, want))
        assert seen[0].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_that_is_given_is_widened(backend):
    tensors = problem(2, 5, 2, 7, 6, dtype=torch.float32)
    narrow = {name: t.bfloat16() for name, t in tensors.items()}
    seen, want = (run(t, backend) for t in (narrow, {k: t.float() for k, t in narrow.items()}))
    assert all(map(torch.equal, seen, want))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["y", "a", "b", "given", "g"])
def test_other_types_are_refused(backend, name):
    """A kernel would read their memory as if they were of the type of x."""
    tensors = problem(2, 5, 2, 7, 6, dtype=torch.float32)
    with pytest.raises(TypeError, match=f"^{name}: got dtype torch.float64; accepted: that of x"):
        run(tensors | {name: tensors[name].double()}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_refused(backend, metric, number):
    tensors = problem(2, 5, 2, 7, 6)
    for name in tensors:
        bad = tensors[name].clone()
        bad[1, 1] = number
        with pytest.raises(ValueError, match=f"^{name}: got {number} at index"):
            run(tensors | {name: bad}, backend, metric=metric)
    for lambda_1 in (0.0, -1.0, torch.nan):
        with pytest.raises(ValueError, match=r"^eps: got"):
            run(tensors, backend, metric=metric, lambda_1=lambda_1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [0, 1])
def test_costs_that_overflow_are_refused(backend, row):
    """In the first problem the row 1 is a mask, and its costs are not in eps."""
    tensors = problem(2, 5, 0, 7, 6, dtype=torch.float32)
    tensors["x"][0, row] = 1e25
    with pytest.raises(ValueError, match=rf"^C: got inf at index \(0, {row}, 0\)"):
        run(tensors, backend, metric="sqeuclidean")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_guidance_of_half_precision_is_as_if_widened_first(backend, half, monkeypatch):
    """Latents in flight and references, ragged; then rounded to the type they came in."""
    monkeypatch.setenv("OTDD_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)
    real, x = (torch.randn(n, 1, 4, 4, generator=generator).to(half) for n in (12, 5))
    classes, labels = torch.arange(2).repeat_interleave(6), torch.tensor([0, 0, 1, 0, 1])

    def direction(dtype, **settings):
        guidance = OTGuidance(GuidanceConfig(**settings))
        guidance.set_reference(real.to(dtype), classes)
        return guidance.direction(x.to(dtype), 0, labels)

    for settings in ({}, {"form": "gradient", "metric": "l1"}):
        seen = direction(half, **settings)
        assert seen.dtype == half
        assert torch.equal(seen, direction(torch.float32, **settings).to(half))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [True, False])
def test_batches_and_strides(backend, gradient):
    tensors, options = problem(6, 5, 2, 7, 3), {"gradient": gradient}
    want = oracle(**tensors, **(OPTIONS | options))
    two = {name: t.unflatten(0, (2, 3)) for name, t in tensors.items()}
    assert_like([t.flatten(0, 1) for t in run(two, backend, **options)], want, torch.float64)
    apart = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in tensors.items()}
    apart["x"] = tensors["x"].mT.contiguous().mT
    assert_like(run(apart, backend, **options), want, torch.float64)
    alone = {name: t[0] for name, t in tensors.items()}
    assert_like(run(alone, backend, **options), [t[0] for t in want], torch.float64)
    none = {name: t[:0] for name, t in tensors.items()}
    assert [tuple(t.shape) for t in run(none, backend, **options)] == [
        (0, 5, 3),
        (0, 7),
        (0, 7),
        (0,),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [True, False])
def test_masks_are_as_if_left_out(backend, gradient):
    """Ragged classes: padding of any value that is finite."""
    tensors = problem(2, 9, 0, 11, 4, masked=False)
    first = {name: None if t is None else t[:1] for name, t in tensors.items()}
    short = dict(first, x=first["x"][:, :5], y=first["y"][:, :6])
    wide = torch.float64
    equal = torch.full((1, 5), 1 / 5, dtype=wide), torch.full((1, 6), 1 / 6, dtype=wide)
    short |= {"a": equal[0], "b": equal[1], "g": None}
    want = oracle(**short, **(OPTIONS | {"gradient": gradient}))
    padded = dict(tensors, g=None)
    padded["a"][0], padded["b"][0] = 0, 0
    padded["a"][0, :5], padded["b"][0, :6] = 0.2, 1 / 6
    padded["x"][0, 5:] *= 1e3
    of_x, f, g, eps = run(padded, backend, gradient=gradient)
    assert (of_x[0, 5:] == 0).all()
    assert_like((of_x[:1, :5], f[:1, :5], g[:1, :6], eps[:1]), want, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_warm_start_goes_on(backend):
    tensors = problem(2, 6, 2, 9, 4)
    _, _, g, _ = run(tensors, backend, max_iter=4)
    seen = run(dict(tensors, g=g), backend, max_iter=3)
    assert_like(seen, oracle(**tensors, **(OPTIONS | {"max_iter": 7})), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_costs_of_any_size(backend, dtype, scale):
    """The moves of one class and of another beside it that is far larger or smaller."""
    tensors = problem(2, 7, 0, 12, 5, dtype=dtype) | {"g": None}
    tensors["x"][1] *= scale
    tensors["y"][1] *= scale
    seen, want = run(tensors, backend), oracle(**tensors, **OPTIONS)
    for k in (0, 1):
        assert_like([t[k] for t in seen], [t[k] for t in want], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("size", [(5, 2, 7, 3), (3, 0, 40, 3000), (90, 0, 33, 20)])
@pytest.mark.parametrize("chip", [CHIP, (132, 227 << 10, 8), (4, 30 << 10, 1)])
def test_every_order_of_threads(emulated_cuda, chip, size, gradient, dtype):
    emulated_cuda.set_chip(*chip)
    tensors = problem(3, *size, dtype=dtype)
    seen = emulated.in_every_order(emulated_cuda, lambda: run(tensors, "cuda", gradient=gradient))
    assert_like(seen, oracle(**tensors, **(OPTIONS | {"gradient": gradient})), dtype)


@pytest.mark.parametrize(
    ("metric", "gradient", "size", "most"),
    [
        ("l1", True, (5, 2, 7, 3), 4),  # costs, their spread, solve, signed sums
        ("l1", False, (5, 2, 7, 3), 4),  # the plan instead of the last
        ("l1", True, (3, 0, 5, 9000), 5),  # costs in slices
        ("l1", True, (1, 0, 4000, 3), 5),  # signed sums in slices
        ("sqeuclidean", True, (5, 2, 7, 3), 4),
        ("sqeuclidean", False, (5, 2, 7, 3), 4),
        ("cosine", False, (5, 0, 7, 3), 3),  # its costs are the library's
    ],
)
def test_launches(emulated_cuda, metric, gradient, size, most):
    tensors = problem(2, *size, dtype=torch.float32)
    emulated_cuda.launches()
    run(tensors, "cuda", metric=metric, gradient=gradient)
    assert emulated_cuda.launches() == most


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    ("settings", "most"),
    [({"form": "gradient", "metric": "l1", "repulsion": 0.0}, 4), ({}, 5)],
)
def test_launches_of_guidance(emulated_cuda, settings, most, memory):
    """Of a step that is not the first; ragged classes, in one call."""
    generator = torch.Generator().manual_seed(0)
    guidance = OTGuidance(GuidanceConfig(**settings))
    real = torch.randn(12, 1, 4, 4, generator=generator)
    guidance.set_reference(real, torch.arange(2).repeat_interleave(6))
    labels = torch.tensor([0, 0, 1, 0, 1])
    finished = (real[:4] + 1, labels[:4]) if memory else None
    for step in range(2):
        emulated_cuda.launches()
        guidance.direction(real[:5] + step, 0, labels, memory=finished)
    assert emulated_cuda.launches() == most


def test_nan_stays_in_its_problem(emulated_cuda):
    tensors = problem(3, 8, 0, 5, 4)
    tensors["x"][0, 2, 1] = torch.nan
    tensors["y"][1, 0, 0] = torch.inf
    x, y, a, b = (tensors[name] for name in ("x", "y", "a", "b"))
    of_x, _, f, g, eps = moves_cuda(x, y, None, a, b, None, tensors["g"], 0.3, "l1", 6, True)
    assert eps.isnan().tolist() == [True, True, False]
    last = {name: None if t is None else t[2:] for name, t in tensors.items()}
    seen = [t[2:] for t in (of_x, f, g, eps)]
    assert_like(seen, oracle(**last, **OPTIONS), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_is_no_derivative(backend):
    tensors = problem(1, 4, 0, 3, 2)
    tensors["x"].requires_grad_()
    with pytest.raises(NotImplementedError, match="moves points has no derivative"):
        run(tensors, backend)[0].sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(backend):
    tensors = problem(2, 4, 2, 5, 3, dtype=torch.float32)
    args = *(tensors[name] for name in ("x", "y", "a", "b", "given", "g")), *OPTIONS.values()
    torch.library.opcheck(torch.ops.otdd.transport_moves.default, (*args, backend, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_a_batch(backend):
    tensors = problem(3, 5, 2, 4, 3)
    seen = vmap(lambda tensors: run(tensors, backend))(tensors)
    assert_like(seen, oracle(**tensors, **OPTIONS), torch.float64)
