"""The contenders of the GPU benchmark: those of the CPU's that run there, and CUDA graphs of them.

Everything follows the device of its inputs, so that all but the graphs is tested on the CPU.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import peers
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
from torch import Tensor


@contextmanager
def refusals():
    """What a backend that is asked for refuses, as a contender's reason."""
    from otdd.backends import BackendError

    try:
        yield
    except BackendError as error:
        raise Unsupported(str(error)) from error


def otdd_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """By the kernels of the device."""
    from otdd.ops import cost_matrix

    return cost_matrix(x, y, metric, backend=x.device.type)


def otdd(grad: str, backend: str | None = None) -> Callable[[Case, Data, str, int], Run]:
    """The op by the kernels of the device, or by `backend`; costs on the way as in `otdd_cost`."""

    def value(C: Tensor, data: Data, iterations: int) -> Tensor:
        from otdd.ops import sinkhorn

        options = {"eps": data.eps, "max_iter": iterations, "grad": grad}
        with refusals():
            return sinkhorn(C, data.a, data.b, **options, backend=backend or C.device.type).value

    def loss(C: Tensor, data: Data, iterations: int) -> Tensor:
        from otdd.ops import sinkhorn

        options = {"eps": data.eps, "max_iter": iterations, "grad": grad, "marginals": "sinkd"}
        with refusals():
            return sinkhorn(C, **options, backend=backend or C.device.type).cost

    def cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
        from otdd.ops import cost_matrix

        with refusals():
            return cost_matrix(x, y, metric, backend=backend)

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        if grad == "unrolled":
            refuse(direction == "forward", "forward is that of otdd")
            refuse(case.kind == "metric", "is not for this kind of case")
        if case.kind == "metric":
            made = otdd_cost if backend is None else cost
            return by_autograd(None, made)(case, data, direction, iterations)
        return by_autograd(value, otdd_cost, loss)(case, data, direction, iterations)

    return build


def one_call(case: Case, data: Data, direction: str, iterations: int) -> Run:
    """What `OTLogitLoss` runs: softmaxes, costs and solve in one op, the gradient in another."""
    from otdd.ops.logits import logit_transport

    refuse(case.kind != "logits", "is for logits")
    leaf = leaves_of(case, data, direction)[0]
    options = {"tau": 1.0, "eps": data.eps, "max_iter": iterations, "sinkd": True}

    def run() -> Output:
        with refusals():
            cost = logit_transport(leaf, data.y, **options, backend=leaf.device.type)
        if direction == "forward":
            return cost, []
        return cost, list(torch.autograd.grad(cost.sum(), leaf))

    return run


def compiled_value(C: Tensor, data: Data, iterations: int) -> Tensor:
    return peers.solved(C, *peers.compiled_loop(C, data, iterations), data)[0]


def compiled_loss(C: Tensor, data: Data, iterations: int) -> Tensor:
    plan = peers.solved(C, *peers.compiled_loop(C, data, iterations), data)[1]()
    return C.shape[-2] * (plan * C).sum((-1, -2))


def flash_loss(data: Data, iterations: int, allow_tf32: bool, **options) -> Callable:
    """Its alternating solver at one eps, whose iterates are ours."""
    from flash_sinkhorn import SamplesLoss

    return SamplesLoss(
        "sinkhorn", backend="alternating", use_epsilon_scaling=False, eps=data.eps,
        n_iters=iterations, debias=False, normalize=False, allow_tf32=allow_tf32, **options,
    )  # fmt: skip


def flash(allow_tf32: bool) -> Callable[[Case, Data, str, int], Run]:
    """A loop over problems, as its own is."""

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        clouds = case.kind == "points" and case.metric == "sqeuclidean"
        refuse(not clouds, "takes points under the squared distance alone: no given cost, no L1")
        loss = flash_loss(data, iterations, allow_tf32)
        leaf = leaves_of(case, data, direction)[0]

        def run() -> Output:
            problems = zip(data.a, leaf, data.b, data.y, strict=True)
            value = torch.stack([loss(*problem).squeeze() for problem in problems])
            gradients = [] if direction == "forward" else torch.autograd.grad(value.sum(), leaf)
            return value, list(gradients)

        return run

    return build


_pool: tuple[int, int] | None = None


def new_pool() -> None:
    """For the graphs captured from now on: they share memory, as no two of them run at a time."""
    global _pool
    _pool = torch.cuda.graph_pool_handle()


def captured(run: Run) -> Run:
    """A replay of `run` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool):
        output = run()

    def replay() -> Output:
        graph.replay()
        return output

    return replay


def graphed(contender: Contender) -> Contender:
    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        return captured(contender.build(case, data, direction, iterations))

    return replace(contender, name=f"{contender.name}, graph", build=build)


def torch_contender(name: str, build: Callable, gradient: str = "unrolled") -> Contender:
    return Contender(name, "torch", build, read_torch, gradient=gradient)


EAGER = [
    Contender("otdd", "otdd", otdd("envelope"), read_torch),
    Contender("otdd, unrolled", "otdd", otdd("unrolled"), read_torch, gradient="unrolled"),
    Contender("otdd, one call", "otdd", one_call, read_torch),
    Contender("otdd, triton", "otdd", otdd("envelope", "triton"), read_torch),
    Contender(
        "otdd, triton, unrolled",
        "otdd",
        otdd("unrolled", "triton"),
        read_torch,
        gradient="unrolled",
    ),
    torch_contender("torch.cdist", by_autograd(None)),
    torch_contender(
        "torch loop", by_autograd(peers.torch_unrolled, loss=peers.torch_unrolled_loss, kept=2)
    ),
    torch_contender(
        "torch loop, envelope", by_plan(peers.torch_envelope, "torch loop"), "envelope"
    ),
    torch_contender("torch.compile", by_autograd(compiled_value, loss=compiled_loss, kept=2)),
    torch_contender(
        "torch.compile, envelope", by_plan(peers.compiled_envelope, "torch.compile"), "envelope"
    ),
]
OF_LIBRARIES = (
    "POT log, detach",
    "POT log, envelope",
    "POT solve_sample_batch",
    "geomloss SamplesLoss",
)
FLASH = {"module": "flash_sinkhorn", "read": read_torch, "same_iterates": False}
CONTENDERS = [
    *EAGER,
    *(contender for contender in LIBRARIES if contender.name in OF_LIBRARIES),
    Contender("flash-sinkhorn", build=flash(False), **FLASH),
    Contender("flash-sinkhorn, TF32", build=flash(True), **FLASH),
    *map(graphed, EAGER),
]
