"""The cases of the GPU benchmark, and their float64 oracle at full size on the device itself."""

from dataclasses import replace

import cases
import torch
from cases import ALONE, BOTH, Case, Data
from references import cost_oracle, sinkd_oracle
from torch import Tensor

F32 = {"dtypes": ("float32",)}
CASES = [
    Case("small-64", "given", 64, 64, 64, **F32, directions=BOTH),
    Case("small-512", "given", 512, 64, 64, directions=BOTH),
    Case("small-8192", "given", 8192, 64, 64, **F32, directions=BOTH),
    Case("tiny", "given", 4096, 16, 16, **F32, directions=BOTH),
    Case("one-2048", "given", 1, 2048, 2048, **F32, directions=BOTH),
    Case("classes-l1", "points", 64, 64, 1300, 4096, "l1", **F32),
    Case("logits-1024", "logits", 1, 1024, 1024, 1000, "l1", iterations=10, **F32),
    Case("points-2048", "points", 1, 2048, 2048, 64, "sqeuclidean", **F32),
    Case("cost-1024", "metric", 1, 1024, 1024, 1000, "l1", **F32, **ALONE),
    Case("cost-64x1300", "metric", 64, 64, 1300, 4096, "l1", **F32, **ALONE),
]
MOST_SETS = 64
GRAPH = 8e9  # bytes that the graph of an oracle may take


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Data:
    """The inputs of `cases.make`, on `device`."""
    return moved(cases.make(case, dtype), lambda t: t.to(device))


def moved(data: Data, move) -> Data:
    return replace(data, **{k: move(t) for k, t in vars(data).items() if isinstance(t, Tensor)})


def input_bytes(data: Data) -> int:
    return sum(t.nbytes for t in vars(data).values() if isinstance(t, Tensor))


def sets(data: Data, cache: int) -> list[Data]:
    """Copies of the inputs to go round, so many that a cache of that size never holds the next."""
    count = min(max(-(-2 * cache // input_bytes(data)), 1), MOST_SETS)
    return [data, *(moved(data, torch.clone) for _ in range(count - 1))]


def oracle(
    case: Case, data: Data, iterations: int, gradient: str, primal: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """What `cases.oracle` returns, by some problems, and some rows of the costs, at a time."""
    data = data.to(torch.float64)
    x, y = data.x, data.y
    if case.kind == "given":
        return solved(case, data, iterations, gradient, primal)
    if case.kind == "logits":
        x, y = x.softmax(-1), y.softmax(-1)
    C = cases.oracle_cost(x, y, case.metric)
    if case.kind == "metric":
        return C, [*cost_gradients(x, y, case.metric, data.seed_of_gradient)]
    if case.kind == "logits":
        value, (dC,) = sinkd(C, data.eps, iterations, gradient)
        leaf = data.x.requires_grad_()
        dx, _ = cost_gradients(x, y, case.metric, dC)
        return value, list(torch.autograd.grad(leaf.softmax(-1), leaf, dx))
    value, (dC,) = solved(case, replace(data, C=C, x=None), iterations, gradient, primal)
    return value, [cost_gradients(x, y, case.metric, dC)[0]]


def solved(
    case: Case, data: Data, iterations: int, gradient: str, primal: bool
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradient of the costs."""
    each = 64.0 * case.N * case.M * (iterations if gradient == "unrolled" else 2)
    step = max(int(GRAPH / each), 1)
    values, gradients = [], []
    for k in range(0, case.B, step):
        part = slice(k, k + step)
        piece = Data(data.C[part], None, None, data.a[part], data.b[part], data.eps)
        alike = replace(case, kind="given", B=len(piece.a))
        value, (dC,) = cases.oracle(alike, piece, iterations, gradient, primal)
        values.append(value)
        gradients.append(dC)
    return torch.cat(values), [torch.cat(gradients)]


def sinkd(C: Tensor, eps: float, iterations: int, gradient: str) -> tuple[Tensor, list[Tensor]]:
    C = C.requires_grad_()
    P = sinkd_oracle(C.detach() if gradient == "envelope" else C, eps, iterations)
    value = (P * C).sum((-1, -2))
    return value.detach(), list(torch.autograd.grad(value.sum(), C))


def cost_gradients(x: Tensor, y: Tensor, metric: str, dC: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and y, by autograd through the differences of one row after the other."""
    dx, dy = [], torch.zeros_like(y)
    y = y.detach().requires_grad_()
    for i in range(x.shape[1]):
        row = x[:, i : i + 1].detach().requires_grad_()
        by_x, by_y = torch.autograd.grad(cost_oracle(row, y, metric), (row, y), dC[:, i : i + 1])
        dx.append(by_x)
        dy += by_y
    return torch.cat(dx, 1), dy
