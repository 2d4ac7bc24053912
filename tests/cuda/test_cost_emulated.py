"""The CUDA kernels of L1 and squared costs, and of the gradients of L1, run by the emulator."""

import emulated
import pytest
import torch
from references import cost_oracle

from otdd.ops import pointers
from otdd.ops.cost.cuda import cost_backward_cuda, cost_matrix_cuda

SHARED = 227 << 10
METRICS = "l1", "sqeuclidean"
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-14}
SIZES = [  # N, M, D: streams of few rows, either way round, tiles of every kind, edges of all
    (1, 1, 1),
    (1, 130, 1000),
    (2, 65, 64),
    (7, 33, 1000),
    (64, 7, 129),
    (4, 4, 31),
    (33, 64, 3),
    (65, 2, 4),
    (130, 65, 31),
    (33, 33, 1000),
    (130, 130, 4),
    (250, 200, 17),
    (3, 40, 100),
]


@pytest.fixture
def module(monkeypatch):
    built = emulated.module()
    monkeypatch.setattr(pointers, "emulated", built)
    yield built
    built.set_order(emulated.ORDERS["forward"])
    built.set_chip(4, SHARED, 16)


def clouds(B, N, M, D, dtype):
    """Points on a grid, so that many features are equal."""
    generator = torch.Generator().manual_seed(N + 7 * M + 31 * D)
    x, y = (torch.randn(B, n, D, generator=generator, dtype=dtype) for n in (N, M))
    y[..., ::3] = y[..., ::3].round()
    x[..., ::3] = x[..., ::3].round()
    return x, y, torch.randn(B, N, M, generator=generator, dtype=dtype)


def gradients(G, x, y):
    """Through all differences, in float64."""
    G, signs = G.double(), (x.double().unsqueeze(-2) - y.double().unsqueeze(-3)).sign()
    dx = torch.einsum("...nm,...nmd->...nd", G, signs)
    dy = -torch.einsum("...nm,...nmd->...md", G, signs)
    return dx, dy


def assert_near(seen, expected, scale, tolerance):
    assert seen.shape == expected.shape
    assert ((seen.double() - expected).abs() <= tolerance * scale).all()


def check_cost(module, x, y):
    tolerance = DTYPES[x.dtype]
    seen = emulated.in_every_order(module, lambda: [cost_matrix_cuda(x, y, m) for m in METRICS])
    for C, metric in zip(seen, METRICS, strict=True):
        expected = cost_oracle(x.double(), y.double(), metric)
        assert_near(C, expected, expected, tolerance)


def check_gradients(module, G, x, y):
    tolerance = DTYPES[x.dtype]
    seen = emulated.in_every_order(module, lambda: cost_backward_cuda(G, x, y, "l1", True, True))
    weight = G.double().abs()
    scales = weight.sum(-1, keepdim=True), weight.sum(-2).unsqueeze(-1)
    for got, expected, scale in zip(seen, gradients(G, x, y), scales, strict=True):
        assert_near(got, expected, scale, tolerance)


@pytest.mark.parametrize("processors", [1, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(module, sizes, dtype, processors):
    module.set_chip(processors, SHARED, 16)
    x, y, G = clouds(2, *sizes, dtype)
    check_cost(module, x, y)
    check_gradients(module, G, x, y)


@pytest.mark.parametrize("sizes", [(9, 10, 20), (2, 9, 70)])
def test_blocks_go_round(module, sizes):
    module.set_chip(1, SHARED, 16)
    x, y, G = clouds(40, *sizes, torch.float32)
    check_cost(module, x, y)
    check_gradients(module, G, x, y)


@pytest.mark.parametrize("sizes", [(5, 70, 257), (40, 33, 70), (33, 5, 256)])
def test_layouts(module, sizes):
    x, y, G = clouds(3, *sizes, torch.float32)
    N, M, D = sizes
    odd = torch.empty(3, 2 * N, D + 7)[:, 1::2, 3 : 3 + D].copy_(x)
    wide = torch.empty(3, M, D + 7 - (D + 7) % 4)[..., :D].copy_(y)
    transposed = G.mT.contiguous().mT
    check_cost(module, odd, wide)
    check_gradients(module, transposed, odd, wide)
    check_cost(module, x, y[:1].expand(3, M, D))
    check_gradients(module, G[..., :1].expand(3, N, M), x[1:2].expand(3, N, D), y)
    check_gradients(module, torch.ones(()).expand(3, N, M), x, y)
    check_gradients(module, G[0], x[0], y[0])
    check_cost(module, x[None], y[None])


def test_equal_points_have_no_gradient(module):
    x = torch.randn(40, 37)
    y = x[:1].repeat(9, 1)
    dx, dy = cost_backward_cuda(torch.randn(40, 9), x, y, "l1", True, True)
    assert (dx[0] == 0).all()
    dx, dy = cost_backward_cuda(torch.randn(9, 9), y, y, "l1", True, True)
    assert (dx == 0).all()
    assert (dy == 0).all()
    for metric in METRICS:
        assert (cost_matrix_cuda(y, y, metric) == 0).all()


def test_smallest_difference_has_its_sign(module):
    x = torch.tensor([[1e-45], [0.0], [3e38]])
    dx, _ = cost_backward_cuda(torch.ones(3, 1), x, torch.zeros(1, 1), "l1", True, True)
    assert dx.flatten().tolist() == [1, 0, 1]


def test_only_one_side(module):
    x, y, G = clouds(2, 6, 70, 9, torch.float64)
    dx, dy = cost_backward_cuda(G, x, y, "l1", True, True)
    alone, none = cost_backward_cuda(G, x, y, "l1", True, False)
    assert none.shape == (2, 70, 0)
    assert torch.equal(alone, dx)
    none, alone = cost_backward_cuda(G, x, y, "l1", False, True)
    assert none.shape == (2, 6, 0)
    assert torch.equal(alone, dy)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 4, 0)])
@pytest.mark.parametrize("B", [0, 2])
def test_nothing_to_do(module, B, sizes):
    x, y, G = (t[:B] for t in clouds(2, *sizes, torch.float32))
    for metric in METRICS:
        assert (cost_matrix_cuda(x, y, metric) == 0).all()
    dx, dy = cost_backward_cuda(G, x, y, "l1", True, True)
    assert (dx == 0).all()
    assert (dy == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_cut_where_tiles_are_few(module, dtype):
    module.set_chip(132, SHARED, 16)
    x, y, G = clouds(1, 50, 40, 5000, dtype)
    assert pointers.workspace(x, "cost", 1, 50, 40, 5000).numel() > 0
    check_cost(module, x, y)
    x, y, G = clouds(1, 2, 9000, 9, dtype)
    assert pointers.workspace(x, "cost_backward", 1, 2, 9000, 9).numel() > 0
    check_gradients(module, G, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_of_few_points_are_cut(module, dtype):
    module.set_chip(132, SHARED, 16)
    for N, M, D in [(3, 5, 20_003), (9, 1, 16_384), (8, 2, 12_300)]:
        x, y, _ = clouds(2, N, M, D, dtype)
        assert pointers.workspace(x, "cost", 2, N, M, D).numel() > 0
        check_cost(module, x, y)
    assert (
        pointers.workspace(x, "cost", 1, 3, 5, 8000).numel() == 0
    )  # a second kernel would take longer


@pytest.mark.parametrize(
    ("kernel", "sizes", "all_sizes"),
    [
        ("cost", (1, 1024, 1024, 1000), (1, 1024, 1024, 1000)),
        ("cost", (64, 64, 1300, 4096), (64, 64, 1300, 4096)),
        ("cost_backward", (1, 1024, 1024, 1000), (1, 1024, 1024, 1000)),
        ("cost_backward", (64, 64, 1300, 4096), (64, 64, 1300, 4096)),
        ("logits", (1, 1024, 1000), (1, 1024, 1024, 1000)),
        ("logits_backward", (1, 1024, 1000), (1, 1024, 1024, 1000)),
        ("moves", (64, 64, 0, 1300, 4096), (64, 64, 1300, 4096)),
    ],
)
def test_no_buffer_of_all_differences(module, kernel, sizes, all_sizes):
    """On an H200: two copies of costs or points, where all differences would be hundreds."""
    module.set_chip(132, SHARED, 16)
    B, N, M, D = all_sizes
    used = pointers.workspace(torch.empty(0), kernel, *sizes).numel()
    assert used <= 2 * 4 * B * (N * M + N * D) < 4 * B * N * M * D / 20


@pytest.mark.parametrize(("N", "M", "D"), [(9, 9, 200_000), (1, 2, 200_000)])
def test_long_sums_keep_their_digits(module, N, M, D):
    module.set_chip(1, SHARED, 16)
    x, y, _ = clouds(1, N, M, D, torch.float32)
    for metric in METRICS:
        C = cost_matrix_cuda(x + 3, y - 3, metric)
        expected = cost_oracle((x + 3).double(), (y - 3).double(), metric)
        assert ((C - expected).abs() <= 3e-7 * expected).all()


def test_gradients_of_long_sums_keep_their_digits(module):
    module.set_chip(1, SHARED, 16)
    x, y, G = clouds(1, 2, 30_000, 2, torch.float32)
    check_gradients(module, G.abs(), x + 9, y)
