"""Small problems through every CUDA kernel, for compute-sanitizer; each is compared with the CPU.

    python benchmarks/gpu_small.py [part of a name ...]

A line each: ok, wrong, or refused with the reason. Exit code 1 if one is wrong or none is ok.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from otdd import ops
from otdd.backends import BackendError
from otdd.ops.logits import logit_transport
from otdd.ops.moves import transport_moves

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {"float32": 1e-3, "float64": 1e-7}  # relative, in L1

# B, N, M; the larger ones are chosen for 132 multiprocessors of 227 KB (csrc/cuda/layout.h).
SHAPES = {
    "warp": {"float32": (5, 64, 61), "float64": (5, 29, 32)},
    "warp of narrow rows": {"float32": (3, 7, 9), "float64": (3, 7, 9)},
    "block": {"float32": (3, 70, 101), "float64": (3, 70, 101)},
    "cluster of 8": {"float32": (1, 190, 201), "float64": (1, 190, 201)},
    "cluster of 16": {"float32": (1, 700, 701), "float64": (1, 500, 501)},
    "group": {"float32": (2, 1000, 1001), "float64": (1, 1000, 1001)},
    "stream": {"float32": (1, 2900, 2901), "float64": (1, 2000, 2001)},
    "stream of many columns": {"float32": (2, 16, 20001), "float64": (2, 16, 20001)},
}
SMALL = 50_000  # elements up to which a shape goes through all options
OPTIONS = {
    "envelope": {"max_iter": 3},
    "unrolled": {"max_iter": 3, "grad": "unrolled"},
    "implicit": {"max_iter": 30, "grad": "implicit"},
    "stops by itself": {"max_iter": 100, "tol": 1e-3},
    "small eps": {"max_iter": 5, "strength": 1e-3},
    "penalties": {"max_iter": 5, "rho_a": 0.5, "rho_b": 2.0},
    "sinkd": {"max_iter": 5, "marginals": "sinkd"},
    "weights and masks": {"max_iter": 5, "weights": True},
}
LARGE = ("envelope", "unrolled", "implicit", "weights and masks")
COSTS = {  # B, N, M, D, of each kernel and tile in csrc/cuda/cost.cu
    "tiny": (1, 5, 7, 3),
    "one row": (2, 1, 90, 300),
    "one row in slices": (1, 1, 3, 200_001),
    "two rows": (1, 2, 50, 301),
    "three columns": (1, 90, 3, 2000),
    "seven rows": (2, 7, 64, 64),
    "small tiles": (2, 33, 70, 50),
    "small tiles in slices": (2, 17, 130, 1001),
    "tiles": (4, 300, 301, 20),
    "large tiles": (1, 2048, 2047, 8),
    "many features": (1, 2048, 64, 1024),
}
LOGITS = {  # B, N, K, of csrc/cuda/logits.cu
    "few classes": (2, 20, 10),
    "many classes": (1, 40, 1000),
    "classes in slices": (1, 3, 9000),
}
MOVES = {  # B, N, L, M, D, of csrc/cuda/moves.cu
    "few points": (2, 5, 2, 7, 3),
    "clusters": (2, 30, 10, 1300, 40),
    "many features": (1, 3, 0, 5, 9000),
    "many targets": (1, 1, 0, 4000, 3),
}
WHAT = ("gradient", "image")


def programs() -> Iterator[tuple[str, str]]:
    """Names of all problems, with their dtypes."""
    for dtype in DTYPES:
        for shape, sizes in SHAPES.items():
            B, N, M = sizes[dtype]
            options = OPTIONS if B * N * M <= SMALL else LARGE
            yield from ((f"{shape}, {option}", dtype) for option in options)
        yield from ((f"cost, {shape}", dtype) for shape in COSTS)
        yield from ((f"logits, {shape}", dtype) for shape in LOGITS)
        yield from ((f"{what} of moves, {shape}", dtype) for what in WHAT for shape in MOVES)


def solve(shape: str, option: str, dtype: str, device: str, backend: str) -> list[Tensor]:
    B, N, M = SHAPES[shape][dtype]
    generator = torch.Generator().manual_seed(N)
    options = dict(OPTIONS[option])
    C = torch.rand(B, N, M, generator=generator, dtype=DTYPES[dtype])
    a = b = None
    if options.pop("weights", False):
        a, b = (torch.rand(B, n, generator=generator, dtype=C.dtype) for n in (N, M))
        a[:, N // 2], b[:, 1] = 0, 0
        a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    C, a, b = (None if t is None else t.to(device).requires_grad_() for t in (C, a, b))
    eps = options.pop("strength", 0.1)
    result = ops.sinkhorn(C, a, b, eps=eps, **options, backend=backend)
    leaves = [t for t in (C, a, b) if t is not None]
    gradients = torch.autograd.grad(result.value.sum() + result.cost.sum(), leaves)
    return [result.value, result.cost, result.plan, *gradients]


def cost(shape: str, dtype: str, device: str, backend: str) -> list[Tensor]:
    B, N, M, D = COSTS[shape]
    generator = torch.Generator().manual_seed(D)
    x, y = (torch.randn(B, n, D, generator=generator, dtype=DTYPES[dtype]) for n in (N, M))
    G = torch.randn(B, N, M, generator=generator, dtype=x.dtype)
    x, y = (t.to(device).requires_grad_() for t in (x, y))
    C = ops.cost_matrix(x, y, "l1", backend=backend)
    squares = ops.cost_matrix(x.detach(), y.detach(), "sqeuclidean", backend=backend)
    return [C, squares, *torch.autograd.grad(C, (x, y), G.to(device))]


def logits(shape: str, dtype: str, device: str, backend: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        torch.randn(LOGITS[shape], generator=generator, dtype=DTYPES[dtype]).to(device)
        for _ in range(2)
    )
    student.requires_grad_()
    options = {"tau": 2.0, "eps": 0.1, "max_iter": 3, "sinkd": False}
    value = logit_transport(student, teacher, **options, backend=backend)
    return [value, *torch.autograd.grad(value.sum(), student)]


def moves(what: str, shape: str, dtype: str, device: str, backend: str) -> list[Tensor]:
    B, N, L, M, D = MOVES[shape]
    generator = torch.Generator().manual_seed(D)
    x, y, given = (
        torch.randn(B, *n, generator=generator, dtype=DTYPES[dtype])
        for n in ((N, D), (M, D), (L, M))
    )
    given = D + given if L else None
    a, b = (torch.rand(B, n, generator=generator, dtype=x.dtype) for n in (N + L, M))
    b[:, 1] = 0
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    x, y, a, b, given = (None if t is None else t.to(device) for t in (x, y, a, b, given))
    options = {"lambda_1": 0.5, "metric": "l1", "max_iter": 3, "gradient": what == "gradient"}
    result = transport_moves(x, y, a, b, **options, given=given, backend=backend)
    return [result.of_x, result.f, result.g, result.eps]


def run(name: str, dtype: str, device: str, backend: str) -> list[Tensor]:
    shape, option = name.rsplit(", ", 1)
    if shape == "cost":
        return cost(option, dtype, device, backend)
    if shape == "logits":
        return logits(option, dtype, device, backend)
    if shape.endswith(" of moves"):
        return moves(shape.split()[0], option, dtype, device, backend)
    return solve(shape, option, dtype, device, backend)


def check(name: str, dtype: str, device: str = "cuda", backend: str = "cuda") -> str:
    """Compares a problem on `device` with the reference on the CPU: a line of how it went."""
    try:
        got = run(name, dtype, device, backend)
    except (BackendError, NotImplementedError) as error:
        return f"refused: {name}, {dtype}: {error}"
    except Exception as error:
        return f"wrong: {name}, {dtype}: {type(error).__name__}: {error}"
    want = run(name, dtype, "cpu", "reference")
    errors = [
        ((g.cpu() - w).abs().sum() / w.abs().sum()).item() for g, w in zip(got, want, strict=True)
    ]
    good = all(error <= TOLERANCE[dtype] for error in errors)
    return f"{'ok' if good else 'wrong'}: {name}, {dtype}: errors {errors}"


def main() -> None:
    wanted = sys.argv[1:] or [""]
    lines = []
    for name, dtype in programs():
        if any(part in name for part in wanted):
            lines.append(check(name, dtype))
            print(lines[-1], flush=True)
    good, wrong = (sum(line.startswith(start) for line in lines) for start in ("ok", "wrong"))
    raise SystemExit(1 if wrong or not good else 0)


if __name__ == "__main__":
    main()
