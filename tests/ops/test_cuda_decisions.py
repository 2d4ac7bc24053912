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
