"""The CUDA kernels on a device: results, and what only a device shows: streams, graphs, devices."""

import pytest
import torch

from otdd.distill.config import GuidanceConfig
from otdd.distill.guidance import OTGuidance
from otdd.losses import OTLogitLoss
from otdd.ops import barycentric, cost_matrix, sinkhorn
from otdd.ops.logits import logit_transport
from otdd.ops.moves import transport_moves

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12}
# For every team: a warp, a block, clusters, a group of blocks, a group in a workspace.
SIZES = [
    (3, 1, 1),
    (300, 5, 3),
    (7, 16, 16),
    (5, 33, 20),
    (64, 64, 64),
    (200, 65, 90),
    (3, 300, 2),
    (10, 50, 1300),
    (1, 500, 400),
    (2, 1000, 900),
    (1, 3000, 2500),
    (1, 64, 8000),
]


def problem(size, dtype, device=DEVICE):
    B, N, M = size
    generator = torch.Generator().manual_seed(B + 10 * N + 1000 * M)
    C, a, b = (
        torch.rand(B, *shape, generator=generator, dtype=dtype) + 0.1
        for shape in ((N, M), (N,), (M,))
    )
    if B > 1:
        a[-1, 1::3] = 0
        b[-1, 1::4] = 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return C.to(device), a.to(device), b.to(device)


def close(got, want, digits, least=1e-6):
    for seen, exact in zip(got, want, strict=True):
        unit = exact.abs().max().clamp_min(least)
        error = ((seen.double() - exact) / unit).abs().max().item()
        assert error <= digits, error


def wide(tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rho", [None, 0.4])
@pytest.mark.parametrize("eps", [0.1, 0.002])
@pytest.mark.parametrize("size", SIZES)
def test_solves(size, eps, rho, dtype):
    C, a, b = problem(size, dtype)
    options = {"eps": eps, "max_iter": 10, "rho_a": rho, "rho_b": rho}
    result = sinkhorn(C, a, b, **options, backend="cuda")
    expected = sinkhorn(*wide((C, a, b)), **options, backend="reference")
    names = "f", "g", "value", "cost"
    got, want = ([getattr(r, name) for name in names] for r in (result, expected))
    close(got, want, DTYPES[dtype], least=0.1)
    close([result.plan], [expected.plan], DTYPES[dtype] * (1 + 1 / eps))
    again = sinkhorn(C, a, b, **options, backend="cuda")
    assert torch.equal(result.f, again.f)
    assert torch.equal(result.g, again.g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grad", "eps"), [("unrolled", 0.1), ("unrolled", 0.002), ("implicit", 0.3), ("envelope", 0.3)]
)
@pytest.mark.parametrize("size", SIZES[:-1])
def test_gradients(size, grad, eps, dtype):
    def gradients(backend, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        max_iter = 8 if grad == "unrolled" else 300
        result = sinkhorn(*leaves, eps=eps, max_iter=max_iter, grad=grad, backend=backend)
        loss = result.value.sum() + (0 if grad == "envelope" else result.cost.sum())
        return torch.autograd.grad(loss, leaves)

    tensors = problem(size, dtype)
    want = gradients("reference", wide(tensors))
    close(gradients("cuda", tensors), want, 10 * DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean"])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1), (3, 65, 33, 100), (2, 5, 3000, 129), (1, 512, 512, 1000), (1, 50, 1300, 4096)],
)
def test_costs(size, metric, dtype):
    B, N, M, D = size
    x, y = torch.randn(B, N, D), torch.randn(B, M, D)
    G = torch.randn(B, N, M)
    x[..., ::3], y[..., ::3] = x[..., ::3].round(), y[..., ::3].round()
    x, y, G = (t.to(DEVICE, dtype) for t in (x, y, G))

    def run(backend, x, y, G):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        C = cost_matrix(x, y, metric, backend=backend)
        return C, *torch.autograd.grad(C, (x, y), G)

    close(run("cuda", x, y, G), run("reference", *wide((x, y, G))), DTYPES[dtype])


def step(x, y):
    """A guidance step: costs, solve, gradient of the rows that move."""
    C = cost_matrix(x, y, "l1")
    result = sinkhorn(C, eps=5.0, max_iter=20)
    return torch.autograd.grad(result.value.sum(), x)[0], barycentric(result, y)


def test_default_backend_on_a_device_is_cuda():
    assert sinkhorn(torch.rand(3, 4, device=DEVICE), eps=0.1).backend == "cuda"


def test_a_step_captured_in_a_cuda_graph():
    y = torch.randn(4, 130, 64, device=DEVICE)
    x = torch.randn(4, 50, 64, device=DEVICE, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, y)
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        for seen, want in zip(captured, step(x, y), strict=True):
            assert torch.equal(seen, want)


def test_no_op_waits_for_the_device():
    y = torch.randn(4, 130, 64, device=DEVICE)
    x = torch.randn(4, 50, 64, device=DEVICE, requires_grad=True)
    logits = torch.randn(64, 100, device=DEVICE, requires_grad=True)
    teacher = torch.randn(64, 100, device=DEVICE)
    step(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y)
        OTLogitLoss()(logits, teacher).backward()
        sinkhorn(torch.rand(2, 70, 80, device=DEVICE), eps=0.1, tol=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def logit_gradient(student, teacher, backend):
    leaf = student.clone().requires_grad_()
    options = {"tau": 2.0, "eps": 0.1, "max_iter": 10, "sinkd": False}
    cost = logit_transport(leaf, teacher, **options, backend=backend)
    return [cost.detach(), *torch.autograd.grad(cost.sum(), leaf)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 20, 10), (1, 128, 1000), (1, 1024, 1000), (1, 3, 9000)])
def test_logits(size, dtype):
    generator = torch.Generator().manual_seed(2)
    pair = [3 * torch.randn(size, generator=generator, dtype=dtype).to(DEVICE) for _ in range(2)]
    want = logit_gradient(*wide(pair), "reference")
    close(logit_gradient(*pair, "cuda"), want, DTYPES[dtype], least=1e-3)
    for half in (torch.float16, torch.bfloat16):
        narrow = [t.to(half) for t in pair]
        seen = logit_gradient(*narrow, "cuda")
        exact = logit_gradient(*(t.float() for t in narrow), "cuda")
        assert torch.equal(seen[0], exact[0])
        assert torch.equal(seen[1], exact[1].to(half))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["l1", "sqeuclidean"])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    "size",
    [
        (5, 1, 0, 1, 1),
        (3, 5, 2, 7, 3),
        (64, 64, 0, 1300, 128),
        (1, 3, 1, 40, 9000),
        (1, 1, 0, 4000, 3),
    ],
)
def test_moves(size, gradient, metric, dtype):
    B, N, L, M, D = size
    generator = torch.Generator().manual_seed(D)
    shapes = (N, D), (M, D), (L, M)
    x, y, given = (torch.randn(B, *s, generator=generator, dtype=dtype) for s in shapes)
    a, b = (torch.rand(B, n, generator=generator, dtype=dtype) + 0.1 for n in (N + L, M))
    a[1:, 1:2] = 0
    tensors = [
        t.to(DEVICE) for t in (x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))
    ]
    given = (D + given).to(DEVICE) if L else None
    options = {"lambda_1": 0.5, "metric": metric, "max_iter": 10, "gradient": gradient}

    def run(backend, tensors, given):
        moves = transport_moves(*tensors, **options, given=given, backend=backend)
        return moves.of_x, moves.f, moves.g, moves.eps

    seen = run("cuda", tensors, given)
    want = run("reference", wide(tensors), None if given is None else given.double())
    close(seen, want, 100 * DTYPES[dtype], least=1e-3)
    assert all(map(torch.equal, seen, run("cuda", tensors, given)))


@pytest.mark.parametrize("settings", [{}, {"form": "gradient", "metric": "l1", "repulsion": 0.0}])
def test_a_step_of_guidance_captured_in_a_cuda_graph(settings):
    """The first call makes what the classes decide; those after it wait for nothing."""
    guidance = OTGuidance(GuidanceConfig(**settings))
    real = torch.randn(60, 4, 8, 8, device=DEVICE)
    guidance.set_reference(real, torch.arange(3, device=DEVICE).repeat_interleave(20))
    x = torch.randn(7, 4, 8, 8, device=DEVICE)
    labels = torch.tensor([0, 2, 1, 1, 0, 0, 0], device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            guidance.direction(x, 0, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = guidance.direction(x, 0, labels)
    x.normal_()
    graph.replay()
    assert torch.equal(captured, guidance.direction(x, 0, labels))


@pytest.mark.parametrize("size", [(64, 64, 64), (1, 1500, 1500)])
def test_another_stream(size):
    C, a, b = problem(size, torch.float32)
    want = sinkhorn(C, a, b, eps=0.05, max_iter=20, backend="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(C)
        torch.cuda._sleep(10_000_000)  # the solve must come after what is in its stream
        late += C
        seen = sinkhorn(late, a, b, eps=0.05, max_iter=20, backend="cuda")
    stream.synchronize()
    assert torch.equal(seen.f, want.f)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    C, a, b = problem((3, 70, 80), torch.float32)
    want = sinkhorn(C, a, b, eps=0.05, max_iter=20)
    there = sinkhorn(*(t.to("cuda:1") for t in (C, a, b)), eps=0.05, max_iter=20)
    assert there.f.device.index == 1
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(there.f.cpu(), want.f.cpu())


def test_compile_and_vmap_and_autocast():
    C = torch.rand(3, 20, 30, device=DEVICE)

    def value(C):
        return sinkhorn(C, eps=0.1, max_iter=20).value

    want = value(C)
    torch.testing.assert_close(torch.compile(value, fullgraph=True)(C), want)
    torch.testing.assert_close(torch.func.vmap(value)(C), want)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.testing.assert_close(value(C), want)


def test_half_precision_inputs():
    C = torch.rand(3, 20, 30, device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16):
        result = sinkhorn(C.to(dtype), eps=0.1, max_iter=20)
        assert result.value.dtype == torch.float32
        torch.testing.assert_close(
            result.value, sinkhorn(C.to(dtype).float(), eps=0.1, max_iter=20).value
        )
