"""`logit_transport`, what `OTLogitLoss` does with the plan held fixed, by every backend."""

import math

import emulated
import pytest
import torch
from references import cost_oracle, sinkd_oracle
from torch.func import grad, vmap

from otdd.losses import OTLogitLoss
from otdd.ops.logits import logit_transport
from otdd.ops.logits.cuda import logits_backward_cuda, logits_cuda

BACKENDS = ("reference", "cpu", "cuda", "triton")
OPS = torch.ops.otdd
OPTIONS = {"tau": 1.5, "eps": 0.1, "max_iter": 6, "sinkd": False}
CHIP = 4, 227 << 10, 16


def logits(*shape, dtype=torch.float64):
    """Of a student and a teacher, far enough apart that no plan is trivial."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return [(3 * torch.randn(shape, generator=generator, dtype=dtype)) for _ in range(2)]


def oracle(student, teacher, tau, eps, max_iter, sinkd):
    """Costs, and the gradient of their weighted sum, in float64."""
    leaf = student.double().requires_grad_()
    p, q = torch.softmax(leaf / tau, -1), torch.softmax(teacher.double() / tau, -1)
    C = cost_oracle(p, q, "l1")
    P = sinkd_oracle(C.detach(), eps, max_iter) / (1 if sinkd else student.shape[-2])
    cost = (P * C).sum((-1, -2))
    return cost.detach(), torch.autograd.grad(weighted(cost), leaf)[0]


def weighted(cost):
    return (cost.flatten() * torch.linspace(1, 2, cost.numel(), dtype=cost.dtype)).sum()


def run(student, teacher, backend, **options):
    leaf = student.detach().requires_grad_()
    cost = logit_transport(leaf, teacher, **(OPTIONS | options), backend=backend)
    return cost.detach(), torch.autograd.grad(weighted(cost), leaf)[0]


def assert_like(seen, want, dtype):
    digits = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for got, exact in zip(seen, want, strict=True):
        assert got.dtype == dtype
        unit = exact.abs().max().clamp_min(1e-3)  # one row is its own only target: a gradient of 0
        torch.testing.assert_close(got.double() / unit, exact / unit, rtol=0, atol=digits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sinkd", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 9), (33, 5), (20, 131), (70, 66), (9, 1100)])
def test_values_and_gradients(backend, dtype, sinkd, size):
    pair = logits(2, *size, dtype=dtype)
    options = OPTIONS | {"sinkd": sinkd}
    assert_like(run(*pair, backend, sinkd=sinkd), oracle(*pair, **options), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_strides(backend):
    student, teacher = (t.transpose(-1, -2) for t in logits(2, 3, 9, 7))
    want = oracle(student, teacher, **OPTIONS)
    assert want[0].shape == (2, 3)
    assert_like(run(student, teacher, backend), want, torch.float64)
    every_other = [t.repeat_interleave(2, -2)[..., ::2, :] for t in (student, teacher)]
    assert_like(run(*every_other, backend), want, torch.float64)
    alone = oracle(student[0, 0], teacher[0, 0], **OPTIONS)
    assert_like(run(student[0, 0], teacher[0, 0], backend), alone, torch.float64)
    empty = logit_transport(*logits(0, 3, 4), **OPTIONS, backend=backend)
    assert empty.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size(backend):
    """-inf masks a class; a difference of 1e4 leaves one."""
    student, teacher = logits(5, 6, dtype=torch.float32)
    student[:, 0] = teacher[:, 0] = -torch.inf
    student[1] *= 1e4
    seen = run(student, teacher, backend)
    assert (seen[1][:, 0] == 0).all()
    kept = oracle(student[:, 1:], teacher[:, 1:], **OPTIONS)
    assert_like((seen[0], seen[1][:, 1:]), kept, torch.float32)


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_if_widened_first(half, backend):
    student, teacher = (t.to(half) for t in logits(2, 12, 40, dtype=torch.float32))
    cost, gradient = run(student, teacher, backend)
    wide, exact = run(student.float(), teacher.float(), backend)
    assert torch.equal(cost, wide)
    assert gradient.dtype == half
    assert torch.equal(gradient, exact.to(half))
    mixed, of_mixed = run(student, teacher.float(), backend)
    assert torch.equal(mixed, wide)
    assert torch.equal(of_mixed, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(3, 2, 3), (1, 40, 300), (2, 90, 33)])
@pytest.mark.parametrize("chip", [CHIP, (132, 227 << 10, 8), (4, 30 << 10, 1)])
def test_every_order_of_threads(emulated_cuda, chip, size, dtype):
    emulated_cuda.set_chip(*chip)
    pair = logits(*size, dtype=dtype)
    seen = emulated.in_every_order(emulated_cuda, lambda: run(*pair, "cuda"))
    assert_like(seen, oracle(*pair, **OPTIONS), dtype)


@pytest.mark.parametrize(
    ("chip", "size", "most"), [(CHIP, (2, 40, 20), 3), (CHIP, (1, 3, 9000), 4)]
)
def test_launches(emulated_cuda, chip, size, most):
    """Softmaxes, costs (and the sum of slices), solve; signed sums, derivative of the softmax."""
    emulated_cuda.set_chip(*chip)
    student, teacher = logits(*size)
    student.requires_grad_()
    emulated_cuda.launches()
    cost = OTLogitLoss(backend="cuda")(student, teacher)
    assert emulated_cuda.launches() == most
    cost.backward()
    assert emulated_cuda.launches() == 2


def test_nan_stays_in_its_problem(emulated_cuda):
    student, teacher = logits(3, 8, 5)
    student[0, 2, 1] = torch.nan
    teacher[1, 0, 0] = torch.inf
    cost, *kept = logits_cuda(student, teacher, 1.0, 0.1, 5, False)
    assert cost.isnan().tolist() == [True, True, False]
    gradient = logits_backward_cuda(torch.ones(3).double(), *kept, 1.0, 0.1, False, torch.float64)
    assert gradient.isfinite().all((-1, -2)).tolist() == [False, False, True]
    assert_like(
        (cost[2:], gradient[2:]),
        oracle(student[2:], teacher[2:], 1.0, 0.1, 5, False),
        torch.float64,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_is_no_second_derivative(backend):
    student, teacher = logits(4, 3)
    leaf = student.requires_grad_()
    cost = logit_transport(leaf, teacher, **OPTIONS, backend=backend)
    (first,) = torch.autograd.grad(cost, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="plan held fixed, has no second derivative"):
        torch.autograd.grad(first.sum(), leaf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_gradients_go_through_the_iterations(backend):
    """They are the ops' one by one, in any type."""
    student, teacher = logits(6, 5)
    leaf = student.requires_grad_()
    loss = OTLogitLoss(tau=1.5, max_iter=6, grad="unrolled", backend=backend)(leaf, teacher)
    p, q = torch.softmax(leaf / 1.5, -1), torch.softmax(teacher / 1.5, -1)
    C = cost_oracle(p, q, "l1")
    want = (sinkd_oracle(C, 0.1, 6) * C).sum() / 6
    torch.testing.assert_close(loss, want)
    seen, exact = (torch.autograd.grad(t, leaf)[0] for t in (loss, want))
    torch.testing.assert_close(seen, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(backend):
    student, teacher = logits(2, 4, 5, dtype=torch.float32)
    args = student, teacher, 1.5, 0.1, 3, False, backend, backend
    torch.library.opcheck(OPS.logit_transport.default, args)
    _, *kept = OPS.logit_transport(*args)
    options = 1.5, 0.1, False, torch.float32, backend, backend
    torch.library.opcheck(OPS.logit_transport_backward.default, (torch.ones(2), *kept, *options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_a_batch(backend):
    student, teacher = logits(3, 5, 4)
    want = oracle(student, teacher, **OPTIONS)

    def cost(student, teacher):
        return logit_transport(student, teacher, **OPTIONS, backend=backend)

    seen = vmap(cost)(student, teacher)
    torch.testing.assert_close(seen, want[0])
    gradient = vmap(grad(cost))(student, teacher)
    scale = torch.linspace(1, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(gradient * scale[:, None, None], want[1])
