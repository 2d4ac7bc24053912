"""Solves and derivatives by every team of threads, run by the emulator in every order of threads.

A barrier that is missing shows as a result that depends on the order; a read outside the arguments,
a result written twice or never, is an error of the emulator.
"""

import math

import emulated
import pytest
import torch
from references import sinkhorn_oracle

from otdd.ops import pointers, sinkhorn
from otdd.ops.sinkhorn.cuda import potentials_backward_cuda, sinkhorn_cuda

SHARED = 227 << 10
# Multiprocessors, bytes of shared memory, blocks of a cluster; sizes that then take this team.
TEAMS = {
    "warp": (
        (4, SHARED, 16),
        [(1, 1), (3, 5), (16, 16), (17, 9), (33, 16), (33, 20), (64, 64), (5, 64)],
    ),
    "block": ((4, SHARED, 16), [(65, 3), (70, 90), (1, 300), (300, 1), (3, 600)]),
    "cluster": ((132, SHARED, 8), [(90, 100), (67, 129)]),
    "large cluster": ((8, 40 << 10, 16), [(150, 61), (130, 70)]),
    "group": ((4, 30 << 10, 1), [(100, 70), (66, 130)]),
    "workspace": ((4, 20 << 10, 1), [(100, 110), (67, 130)]),
}
CASES = [(team, size) for team, (_, sizes) in TEAMS.items() for size in sizes]


def problem(size, dtype, batch=2):
    generator = torch.Generator().manual_seed(size[0] + 1000 * size[1])
    N, M = size
    C = torch.rand(batch, N, M, generator=generator, dtype=dtype)
    a, b = (torch.rand(batch, n, generator=generator, dtype=dtype) + 0.1 for n in size)
    a[-1, 1::3] = 0
    b[-1, 1::4] = 0
    return C, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [math.inf, 0.4])
@pytest.mark.parametrize("eps", [0.05, 0.0005])
@pytest.mark.parametrize(("team", "size"), CASES)
def test_solves(emulated_cuda, team, size, eps, rho, dtype, backend):
    emulated_cuda.set_chip(*TEAMS[team][0])
    C, a, b = problem(size, dtype)
    C[:, :, size[1] // 2] += size[1] > 1  # a column that K loses where eps is small
    options = {"eps": eps, "max_iter": 8, "rho_a": rho, "rho_b": rho}

    def solve():
        result = sinkhorn(C, a, b, **options, backend=backend)
        return result.f, result.g, result.value, result.cost, result.marginal_error, result.plan

    seen = emulated.in_every_order(emulated_cuda, solve)
    expected = sinkhorn_oracle(*(t.double() for t in (C, a, b)), **options)
    digits = {torch.float32: 3e-6, torch.float64: 1e-13}[dtype]
    names = "f", "g", "value", "cost", "marginal_error", "plan"
    for name, got in zip(names, seen, strict=True):
        want = expected[name]
        unit = 1 if name in ("f", "g", "value", "cost") else 1 + 1 / eps
        torch.testing.assert_close(got.double(), want, rtol=0, atol=digits * unit, msg=name)


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("grad", "eps"), [("unrolled", 0.05), ("unrolled", 5e-4), ("implicit", 0.3)]
)
@pytest.mark.parametrize(("team", "size"), CASES)
def test_gradients(emulated_cuda, team, size, grad, eps, dtype, backend):
    emulated_cuda.set_chip(*TEAMS[team][0])
    max_iter = 6 if grad == "unrolled" else 300

    def gradients(backend, dtype):
        C, a, b = (t.to(dtype).requires_grad_() for t in problem(size, torch.float32))
        result = sinkhorn(C, a, b, eps=eps, max_iter=max_iter, grad=grad, backend=backend)
        N, M = size
        f = result.f.where(a > 0, 0) * torch.linspace(-1, 1, N, dtype=dtype)
        g = result.g.where(b > 0, 0) * torch.linspace(1, 2, M, dtype=dtype)
        if grad == "implicit":  # f and g have a constant in common that no marginal tells
            f, g = f - f.mean(-1, keepdim=True), g * 0
            f = f.where(a > 0, 0)
        loss = result.cost.sum() + (f.sum() + g.sum() if grad == "unrolled" else 0)
        return torch.autograd.grad(loss, (C, a, b))

    seen = emulated.in_every_order(emulated_cuda, lambda: gradients(backend, dtype))
    want = gradients("reference", torch.float64)
    digits = {torch.float32: 2e-5, torch.float64: 1e-10}[dtype]
    for got, exact in zip(seen, want, strict=True):
        unit = exact.abs().max().clamp_min(1e-2)
        torch.testing.assert_close(got / unit, exact.to(dtype) / unit, rtol=0, atol=digits)


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize(("team", "size"), CASES)
def test_each_problem_stops_by_itself(emulated_cuda, team, size, backend):
    emulated_cuda.set_chip(*TEAMS[team][0])
    C, a, b = problem(size, torch.float64, batch=3)
    eps = torch.tensor([0.3, 0.03, 1.0], dtype=torch.float64)
    options = {"eps": eps, "max_iter": 300, "tol": 1e-6}

    def solve():
        result = sinkhorn(C, a, b, **options, backend=backend)
        return result.n_iter, result.marginal_error, result.f

    n_iter, error, f = emulated.in_every_order(emulated_cuda, solve)
    expected = sinkhorn(C, a, b, **options, backend="reference")
    assert (error[n_iter < 300] <= 1e-6).all()
    assert torch.equal(n_iter, expected.n_iter)
    torch.testing.assert_close(f, expected.f, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rho", [None, 0.4])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize(("team", "size"), CASES)
def test_costs_that_are_no_numbers_stay_in_their_problem(emulated_cuda, team, size, bad, rho):
    emulated_cuda.set_chip(*TEAMS[team][0])
    C, a, b = problem(size, torch.float32)
    C[0, -1, -1] = bad
    eps = torch.full((2,), 0.1, dtype=torch.float64)
    rho = None if rho is None else torch.full_like(eps, rho)
    with_penalty = rho, rho
    result = sinkhorn_cuda(C, a, b, eps, *with_penalty, None, 5, 1e-9, True, False)
    assert [x.isfinite() for x in result.value] == [False, True]
    if rho is None:
        with_penalty = eps * math.inf, eps * math.inf
    potentials = result.f, result.g, result.history, result.n_iter
    for mode in ("unrolled", "implicit"):
        upstream = torch.ones_like(a), torch.ones_like(b)
        grads = potentials_backward_cuda(C, a, b, eps, *with_penalty, *potentials, *upstream, mode)
        assert all(grad[1].isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("team", TEAMS)
def test_a_start_that_is_the_solution_takes_an_iteration(emulated_cuda, team, backend):
    emulated_cuda.set_chip(*TEAMS[team][0])
    C = torch.zeros(1, *TEAMS[team][1][0])
    n_iter = [sinkhorn(C, eps=1, tol=1e-3, backend=b).n_iter.item() for b in (backend, "reference")]
    assert n_iter[0] == n_iter[1]


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
@pytest.mark.parametrize("team", TEAMS)
def test_empty_batches(emulated_cuda, team, grad, backend):
    emulated_cuda.set_chip(*TEAMS[team][0])
    C = torch.zeros(0, *TEAMS[team][1][-1], requires_grad=True)
    result = sinkhorn(C, eps=0.1, grad=grad, max_iter=3, backend=backend)
    (dC,) = torch.autograd.grad(result.value.sum(), C)
    assert result.value.shape == (0,)
    assert dC.shape == C.shape


def test_a_mistake_in_a_kernel_is_seen(emulated_cuda):
    kernel = pointers.cuda_kernel("plan", torch.float32)
    C, P = torch.rand(3, 4), torch.empty(3, 4)

    def plan(f, P_address):
        matrix, one = (C.data_ptr(), 0, 4), torch.ones(1, dtype=torch.float64)
        nothing = 0, 0, 0
        eps = one.data_ptr(), 0, 0
        return kernel(
            0, 0, 1, 3, 4, matrix, f, nothing, nothing, nothing, 0.0, eps, nothing, P_address
        )

    assert plan((0, 0, 0), P.data_ptr()) == 0
    assert torch.isfinite(P).all()
    assert plan((0, 0, 0), C.data_ptr()) == 5
    assert "write to an input" in emulated_cuda.cuda_last_error()


def test_what_the_kernels_do_not_take_says_why(emulated_cuda):
    from otdd.backends import BackendError

    C = torch.rand(3, 8193)
    with pytest.raises(BackendError, match="8193 columns"):
        sinkhorn(C, eps=0.1, backend="cuda")
    with pytest.raises(BackendError, match="neither schedule nor accelerate"):
        sinkhorn(C[:, :5], eps=0.1, accelerate="anderson", backend="cuda")
    emulated_cuda.set_chip(4, 8 << 10, 1)
    with pytest.raises(ValueError, match="too large for the CUDA kernels"):
        sinkhorn(C[:, :4000], eps=0.1, backend="cuda")
