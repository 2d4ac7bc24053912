"""What the CUDA solver decides on the way: each problem goes wrong where a decision does."""

import math

import pytest
import torch

from otdd.ops import sinkhorn

GRIDS = {"warp": (6, 6), "block": (70, 6)}


def drifting(seed, rows=6):
    """Costs and weights that move potentials by hundreds of eps, over many iterations."""
    generator = torch.Generator().manual_seed(seed)
    C = 400 * torch.rand(6, 6, generator=generator)
    a, b = (10 ** (-6 * torch.rand(6, generator=generator)) for _ in range(2))
    times = math.ceil(rows / 6)
    C, a = C.repeat(times, 1)[:rows], a.repeat(times)[:rows]
    return C, a / a.sum(), b / b.sum()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [14, 54, 0, 1])
def test_a_matrix_is_made_anew_before_it_lacks_digits(emulated_cuda, seed, grid):
    """Seed 14 is lost without the upper bound of v, seed 54 without the lower."""
    C, a, b = drifting(seed, GRIDS[grid][0])
    options = {"eps": 1.0, "max_iter": 40}
    seen = sinkhorn(C, a, b, **options, backend="cuda")
    want = sinkhorn(C.double(), a.double(), b.double(), **options, backend="reference")
    rounding = 2**-24 * (want.f.abs().max() + want.g.abs().max())  # of float32 potentials, eps = 1
    assert (seen.plan - want.plan).abs().sum() <= rounding
    torch.testing.assert_close(seen.f.double(), want.f, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(5, 7), (20, 31), (70, 9)])
def test_the_implicit_system_is_solved_beside_its_kernel(emulated_cuda, size):
    """Of f alone, which a constant shared with g changes: what has no answer is left out."""
    C = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradient(backend):
        leaf = C.clone().requires_grad_()
        f = sinkhorn(leaf, eps=0.1, max_iter=300, grad="implicit", backend=backend).f
        return torch.autograd.grad((f * torch.linspace(1, 2, size[0], dtype=f.dtype)).sum(), leaf)[
            0
        ]

    torch.testing.assert_close(gradient("cuda"), gradient("reference"), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("grid", "passes"), [("warp", 1), ("block", 2)])
def test_costs_are_read_at_the_begin_and_the_end(emulated_cuda, grid, passes):
    """Once or twice for K (its maxima, then itself) and once for the cost of the plan."""
    C = torch.rand(GRIDS[grid])
    for max_iter in (1, 50):
        sinkhorn(C, eps=0.1, max_iter=max_iter, backend="cuda")
        assert emulated_cuda.reads() == (passes + 1) * C.numel()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tiny", [1e-12, 1e-27])
def test_a_matrix_is_not_kept_where_weights_leave_no_digits(emulated_cuda, grid, tiny):
    """A column of 1e-27 of the mass leaves v a range of less than exp(3)."""
    C = torch.rand(GRIDS[grid])
    b = torch.tensor([tiny, *[0.2] * 5])
    a = torch.full((C.shape[0],), float(b.double().sum()) / C.shape[0])
    options = {"eps": 0.1, "max_iter": 20}
    seen = sinkhorn(C, a, b, **options, backend="cuda")
    assert (emulated_cuda.reads() >= 20 * C.numel()) == (tiny < 1e-20)
    want = sinkhorn(C.double(), a.double(), b.double(), **options, backend="reference")
    torch.testing.assert_close(seen.f.double(), want.f, rtol=0, atol=2e-6)


def penalised(kind, rows):
    """Costs and weights of which u spans hundreds of orders of magnitude under a penalty."""
    C = torch.rand(rows, 6, generator=torch.Generator().manual_seed(3))
    a, b = torch.full((rows,), 1 / rows), torch.full((6,), 1 / 6)
    first = (torch.arange(rows) == 0).unsqueeze(-1)
    if kind == "an offset of all rows":
        return C + 500, a, b
    if kind == "rows of costs far apart":
        return C + 500 * ~first, a, b
    a[0] = 1e-30  # it is the nearest to all columns
    return C + 120 * ~first, a, b


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "kind", ["an offset of all rows", "rows of costs far apart", "a light row"]
)
def test_u_is_relative_to_the_heaviest_row(emulated_cuda, kind, grid):
    """Else it leaves the range of float32: as infinity, or as columns that seem to have no mass."""
    C, a, b = penalised(kind, GRIDS[grid][0])
    options = {"eps": 0.1, "rho_a": 0.5, "rho_b": 0.5}
    reads = []
    for max_iter in (40, 60):
        seen = sinkhorn(C, a, b, max_iter=max_iter, **options, backend="cuda")
        reads.append(emulated_cuda.reads())
    assert reads[0] == reads[1] <= 35 * C.numel()  # a matrix that serves to the end
    options["max_iter"] = 60
    want = sinkhorn(C.double(), a.double(), b.double(), **options, backend="reference")
    torch.testing.assert_close(seen.f.double(), want.f, rtol=0, atol=3e-5)
    torch.testing.assert_close(seen.g.double(), want.g, rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mass", [1e-3, 1, 1e3])
def test_what_ends_by_its_error_meets_it(emulated_cuda, mass, dtype):
    """Also where the error is within rounding of `tol`, and no later than it has to."""
    digits = torch.finfo(dtype).eps
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        C = torch.rand(6, 6, generator=generator, dtype=dtype)
        a, b = (torch.rand(6, generator=generator, dtype=dtype) + 0.1 for _ in range(2))
        problem = C, a / a.sum() * mass, b / b.sum() * mass
        for k in range(1, 6):
            options = {"eps": 0.05, "backend": "cuda"}
            error = sinkhorn(*problem, max_iter=k, **options).marginal_error.item()
            if error < 1e-4 * mass:
                continue
            assert sinkhorn(*problem, tol=error * (1 - digits), **options).converged
            if error > 1e-2 * mass:
                assert sinkhorn(*problem, tol=error * (1 + 1e-4), **options).n_iter == k


def unrolled_gradients(backend, dtype, C, a, b, **options):
    """Of numbers in which all potentials have a part."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (C, a, b)]
    result = sinkhorn(*leaves, grad="unrolled", backend=backend, **options)
    f = result.f * torch.linspace(-1, 1, len(a), dtype=dtype)
    g = result.g * torch.linspace(1, 2, len(b), dtype=dtype)
    return torch.autograd.grad(f.sum() + g.sum(), leaves)


def assert_unrolled(C, a, b, **options):
    seen = unrolled_gradients("cuda", torch.float32, C, a, b, **options)
    want = unrolled_gradients("reference", torch.float64, C, a, b, **options)
    for got, exact in zip(seen, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-5 * exact.abs().max())


@pytest.mark.parametrize("seed", [14, 54, 0, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_derivative_has_a_matrix_of_potentials_near_by(emulated_cuda, grid, seed):
    """Over iterations in which they move by hundreds of eps."""
    C, a, b = drifting(seed, GRIDS[grid][0])
    assert_unrolled(C, a, b, eps=1.0, max_iter=40)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("moved", [0, 8, 25])
def test_a_derivative_keeps_its_matrix_for_near_potentials(emulated_cuda, moved, grid):
    """It was made once for iterations within 11 eps of each other, and else made anew."""
    C = torch.rand(GRIDS[grid], generator=torch.Generator().manual_seed(5))
    weights = [torch.full((n,), 1 / n) for n in C.shape]
    solved = sinkhorn(C, *weights, eps=1.0, max_iter=100, backend="cuda")
    start = solved.f, solved.g + moved * (torch.arange(6) == 2)
    unrolled_gradients("cuda", torch.float32, C, *weights, eps=1.0, max_iter=5, init=start)
    assert (emulated_cuda.reads() == C.numel()) == (moved < 11)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_derivative_has_a_matrix_for_each_half_of_a_wide_step(emulated_cuda, grid):
    """Under light penalties, where potentials are far from what makes rows or columns sum to 1."""
    C, a, b = drifting(1, GRIDS[grid][0])
    assert_unrolled(C, a, b, eps=1.0, max_iter=3, rho_a=0.05, rho_b=0.05)
