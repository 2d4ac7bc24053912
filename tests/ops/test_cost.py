"""`cost_matrix` against the naive oracle: values, gradients, layouts, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import cost_oracle, problem

from otdd.backends import BackendError
from otdd.ops import METRICS, cost_matrix, sinkhorn
from otdd.ops.cost.reference import cost_backward_reference, cost_matrix_reference

BACKENDS = ("reference", "cpu", "cuda", "triton")
SHAPES = [(), (1,), (3,), (2, 3)], [(1, 1, 1), (5, 7, 3), (64, 33, 17), (4, 4, 129), (1, 300, 40)]


def clouds(batch: tuple, N: int, M: int, D: int, dtype: torch.dtype = torch.float64):
    torch.manual_seed(N * 1000 + M * 10 + D)
    return torch.randn(*batch, N, D, dtype=dtype), torch.randn(*batch, M, D, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", SHAPES[1])
@pytest.mark.parametrize("batch", SHAPES[0])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_values(backend, metric, sizes, batch, dtype, tol):
    x, y = clouds(batch, *sizes, dtype)
    C = cost_matrix(x, y, metric, backend=backend)
    expected = cost_oracle(x.double(), y.double(), metric)
    assert C.dtype == dtype
    assert C.shape == expected.shape
    torch.testing.assert_close(C.double(), expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(5, 7, 3), (1, 9, 20), (70, 3, 70)])
def test_gradients(backend, metric, sizes):
    x, y = (t.requires_grad_() for t in clouds((2,), *sizes))
    G = torch.randn(2, *sizes[:2], dtype=torch.float64)
    got = torch.autograd.grad((cost_matrix(x, y, metric, backend=backend) * G).sum(), (x, y))
    expected = torch.autograd.grad((cost_oracle(x, y, metric) * G).sum(), (x, y))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "cosine"])
def test_double_backward(backend, metric):
    x, y = (t.requires_grad_() for t in clouds((2,), 4, 3, 5))
    assert torch.autograd.gradgradcheck(
        lambda x, y: cost_matrix(x, y, metric, backend=backend), (x, y)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_only_one_side_needs_grad(backend, metric):
    x, y = clouds((), 4, 6, 3)
    for a, b in ((x.requires_grad_(), y), (x.detach(), y.requires_grad_())):
        cost_matrix(a, b, metric, backend=backend).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_layouts_do_not_matter(backend, metric):
    x, y = clouds((3,), 9, 8, 20)
    expected = cost_matrix(x, y, metric, backend=backend)
    strided = cost_matrix(
        x.mT.contiguous().mT, y.repeat(1, 1, 2)[..., :20], metric, backend=backend
    )
    every_second = torch.empty(6, 18, 40, dtype=x.dtype)[::2, ::2, ::2].copy_(x)
    torch.testing.assert_close(strided, expected)
    torch.testing.assert_close(cost_matrix(every_second, y, metric, backend=backend), expected)
    shared = cost_matrix(x, y[0], metric, backend=backend)
    torch.testing.assert_close(shared[0], expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_gradient(backend):
    x, y = (t.requires_grad_() for t in clouds((), 6, 5, 9))
    G = torch.randn(5, 6, dtype=torch.float64).T
    got = torch.autograd.grad(cost_matrix(x, y, backend=backend), (x, y), G)
    expected = torch.autograd.grad(cost_oracle(x, y, "l1"), (x, y), G)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(backend, metric, dtype):
    x, y = clouds((), 5, 6, 40, torch.float32)
    x, y = x.to(dtype).requires_grad_(), y.to(dtype)
    C = cost_matrix(x, y, metric, backend=backend)
    assert C.dtype == torch.float32
    torch.testing.assert_close(C, cost_oracle(x.float(), y.float(), metric), rtol=1e-5, atol=1e-5)
    C.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
def test_close_points_far_from_the_origin_keep_their_digits(backend, metric):
    x = torch.randn(20, 64) * 1e-3 + 100
    C = cost_matrix(x, x, metric, backend=backend)
    expected = cost_oracle(x.double(), x.double(), metric)
    assert (C.diagonal() == 0).all()
    torch.testing.assert_close(C.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_coinciding_and_zero_points_have_finite_gradients(backend, metric):
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    C = cost_matrix(x, x.detach().clone(), metric, backend=backend)
    C.sum().backward()
    assert torch.isfinite(x.grad).all()
    if metric == "cosine":
        assert (C[0] == 1).all()
        assert (x.grad[0] == 0).all()
    else:
        assert (C.diagonal() == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_empty_batch(backend, metric):
    x, y = (t.requires_grad_() for t in clouds((0,), 3, 4, 5))
    C = cost_matrix(x, y, metric, backend=backend)
    assert C.shape == (0, 3, 4)
    C.sum().backward()
    assert x.grad.shape == x.shape


# Across every block, panel, chunk and tail of the native kernels, and both ways to the gradients.
LARGE = [(50, 130, 300), (7, 150, 70), (1, 130, 4100), (260, 3, 40), (130, 70, 31), (30, 40, 600)]
LARGE += [(12, 203, 2053), (13, 203, 1030), (2, 390, 1030)]  # few points: long runs of features
LARGE += [(5, 500, 4100), (62, 200, 1030)]  # points copied apart, sums in several steps and blocks


@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean"])
@pytest.mark.parametrize("sizes", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_blocks(metric, sizes, dtype):
    x, y = (t.requires_grad_() for t in clouds((2,), *sizes, dtype))
    G = torch.randn(2, *sizes[:2], dtype=dtype)
    C = cost_matrix(x, y, metric, backend="cpu")
    got = torch.autograd.grad(C, (x, y), G)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = cost_oracle(*exact, metric)
    wanted = torch.autograd.grad(expected, exact, G.double())
    tol = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(C.double(), expected, rtol=tol, atol=0)
    for seen, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(seen.double(), want, rtol=0, atol=tol * float(want.abs().max()))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [*LARGE, (600, 80, 3)])
def test_threads_do_not_change_a_bit(metric, sizes):
    x, y = (t.requires_grad_() for t in clouds((), *sizes, torch.float32))
    G = torch.randn(sizes[:2])
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        C = cost_matrix(x, y, metric, backend="cpu")
        seen.append((C, *torch.autograd.grad(C, (x, y), G)))
    torch.set_num_threads(before)
    if metric == "cosine":  # a matrix product of PyTorch
        return
    for run in seen[1:]:
        assert all(torch.equal(t, first) for t, first in zip(run, seen[0], strict=True))


@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean"])
@pytest.mark.parametrize("sizes", [*LARGE, (600, 80, 3)])
def test_a_gradient_is_the_same_alone(metric, sizes):
    x, y = (t.requires_grad_() for t in clouds((), *sizes, torch.float32))
    G = torch.randn(sizes[:2])
    both = torch.autograd.grad(cost_matrix(x, y, metric, backend="cpu"), (x, y), G)
    (dx,) = torch.autograd.grad(cost_matrix(x, y.detach(), metric, backend="cpu"), x, G)
    (dy,) = torch.autograd.grad(cost_matrix(x.detach(), y, metric, backend="cpu"), y, G)
    assert torch.equal(dx, both[0])
    assert torch.equal(dy, both[1])


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    N=st.integers(1, 9),
    M=st.integers(1, 20),
    D=st.integers(1, 40),
    metric=st.sampled_from(["l1", "sqeuclidean"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_gradients_where_many_features_are_equal(backend, N, M, D, metric, dtype):
    torch.manual_seed(N + 10 * M + 200 * D)
    x = torch.randint(-1, 2, (N, D), dtype=dtype).requires_grad_()
    y = torch.randint(-1, 2, (M, D), dtype=dtype).requires_grad_()
    G = torch.randint(-3, 4, (N, M), dtype=dtype)  # small whole numbers: no rounding at all
    t = (x.unsqueeze(1) - y).detach()
    w = G.unsqueeze(-1) * (t.sign() if metric == "l1" else 2 * t)
    for inputs in ((x, y), (x,), (y,)):
        got = torch.autograd.grad(cost_matrix(x, y, metric, backend=backend), inputs, G)
        for of, seen in zip(inputs, got, strict=True):
            want = w.sum(1) if of is x else -w.sum(0)
            rounds = backend != "cpu" and metric == "sqeuclidean"  # it centres the clouds
            torch.testing.assert_close(seen, want, rtol=0, atol=1e-4 if rounds else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "cosine"])
def test_double_backward_of_one_side(backend, metric):
    x, y = clouds((2,), 4, 3, 5)
    for of in (0, 1):
        leaf = (x, y)[of].clone().requires_grad_()
        pair = (lambda t: (t, y)) if of == 0 else (lambda t: (x, t))
        assert torch.autograd.gradgradcheck(
            lambda t, pair=pair: cost_matrix(*pair(t), metric, backend=backend), (leaf,)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_points_that_nearly_coincide(backend, dtype):
    apart = torch.finfo(dtype).tiny / 100
    x, y = torch.tensor([[1.0, apart], [0.0, 1.0]], dtype=dtype), torch.ones(1, 2, dtype=dtype)
    y[0, 1] = 2 * apart
    x.requires_grad_()
    (got,) = torch.autograd.grad(cost_matrix(x, y, "l2", backend=backend).sum(), x)
    want = torch.tensor([[0.0, 0.0], [-(2**-0.5), 2**-0.5]], dtype=dtype)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_have_no_derivatives_under_cosine(backend):
    x, y = clouds((), 4, 3, 5)

    def derivatives(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        C = cost_matrix(*leaves, "cosine", backend=backend)
        slopes = torch.autograd.grad(C.square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(t.sin().sum() for t in slopes), leaves)
        return *(t.detach() for t in slopes), *again

    zero = torch.zeros_like(y[:1])
    with_zero = derivatives(torch.cat([zero, y]))
    for got, want, of in zip(with_zero, derivatives(y), "xyxy", strict=True):
        torch.testing.assert_close(got, want if of == "x" else torch.cat([zero, want]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_l1_has_no_second_derivative(backend):
    x, y = clouds((), 3, 4, 5)
    x.requires_grad_()
    C = cost_matrix(x, y, backend=backend).square().sum()
    with pytest.raises(NotImplementedError, match="l1 has no second derivative"):
        torch.autograd.grad(torch.autograd.grad(C, x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_under_vmap_and_grad(backend, metric):
    x, y = clouds((3,), 4, 5, 6)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cost_matrix(x, y, metric, backend=backend).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, y[0])
    leaves = x.clone().requires_grad_(), y[:1].repeat(3, 1, 1).requires_grad_()
    want = torch.autograd.grad(loss(*leaves), leaves)
    for seen, expected in zip(got, want, strict=True):
        torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_l2_beyond_the_range_of_squares(backend, dtype, sign):
    scale = 10.0 ** (sign * (25 if dtype == torch.float32 else 200))
    x, y = clouds((), 5, 40, 30, dtype)
    y[3] = x[2]
    leaf = (scale * x).requires_grad_()
    C = cost_matrix(leaf, scale * y, "l2", backend=backend)
    expected = cost_matrix(x, y, "l2", backend=backend)
    torch.testing.assert_close(C / scale, expected, rtol=1e-5, atol=0)
    (dx,) = torch.autograd.grad(C.sum(), leaf)
    unit = torch.autograd.grad(cost_matrix(x.requires_grad_(), y, "l2").sum(), x)[0]
    torch.testing.assert_close(dx, unit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_one_new_row_beside_known_ones(backend, metric):
    """What happens when one point moves: its row is made anew, the others are kept."""
    M, D = (34, 70) if backend == "triton" else (130, 300)
    x, y = (t.requires_grad_() for t in clouds((), 6, M, D))
    new = torch.randn(1, D, dtype=x.dtype, requires_grad=True)
    known = cost_matrix(x.detach(), y.detach(), metric, backend=backend)
    C = torch.cat([known[:2], cost_matrix(new, y, metric, backend=backend), known[3:]])
    moved = torch.cat([x[:2], new, x[3:]])
    torch.testing.assert_close(C, cost_matrix(moved, y, metric, backend=backend))
    G = problem(1, 6, M)[0][0]
    got = torch.autograd.grad(C, new, G)
    want = torch.autograd.grad(cost_matrix(moved, y, metric, backend=backend), new, G)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("metric", METRICS)
def test_few_points_agree_with_many(metric):
    x, y = clouds((), 20, 70, 333, torch.float32)
    rows = [cost_matrix(row, y, metric, backend="cpu") for row in x.split(3)]
    torch.testing.assert_close(torch.cat(rows), cost_matrix(x, y, metric, backend="cpu"))


def test_through_a_solve():
    x, y = (t.requires_grad_() for t in clouds((), 4, 5, 3))

    def value(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return sinkhorn(cost_matrix(x, y, "sqeuclidean"), eps=1.0, max_iter=300).value

    assert torch.autograd.gradcheck(value, (x, y))


def test_no_buffer_of_all_differences():
    x, y = clouds((), 256, 300, 400, torch.float32)
    peak = _largest_allocation(lambda: cost_matrix(x.requires_grad_(), y).sum().backward())
    assert peak <= 4 * max(256 * 300, 300 * 400)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_targets_that_all_problems_share_are_not_copied(metric):
    """In the parts that other backends, too, have from PyTorch."""
    x, y = clouds((50,), 4, 30, 400, torch.float32)
    C, y = torch.zeros(50, 4, 30), y[0].expand(50, 30, 400)

    def run():
        cost_matrix_reference(x, y, metric)
        if metric == "sqeuclidean":
            cost_backward_reference(C, x, y, metric, True, False)

    peak = _largest_allocation(run)
    assert peak <= 4 * 50 * 4 * 400  # of x, a seventh of the copies


def _largest_allocation(run) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"metric": "manhattan"}, ValueError, "metric: got 'manhattan'.*l1, l2"),
        ({"y": torch.randn(4, 6)}, ValueError, "y: got D = 6; accepted: D of x, 5"),
        ({"x": torch.randn(5)}, ValueError, r"x: got shape \(5,\)"),
        ({"x": torch.randn(3, 0), "y": torch.randn(4, 0)}, ValueError, "x: got shape"),
        ({"x": torch.randn(0, 5)}, ValueError, "at least one point"),
        ({"y": torch.randn(4, 5).double()}, TypeError, "y: got dtype torch.float64"),
        ({"x": torch.ones(3, 5, dtype=torch.int64)}, TypeError, "x: got dtype torch.int64"),
        ({"x": [[1.0]]}, TypeError, "x: got list"),
        (
            {"x": torch.full((3, 5), torch.nan)},
            ValueError,
            r"x: got nan at index \(0, 0\) of shape",
        ),
        ({"y": torch.full((4, 5), torch.inf)}, ValueError, "y: got inf"),
        ({"y": torch.randn(4, 5, device="meta")}, ValueError, "y: got device meta"),
        ({"x": torch.randn(2, 3, 5), "y": torch.randn(3, 4, 5)}, ValueError, "leading dimensions"),
        ({"backend": "fortran"}, ValueError, "fortran"),
        ({"backend": "cuda"}, BackendError, "cuda"),
    ],
)
def test_bad_input(kwargs, error, says):
    good = {"x": torch.randn(3, 5), "y": torch.randn(4, 5)}
    with pytest.raises(error, match=says):
        cost_matrix(**{**good, **kwargs})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("D", [1, 3, 70])
def test_no_bad_number_is_missed(backend, metric, bad, D):
    x, y = clouds((), 9, 70, D, torch.float32)
    for t, name in ((x, "x"), (y, "y")):
        broken = t.clone()
        broken[-1, -1] = bad
        pair = (broken, y) if name == "x" else (x, broken)
        with pytest.raises(ValueError, match=f"{name}: got {bad}"):
            cost_matrix(*pair, metric, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_cosine_of_very_long_and_very_short_vectors(backend, scale):
    x, y = clouds((), 5, 6, 7, torch.float32)
    seen = cost_matrix(scale * x, scale * y, "cosine", backend=backend)
    torch.testing.assert_close(seen, cost_matrix(x, y, "cosine", backend=backend))


def test_large_finite_values_are_not_mistaken_for_infinite_ones():
    x = torch.full((2, 2), 3e38)
    assert (cost_matrix(x, x) == 0).all()
