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
    Case("logits-128", "logits", 1, 128, 128, 1000, "l1", iterations=10, **F32),
    Case("logits-1024", "logits", 1, 1024, 1024, 1000, "l1", iterations=10, **F32),
    Case("points-2048", "points", 1, 2048, 2048, 64, "sqeuclidean", **F32),
    Case("cost-1024", "metric", 1, 1024, 1024, 1000, "l1", **F32, **ALONE),
    Case("cost-64x1300", "metric", 64, 64, 1300, 4096, "l1", **F32, **ALONE),
]


def clouds(B: int, N: int, D: int) -> Case:
    """Two clouds of N points of dimension D; where an iteration says enough, few of them."""
    name = f"clouds-{N}-d{D}" if B == 1 else f"clouds-{B}x{N}-d{D}"
    options = {"iterations": 10 if N >= 2**16 else 50, "stored": False, "directions": BOTH}
    return Case(name, "points", B, N, N, D, "sqeuclidean", **options, **F32)


CLOUDS = [clouds(1, N, D) for N in (2048, 4096, 16384, 65536) for D in (3, 64, 512, 1024)]
CLOUDS.append(clouds(64, 1024, 64))
CASES += CLOUDS

# Of the clouds, the rows that are measured without being asked for by name: what 8 minutes allow.
UNASKED = [
    ("clouds-2048-d64", "forward"),
    ("clouds-65536-d3", "forward"),
    ("clouds-64x1024-d64", "forward"),
    ("clouds-2048-d3", "forward+backward"),
    ("clouds-2048-d64", "forward+backward"),
    ("clouds-2048-d512", "forward+backward"),
    ("clouds-2048-d1024", "forward+backward"),
    ("clouds-4096-d64", "forward+backward"),
    ("clouds-16384-d3", "forward+backward"),
    ("clouds-16384-d64", "forward+backward"),
    ("clouds-16384-d512", "forward+backward"),
    ("clouds-65536-d3", "forward+backward"),
    ("clouds-64x1024-d64", "forward+backward"),
]
MOST_SETS = 64
SETS_OF_CLOUDS = 4  # they are read in every iteration, so that they are in the cache anyway
GRAPH = 8e9  # bytes that the graph of an oracle may take


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Data:
    """The inputs of `cases.make`, on `device`."""
    return moved(cases.make(case, dtype), lambda t: t.to(device))


def moved(data: Data, move) -> Data:
    return replace(data, **{k: move(t) for k, t in vars(data).items() if isinstance(t, Tensor)})


def input_bytes(data: Data) -> int:
    return sum(t.nbytes for t in vars(data).values() if isinstance(t, Tensor))


def sets(data: Data, cache: int, most: int = MOST_SETS) -> list[Data]:
    """Copies of the inputs to go round, so many that a cache of that size never holds the next."""
    count = min(max(-(-2 * cache // input_bytes(data)), 1), most)
    return [data, *(moved(data, torch.clone) for _ in range(count - 1))]


def asked_only(case: str, direction: str) -> bool:
    """Whether a row is measured only if its case is named."""
    return case in [c.name for c in CLOUDS] and (case, direction) not in UNASKED


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
