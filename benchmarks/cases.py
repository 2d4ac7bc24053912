"""What is measured: cases with their inputs, the least work each needs, and its float64 oracle."""

from dataclasses import dataclass, replace

import torch
from references import cost_oracle, sinkd_oracle, sinkhorn_oracle
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64}
EPS = 0.1  # of the standard deviation of the cost; for logits as it is, as in SinKD's own code


@dataclass(frozen=True)
class Case:
    """B problems of N x M, given as costs or as points of dimension D.

    ``kind`` is what goes in and comes out: ``given`` cost -> value; ``points`` x, y -> value;
    ``row`` a new point and the cached rows of the others -> value; ``logits`` -> SinKD's loss;
    ``metric`` x, y -> cost. The gradient is with respect to the cost, x, the new point, the first
    logits, and both x and y.
    """

    name: str
    kind: str
    B: int
    N: int
    M: int
    D: int = 0
    metric: str = ""
    iterations: int = 50
    masked: bool = False
    stored: bool = True
    dtypes: tuple[str, ...] = tuple(DTYPES)
    directions: tuple[str, ...] = ("forward+backward",)


BOTH = ("forward", "forward+backward")
CASES = [
    Case("small", "given", 64, 64, 64, directions=BOTH),
    Case("tiny", "given", 4096, 16, 16, directions=BOTH),
    Case("ragged", "given", 64, 64, 64, masked=True, directions=BOTH),
    Case("logits-128", "logits", 1, 128, 128, 1000, "l1", iterations=10),
    Case("logits-1024", "logits", 1, 1024, 1024, 1000, "l1", iterations=10),
    Case("classes-l1", "points", 10, 50, 1300, 4096, "l1"),
    Case("classes-sqeuclidean", "points", 10, 50, 1300, 4096, "sqeuclidean"),
    Case("incremental", "row", 1, 64, 1300, 4096, "l1", iterations=20),
    Case("points-2048", "points", 1, 2048, 2048, 64, "sqeuclidean", directions=BOTH),
    Case(
        "points-10000", "points", 1, 10000, 10000, 3, "sqeuclidean",
        stored=False, dtypes=("float32",), directions=BOTH,
    ),
    Case("overhead", "given", 1, 8, 8, iterations=10),
]  # fmt: skip
ALONE = {"iterations": 1, "directions": ("forward", "backward")}
CASES += [
    Case("cost-1024", "metric", 1, 1024, 1024, 1000, "l1", **ALONE),
    Case("cost-50x1300", "metric", 1, 50, 1300, 4096, "l1", **ALONE),
]
SCALING = {"iterations": 20, "dtypes": ("float32",), "directions": ("forward",)}
CASES += [
    Case(f"scaling-{n}", "given", 1, n, n, **SCALING)
    for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192)
]


@dataclass(frozen=True)
class Data:
    """Inputs of a case as torch tensors, on the CPU and contiguous; what a case lacks is None."""

    C: Tensor | None
    x: Tensor | None
    y: Tensor | None
    a: Tensor
    b: Tensor
    eps: float
    seed_of_gradient: Tensor | None = None

    @property
    def leaf(self) -> Tensor:
        return self.C if self.x is None else self.x

    def to(self, dtype: torch.dtype) -> "Data":
        moved = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def make(case: Case, dtype: torch.dtype) -> Data:
    """Inputs from a fixed seed, the same numbers in every process."""
    B, N, M = case.B, case.N, case.M
    generator = torch.Generator().manual_seed(7 * N + M)
    C = x = y = G = None
    a, b = torch.full((B, N), 1 / N, dtype=dtype), torch.full((B, M), 1 / M, dtype=dtype)
    if case.masked:
        a, b = (_masked(w, generator) for w in (a, b))
    if case.kind == "given":
        C = torch.rand(B, N, M, generator=generator, dtype=dtype)
        deviation = C[: max(1, 2**20 // (N * M))].std().item()
        return Data(C, x, y, a, b, EPS * deviation)
    rows = 1 if case.kind == "row" else N
    x = torch.randn(B, rows, case.D, generator=generator, dtype=dtype)
    y = 0.2 + torch.randn(B, M, case.D, generator=generator, dtype=dtype)
    if case.kind == "row":
        cached = torch.randn(B, N - 1, case.D, generator=generator, dtype=dtype)
        C = oracle_cost(cached, y, case.metric).to(dtype)
    if case.kind == "metric":
        G = torch.randn(B, N, M, generator=generator, dtype=dtype)
    if case.kind == "logits":
        return Data(C, x, y, a, b, EPS)
    deviation = oracle_cost(x[:1, :8].double(), y[:1, :200].double(), case.metric).std().item()
    return Data(C, x, y, a, b, EPS * deviation, G)


def _masked(w: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of problems that keep only a quarter to all of their points."""
    n = w.shape[-1]
    kept = torch.randint(n // 4, n + 1, (w.shape[0], 1), generator=generator)
    w = torch.where(torch.arange(n) < kept, w, 0)
    return w / w.sum(-1, keepdim=True)


def part(case: Case, elements: int = 2**18, products: int = 2**27) -> Case:
    """`case`, cut until its oracle takes about a second: fewer problems, then fewer points."""
    B, N, M = case.B, case.N, case.M
    while elements < B * N * M or products < B * N * M * case.D:
        if B > 1:
            B //= 2
        elif N == M:  # SinKD's loss is of square ones
            N, M = N // 2, M // 2
        elif N > M:
            N //= 2
        else:
            M //= 2
    return replace(case, B=B, N=N, M=M)


def oracle_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """`cost_oracle` row by row: it makes (N, M, D) differences."""
    rows = [cost_oracle(x[:, i : i + 1], y, metric) for i in range(x.shape[1])]
    return torch.cat(rows, 1)


def oracle(
    case: Case, data: Data, iterations: int, gradient: str, primal: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The case's result and gradients in float64.

    `gradient` is ``unrolled`` (autograd through the iterations) or ``envelope`` (plan held fixed).
    The value is the dual one, or with `primal` ``<P, C> + eps KL(P | a x b)`` = ``<P, f + g>``.
    """
    data = data.to(torch.float64)
    leaves = [data.leaf.clone().requires_grad_()]
    if case.kind == "metric":
        leaves.append(data.y.clone().requires_grad_())
        C = oracle_cost(*leaves, case.metric)
        gradients = torch.autograd.grad(C, leaves, data.seed_of_gradient)
        return C.detach(), list(gradients)
    if case.kind == "given":
        C = leaves[0]
    else:
        p, q = leaves[0], data.y
        p, q = (p.softmax(-1), q.softmax(-1)) if case.kind == "logits" else (p, q)
        C = oracle_cost(p, q, case.metric)
        C = C if data.C is None or case.kind == "given" else torch.cat([data.C, C], 1)
    held = C.detach() if gradient == "envelope" else C
    if case.kind == "logits":
        P = sinkd_oracle(held, data.eps, iterations)
        value = loss = (P * C).sum((-1, -2))
    else:
        solved = sinkhorn_oracle(held, data.a, data.b, eps=data.eps, max_iter=iterations)
        value = loss = solved["value"]
        if gradient == "envelope":
            loss = (solved["plan"] * C).sum((-1, -2))
        if primal:
            potentials = solved["f"].unsqueeze(-1) + solved["g"].unsqueeze(-2)
            value = (solved["plan"] * potentials).sum((-1, -2))
    return value.detach(), list(torch.autograd.grad(loss.sum(), leaves))


@dataclass(frozen=True)
class Work:
    """The least that has to be done: bytes moved, flops of matrix products, multiply-adds, exps.

    Other vector instructions count as half a multiply-add where there are more of them than
    multiply-adds: processors begin two in a cycle, and additions and logic run beside
    multiplications. The footprint is what the bytes moved are spread over.
    """

    bytes: float
    gemm: float
    fmas: float
    exps: float
    footprint: float


def work(case: Case, direction: str, itemsize: int, cache: int) -> Work:
    """The least work of `case`; `cache` is what one core keeps close, in bytes.

    A solve needs one exp and, per iteration, two multiply-adds an element. It reads the costs
    once, or in every iteration if one problem's costs exceed the cache; if they are not to be
    stored, it makes them again in each, cost and exp. A gradient is one pass more; that of L1 takes
    a difference, its sign and a multiply-add for each side, its cost a difference, its magnitude
    and a sum.
    """
    B, N, M, D, T = case.B, case.N, case.M, case.D, case.iterations
    new, size = (B * M if case.kind == "row" else B * N * M), B * N * M
    backward, alone = direction != "forward", case.kind == "metric"
    sides = (2 if alone else 1) if backward else 0
    times = 1 if case.stored else T
    costs = 0 if alone and backward else times
    if case.metric == "sqeuclidean":
        gemm, fmas = 2 * new * D * (costs + sides), 0
    else:
        gemm, fmas = 0, new * D * (1.5 * costs + (1 + sides / 2 if sides else 0))
    points = (B * N + B * M) * D * itemsize if D else 0
    passes = 1 + sides
    moved = points * passes + (size * itemsize * passes if case.stored else 0)
    footprint, exps = moved, 0
    if not alone:
        exps = size * times
        fmas += 2 * size * T + 2 * size * sides
        if case.stored and N * M * itemsize > cache:
            moved += size * itemsize * (T - 1)
    return Work(moved, gemm, fmas, exps, footprint)
