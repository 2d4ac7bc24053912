"""What a contender is, and the two ways in which PyTorch code becomes one.

A contender is built for a case outside the timing, with inputs in its own array type, and returns
a function without arguments. Each is asked for iterations, costs and values of our conventions:
``KL(P | a x b)``, the full squared distance, rows first. What it cannot do is `Unsupported`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cases import Case, Data
from torch import Tensor

MEMORY = 6e9  # bytes that one contender may take

DISAGREES = "disagrees with the oracle"
ROWS_MET = "envelope, rows met"  # each row of the plan is scaled to its weight

Output = tuple[object, list]
Run = Callable[[], Output]


class Solution(NamedTuple):
    """Rows `references.some_rows` of a contender's own plan, and which of otdd's backends it is."""

    plan: Tensor
    backend: str = ""


class Unsupported(Exception):
    """Why a contender has no figure for a case."""


@dataclass(frozen=True)
class Contender:
    """One way to do the cases.

    Attributes:
        name: As in the tables.
        module: What has to be installed.
        build: ``(case, data, direction, iterations) -> run``; ``run()`` is timed and returns the
            result and the gradients (none for ``forward``).
        read: Brings the result of `run` to float64 tensors and our conventions, untimed.
        safe: Whether it works in the log domain, so that no ratio of cost to eps makes it fail.
        gradient: Which derivative it takes: ``envelope``, ``unrolled``, or `ROWS_MET`.
        same_iterates: Whether its t-th iterate is that of the specification. Others are compared
            with the oracle where both have converged.
        compiles: Whether its first call for a shape, or number of iterations, compiles.
        primal: Whether its value is that of the plan, not the dual one; equal at convergence.
        solution: ``(case, data, iterations)`` -> rows of the plan it ends with; None: not told.
        products: How many products of TF32 one of its own is worth: 3 for the digits of float32.
    """

    name: str
    module: str
    build: Callable[[Case, Data, str, int], Run]
    read: Callable[[Case, Data, Output], tuple[Tensor, list[Tensor]]]
    safe: bool = True
    gradient: str = "envelope"
    same_iterates: bool = True
    compiles: bool = False
    primal: bool = False
    solution: Callable[[Case, Data, int], Solution] | None = None
    products: int = 3

    def missing(self) -> str | None:
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def refuse(condition: bool, reason: str) -> None:
    if condition:
        raise Unsupported(reason)


def refuse_graph(case: Case, data: Data, arrays: int) -> None:
    size = arrays * case.B * case.N * case.M * data.a.element_size()
    refuse(size > MEMORY, f"its graph would take {size / 1e9:.0f} GB")


def read_torch(case: Case, data: Data, output: Output) -> tuple[Tensor, list[Tensor]]:
    value, gradients = output
    return value.detach().double(), [g.double() for g in gradients]


def leaves_of(case: Case, data: Data, direction: str) -> list[Tensor]:
    """Fresh tensors to differentiate, or the inputs themselves for a forward pass."""
    leaves = [data.leaf, data.y] if case.kind == "metric" else [data.leaf]
    return leaves if direction == "forward" else [t.clone().requires_grad_() for t in leaves]


def torch_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """The usual costs in PyTorch; squares as in the expansion, by one product."""
    if metric == "l1":
        return torch.cdist(x, y, p=1)
    xx = torch.linalg.vector_norm(x, dim=-1).square()
    yy = torch.linalg.vector_norm(y, dim=-1).square()
    return torch.baddbmm(xx.unsqueeze(-1) + yy.unsqueeze(-2), x, y.mT, alpha=-2)


def cost_of(case: Case, data: Data, leaf: Tensor, cost: Callable = torch_cost) -> Tensor:
    """The case's cost from its leaf, ``(B, N, M)``."""
    if case.kind == "given":
        return leaf
    x, y = (leaf.softmax(-1), data.y.softmax(-1)) if case.kind == "logits" else (leaf, data.y)
    C = cost(x, y, case.metric)
    return torch.cat([data.C, C], 1) if case.kind == "row" else C


def by_autograd(
    solve: Callable[[Tensor, Data, int], Tensor] | None,
    cost: Callable = torch_cost,
    loss: Callable[[Tensor, Data, int], Tensor] | None = None,
    kept: int = 0,
) -> Callable[[Case, Data, str, int], Run]:
    """A contender of which the value ``solve(C, data, iterations)`` is differentiated by autograd.

    `loss` stands for `solve` in the cases of logits. Costs alone are timed where `solve` is None.
    `kept` is how many (B, N, M) arrays the graph holds per iteration.
    """

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        refuse(case.kind == "logits" and loss is None, "does not return SinKD's loss")
        refuse((case.kind == "metric") != (solve is None), "is not for this kind of case")
        if direction != "forward":
            refuse_graph(case, data, kept * iterations)
        leaves = leaves_of(case, data, direction)
        if solve is None:
            return metric_run(case, data, direction, cost, leaves)
        function = loss if case.kind == "logits" else solve

        def run() -> Output:
            value = function(cost_of(case, data, leaves[0], cost), data, iterations)
            if direction == "forward":
                return value, []
            return value, list(torch.autograd.grad(value.sum(), leaves))

        return run

    return build


def metric_run(case: Case, data: Data, direction: str, cost: Callable, leaves: list) -> Run:
    """Cost alone, or its backward alone: the graph is made once."""
    C = cost(*leaves, case.metric)
    if direction == "forward":
        return lambda: (cost(*leaves, case.metric), [])
    return lambda: (
        C,
        list(torch.autograd.grad(C, leaves, data.seed_of_gradient, retain_graph=True)),
    )


def by_plan(
    solve: Callable[[Tensor, Data, int], tuple[Tensor, Callable[[], Tensor]]],
    like: str | None = None,
) -> Callable[[Case, Data, str, int], Run]:
    """A contender that solves without a graph and takes the plan for the gradient: the envelope.

    ``solve(C, data, iterations)`` returns the value and a function that makes the plan. `like`
    names the contender of which the forward pass is the same.
    """

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        refuse(case.kind == "metric", "is not for this kind of case")
        refuse(direction == "forward" and like is not None, f"forward is that of {like}")
        leaves = leaves_of(case, data, direction)

        def run() -> Output:
            C = cost_of(case, data, leaves[0])
            with torch.no_grad():
                value, plan = solve(C, data, iterations)
                if case.kind == "logits":
                    P = plan() * case.N
                    value = (P * C).sum((-1, -2))
                elif direction != "forward":
                    P = plan()
            if direction == "forward":
                return value, []
            if case.kind == "given":
                return value, [P]
            return value, list(torch.autograd.grad(C, leaves, P))

        return run

    return build
