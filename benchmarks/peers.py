"""The contenders: otdd, plain PyTorch, and the libraries of `libraries`."""

import functools
from collections.abc import Callable

import torch
from cases import Case, Data
from contender import (
    Contender,
    Output,
    Run,
    Unsupported,
    by_autograd,
    by_plan,
    leaves_of,
    read_torch,
    refuse,
)
from libraries import LIBRARIES
from references import sinkd_oracle, torch_loop
from torch import Tensor

# otdd ---------------------------------------------------------------------------------------------


def otdd_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    from otdd.ops import cost_matrix

    return cost_matrix(x, y, metric)


def otdd_by(grad: str) -> Callable[[Case, Data, str, int], Run]:
    """Cost and solve; clouds whose cost is not to be stored go to `sinkhorn_points`."""

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        if grad == "unrolled":
            refuse(direction == "forward", "forward is that of otdd")
            refuse(case.kind == "metric", "is not for this kind of case")
            refuse(not case.stored, "the gradient through the iterations needs the cost")
        if not case.stored:
            return otdd_points(case, data, direction, iterations)
        solve = None if case.kind == "metric" else otdd_value(grad)
        contender = by_autograd(solve, otdd_cost, otdd_loss(grad))
        return contender(case, data, direction, iterations)

    return build


def otdd_tiles(case: Case, data: Data, direction: str, iterations: int) -> Run:
    refuse(case.kind != "points" or case.metric != "sqeuclidean", "is for squared distances")
    refuse(not case.stored, "is timed as otdd")
    return otdd_points(case, data, direction, iterations)


def otdd_points(case: Case, data: Data, direction: str, iterations: int) -> Run:
    from otdd import ops

    leaf = leaves_of(case, data, direction)[0]
    options = {"metric": case.metric, "eps": data.eps, "max_iter": iterations}

    def run() -> Output:
        value = ops.sinkhorn_points(leaf, data.y, data.a, data.b, **options).value
        if direction == "forward":
            return value, []
        return value, list(torch.autograd.grad(value.sum(), leaf))

    return run


def otdd_value(grad: str) -> Callable[[Tensor, Data, int], Tensor]:
    def value(C: Tensor, data: Data, iterations: int) -> Tensor:
        from otdd.ops import sinkhorn

        return sinkhorn(C, data.a, data.b, eps=data.eps, max_iter=iterations, grad=grad).value

    return value


def otdd_loss(grad: str) -> Callable[[Tensor, Data, int], Tensor]:
    def loss(C: Tensor, data: Data, iterations: int) -> Tensor:
        from otdd.ops import sinkhorn

        options = {"grad": grad, "marginals": "sinkd"}
        return sinkhorn(C, eps=data.eps, max_iter=iterations, **options).cost

    return loss


# PyTorch ------------------------------------------------------------------------------------------


def torch_unrolled(C: Tensor, data: Data, iterations: int) -> Tensor:
    f, g = torch_loop(C, data.a, data.b, data.eps, iterations)
    return (data.a * f).sum(-1) + (data.b * g).sum(-1)


def torch_unrolled_loss(C: Tensor, data: Data, iterations: int) -> Tensor:
    f, g = torch_loop(C, data.a, data.b, data.eps, iterations)
    return C.shape[-2] * (solved(C, f, g, data)[1]() * C).sum((-1, -2))


def sinkd_loss(C: Tensor, data: Data, iterations: int) -> Tensor:
    return (sinkd_oracle(C, data.eps, iterations) * C).sum((-1, -2))


def only_logits(C: Tensor, data: Data, iterations: int) -> Tensor:
    raise Unsupported("is a loss of logits")


def solved(C: Tensor, f: Tensor, g: Tensor, data: Data) -> tuple[Tensor, Callable[[], Tensor]]:
    value = (data.a * f).sum(-1) + (data.b * g).sum(-1)

    def plan() -> Tensor:
        u, v = data.a.log() + f / data.eps, data.b.log() + g / data.eps
        return torch.exp(u.unsqueeze(-1) + v.unsqueeze(-2) - C / data.eps)

    return value, plan


def torch_envelope(C: Tensor, data: Data, iterations: int) -> tuple[Tensor, Callable[[], Tensor]]:
    return solved(C, *torch_loop(C, data.a, data.b, data.eps, iterations), data)


def step(C: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    f = -eps * torch.logsumexp((log_b + g / eps).unsqueeze(-2) - C / eps, -1)
    return f, -eps * torch.logsumexp((log_a + f / eps).unsqueeze(-1) - C / eps, -2)


@functools.cache
def compiled_step() -> Callable:
    torch._dynamo.config.recompile_limit = 1000  # each shape gets code of its own
    return torch.compile(step, dynamic=False)


def compiled_loop(C: Tensor, data: Data, iterations: int) -> tuple[Tensor, Tensor]:
    body, eps = compiled_step(), C.new_full((), data.eps)
    log_a, log_b, g = data.a.log(), data.b.log(), torch.zeros_like(data.b)
    for _ in range(iterations):
        f, g = body(C, g, log_a, log_b, eps)
    return f, g


def compiled_envelope(
    C: Tensor, data: Data, iterations: int
) -> tuple[Tensor, Callable[[], Tensor]]:
    return solved(C, *compiled_loop(C, data, iterations), data)


CONTENDERS = [
    Contender("otdd", "otdd", otdd_by("envelope"), read_torch),
    Contender("otdd, unrolled", "otdd", otdd_by("unrolled"), read_torch, gradient="unrolled"),
    Contender("otdd, sinkhorn_points", "otdd", otdd_tiles, read_torch),
    Contender("torch.cdist", "torch", by_autograd(None), read_torch),
    Contender(
        "torch loop",
        "torch",
        by_autograd(torch_unrolled, loss=torch_unrolled_loss, kept=2),
        read_torch,
        gradient="unrolled",
    ),
    Contender("torch loop, envelope", "torch", by_plan(torch_envelope, "torch loop"), read_torch),
    Contender(
        "torch.compile, envelope", "torch", by_plan(compiled_envelope), read_torch, compiles=True
    ),
    Contender(
        "SinKD code",
        "torch",
        by_autograd(only_logits, loss=sinkd_loss),
        read_torch,
        safe=False,
        gradient="unrolled",
    ),
    *LIBRARIES,
]
