"""Solves and derivatives by every team of threads, run by the emulator in every order of threads.

A barrier that is missing shows as a result that depends on the order; a read outside the arguments,
a result written twice or never, is an error of the emulator.
"""

import math
from types import SimpleNamespace

import emulated
import pytest
import torch
from references import sinkhorn_oracle

from otdd.ops import barycentric, pointers, sinkhorn
from otdd.ops.sinkhorn.cuda import potentials_backward_cuda, sinkhorn_cuda

SHARED = 227 << 10
# Multiprocessors, bytes of shared memory, blocks of a cluster, and what a barrier takes; sizes that
# then take this team.
TEAMS = {
    "warp": (
        (4, SHARED, 16),
        [(1, 1), (3, 5), (16, 16), (17, 9), (33, 16), (33, 20), (64, 64), (5, 64)],
    ),
    "block": ((4, SHARED, 16), [(65, 3), (70, 90), (1, 300), (300, 1), (3, 600)]),
    "block just large enough": ((4, 32_600, 1), [(70, 90)]),
    "cluster": ((132, SHARED, 8), [(90, 100), (67, 129)]),
    "large cluster": ((8, 40 << 10, 16), [(150, 61), (130, 70)]),
    "group": ((4, 30 << 10, 1), [(100, 70), (66, 130)]),
    "stream across": ((8, 4 << 10, 1), [(67, 130), (5, 1700)]),
    "stream down": ((8, 4 << 10, 1), [(830, 5)]),
    "stream": ((8, 4 << 10, 1, 0.0), [(150, 150)]),  # barriers that take no time
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
    max_iter = 6 if grad == "unrolled" else 20  # converged

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
    digits *= max(1, max(size) / 300)  # of the smallest weights; float32 on the CPU misses as much
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
    C, P, eps = torch.rand(3, 4), torch.empty(3, 4), torch.ones((), dtype=torch.float64)
    f, g = torch.zeros(3), torch.zeros(4)

    def plan(P):
        return kernel(*pointers.place(C), C, f, g, None, None, 0.0, eps, None, P)

    assert plan(P) == 0
    assert torch.isfinite(P).all()
    assert plan(C) == 5
    assert "write to an input" in emulated_cuda.cuda_last_error()


def test_work_in_another_stream_or_on_another_device_is_seen(emulated_cuda, monkeypatch):
    """So all that the emulator runs is in the caller's, from kernels to cleared counters."""
    emulated_cuda.set_chip(*TEAMS["group"][0])
    C = torch.rand(TEAMS["group"][1][0])
    device, stream = emulated_cuda.place()
    for place, says in (((0, stream), "another device"), ((device, 0), "another stream")):
        monkeypatch.setattr(pointers, "place", lambda t, place=place: place)
        with pytest.raises(RuntimeError, match=says):
            sinkhorn(C, eps=0.1, max_iter=2, backend="cuda")


def test_a_kernel_is_for_the_stream_that_is_current_on_the_device_of_its_tensors(monkeypatch):
    streams = {torch.device("cuda", k): SimpleNamespace(cuda_stream=70 + k) for k in range(3)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    assert pointers.place(SimpleNamespace(device=torch.device("cuda", 2))) == (2, 72)


@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize(("team", "size"), CASES)
def test_a_batch_is_one_launch_in_each_direction(emulated_cuda, team, size, grad):
    emulated_cuda.set_chip(*TEAMS[team][0])
    C, a, b = problem(size, torch.float32, batch=5)
    C.requires_grad_()
    emulated_cuda.launches()
    result = sinkhorn(C, a, b, eps=0.1, max_iter=3, grad=grad, backend="cuda")
    assert emulated_cuda.launches() == 1
    result.value.sum().backward()
    assert emulated_cuda.launches() == 1


@pytest.mark.parametrize(
    ("team", "most"),
    [("warp", 64**2), ("block", 220**2), ("cluster", 850**2), ("group", 2400**2)],
)
def test_how_large_a_square_each_team_holds_on_an_h200(emulated_cuda, team, most):
    """As much float32 as its shared memory, less what is kept for each row and column."""
    emulated_cuda.set_chip(132, SHARED, 16)
    n = math.isqrt(most)
    order = ["warp", "block", "cluster", "group", "stream"]
    batch = 132 if team == "block" else 1  # for one problem alone a cluster is worth it earlier
    assert emulated_cuda.team(batch, n, n)[0] == team
    larger = emulated_cuda.team(batch, n + n // 8, n + n // 8)[0]
    assert order.index(larger) > order.index(team)


def test_what_the_kernels_do_not_take_says_why(emulated_cuda):
    from otdd.backends import BackendError

    for options in ({"accelerate": "anderson"}, {"schedule": 0.1}):
        with pytest.raises(BackendError, match="neither schedule nor accelerate"):
            sinkhorn(torch.rand(3, 5), eps=0.1, **options, backend="cuda")


@pytest.mark.parametrize(("team", "size"), CASES)
def test_sizes_take_the_team_of_their_name(emulated_cuda, team, size):
    emulated_cuda.set_chip(*TEAMS[team][0])
    name, down, across = emulated_cuda.team(2, *size)
    assert name == team.split()[-1 if name == "cluster" else 0]
    if name == "stream":
        assert ("down" in team, "across" in team) == (across == 1, down == 1)
        assert down * across > 1


def test_what_an_h200_holds_on_chip(emulated_cuda):
    emulated_cuda.set_chip(132, SHARED, 16)
    for batch, n, held in ((132, 231, "block"), (132, 928, "cluster"), (1, 2620, "group")):
        assert emulated_cuda.team(batch, n, n)[0] == held
        assert emulated_cuda.team(batch, n + 40, n + 40)[0] != held


@pytest.mark.parametrize(
    ("size", "dtype", "grad"),
    [
        ((16, 20_000), torch.float32, "envelope"),
        ((3, 14_001), torch.float32, "unrolled"),
        ((2, 14_000), torch.float64, "unrolled"),
        ((2, 14_000), torch.float32, "implicit"),
    ],
)
def test_more_columns_than_a_block_can_hold(emulated_cuda, size, dtype, grad):
    """Each block has its own of them; with the chip's true memory of a block."""
    emulated_cuda.set_chip(12, SHARED, 16)
    assert emulated_cuda.team(1, *size)[0] == "stream"
    tensors = problem(size, torch.float32, batch=1)

    def run(backend, dtype):
        C, a, b = (t.to(dtype, copy=True).requires_grad_() for t in tensors)
        result = sinkhorn(C, a, b, eps=0.05, max_iter=3, grad=grad, backend=backend)
        loss = result.value.sum() + result.cost.sum()
        seen = result.f, result.g, result.value, result.cost, result.marginal_error
        return (
            *(t.detach() for t in seen),
            result.plan.detach(),
            *torch.autograd.grad(loss, (C, a, b)),
        )

    digits = 1e-5 if dtype == torch.float32 else 1e-11
    for got, want in zip(run("cuda", dtype), run("reference", torch.float64), strict=True):
        unit = (
            want.abs().max().clamp_min(1e-3 if want.dim() > 1 else 1)
        )  # of value, error: the mass
        torch.testing.assert_close(got / unit, want.to(dtype) / unit, rtol=0, atol=digits)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize("team", ["warp", "block", "cluster", "group", "stream"])
def test_costs_in_half_precision_are_as_if_widened_first(emulated_cuda, team, grad, half):
    """To the bit, also where K loses columns and they are made from the costs again."""
    emulated_cuda.set_chip(*TEAMS[team][0])
    C, a, b = problem(TEAMS[team][1][-1], torch.float32)
    C = torch.cat([C, C[..., :1] + 40], -1)[..., 1:].to(half)  # rows that are not contiguous

    def run(C):
        """Results in float32, then gradients; each of one use of C: two uses add up in its type."""
        C, y = C.detach().requires_grad_(), torch.linspace(-1, 1, C.shape[-1]).unsqueeze(-1)
        result = sinkhorn(C, a, b, eps=0.02, max_iter=6, grad=grad, backend="cuda")
        f, g = result.f.detach(), result.g.detach()
        image = barycentric((f, g), y, C=C, eps=0.02, a=a, b=b, backend="cuda")
        losses = result.value.sum() + result.cost.sum(), image.sum()
        gradients = [torch.autograd.grad(loss, C)[0] for loss in losses]
        error, plan = result.marginal_error, result.plan
        return [f, g, result.value, result.cost, error, plan, image], gradients

    seen, gradients = run(C)
    expected, wide = run(C.float())
    assert all(map(torch.equal, seen, expected))
    for got, want in zip(gradients, wide, strict=True):
        assert got.dtype == half
        assert torch.equal(got, want.to(half))


def test_second_derivatives_from_half_precision(emulated_cuda):
    C = problem((9, 8), torch.float32)[0]

    def run(C):
        C = C.requires_grad_()
        value = sinkhorn(C, eps=0.2, max_iter=50, backend="cuda").value.sum()
        (first,) = torch.autograd.grad(value, C, create_graph=True)
        return torch.autograd.grad((first.float() * C.detach().float()).sum(), C)[0]

    half = C.bfloat16()
    got, want = run(half.clone()), run(half.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-4)


def test_numbers_of_half_precision(emulated_cuda):
    """Conversions of the emulator, and those by bits that the kernels have too, are torch's."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    near = torch.tensor([0.0, 1e-30, 6e-8, 2.9e-8, 3e-8, 65519.0, 65520.0, 1e30, 3.4e38, math.inf])
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        of, to = (getattr(emulated_cuda, f) for f in (f"float_of_{name}", f"{name}_of"))
        numbers = bits.to(torch.int16).view(dtype).float()
        seen = torch.tensor([of(k) for k in range(1 << 16)])
        assert torch.equal(seen.nan_to_num(7.5), numbers.nan_to_num(7.5))
        assert torch.equal(seen.isnan(), numbers.isnan())
        finite = numbers[numbers.isfinite()].sort().values
        between = torch.cat([(finite[1:] + finite[:-1]) / 2, finite * (1 + 2**-9), near, -near])
        got = torch.tensor([to(x) for x in between.tolist()], dtype=torch.int32)
        assert torch.equal(got.to(torch.int16).view(dtype), between.to(dtype))
        assert to(math.nan) & 0x7FFF > 0x7F80 - 0x400 * (name == "half")
