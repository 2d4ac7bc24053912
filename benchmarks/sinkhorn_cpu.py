"""`otdd.ops` on the CPU against the plain torch log-domain loop and torch.cdist.

    python benchmarks/sinkhorn_cpu.py --out benchmarks/results/sinkhorn_cpu.json

Each pair is timed in turn, A B A B, on one thread and on two; a time is a median and a ratio is the
median of the pairs' ratios. Agreement with the float64 oracle is checked before timing.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from references import cost_oracle, sinkhorn_oracle, torch_loop

import otdd
from otdd import backends
from otdd.ops import cost_matrix, sinkhorn

SOLVES = {
    "64 of 64x64": (64, 64, 64),
    "10 of 50x1300": (10, 50, 1300),
    "2048x2048": (1, 2048, 2048),
}
COSTS = {"1024x1024, D=1000": (1024, 1024, 1000), "50x1300, D=4096": (50, 1300, 4096)}
ITERATIONS = 50


def in_turn(ours: Callable, theirs: Callable, repeats: int) -> dict[str, float]:
    """Medians in ms, and the median ratio theirs / ours of pairs timed next to each other."""
    times = {ours: [], theirs: []}
    for function in (ours, theirs):
        function()
    for _ in range(repeats):
        for function, seen in times.items():
            start = time.perf_counter()
            function()
            seen.append((time.perf_counter() - start) * 1e3)
    pairs = zip(times[theirs], times[ours], strict=True)
    return {
        "ours_ms": round(statistics.median(times[ours]), 3),
        "theirs_ms": round(statistics.median(times[theirs]), 3),
        "ratio": round(statistics.median(t / o for t, o in pairs), 2),
    }


def solve_cases(repeats: int) -> dict[str, dict]:
    rows = {}
    for name, (B, N, M) in SOLVES.items():
        C = torch.rand(B, N, M)
        a, b = torch.full((B, N), 1 / N), torch.full((B, M), 1 / M)
        eps = 0.1 * C.std().item()
        plan = sinkhorn(C, eps=eps, max_iter=ITERATIONS, backend="cpu").plan.double()
        exact = sinkhorn_oracle(C.double(), eps=eps, max_iter=ITERATIONS)["plan"]
        error = (plan - exact).abs().sum((-1, -2)).max().item()
        if not error < 1e-5:
            raise SystemExit(f"{name}: plan differs from the float64 oracle by {error}")
        leaf = C.clone().requires_grad_()

        def ours(C=C, eps=eps):
            return sinkhorn(C, eps=eps, max_iter=ITERATIONS, backend="cpu").value

        def theirs(C=C, a=a, b=b, eps=eps):
            f, g = torch_loop(C, a, b, eps, ITERATIONS)
            return (a * f).sum(-1) + (b * g).sum(-1)

        def ours_grad(grad, leaf=leaf, eps=eps):
            result = sinkhorn(leaf, eps=eps, max_iter=ITERATIONS, grad=grad, backend="cpu")
            return torch.autograd.grad(result.value.sum(), leaf)

        def theirs_grad(leaf=leaf, theirs=theirs):
            return torch.autograd.grad(theirs(leaf).sum(), leaf)

        rows[f"{name}, forward"] = {"plan_error_l1": error} | in_turn(ours, theirs, repeats)
        rows[f"{name}, forward + envelope gradient against autograd"] = in_turn(
            lambda: ours_grad("envelope"), theirs_grad, max(3, repeats // 3)
        )
        rows[f"{name}, forward + unrolled gradient against autograd"] = in_turn(
            lambda: ours_grad("unrolled"), theirs_grad, max(3, repeats // 3)
        )
    return rows


def cost_cases(repeats: int) -> dict[str, dict]:
    rows = {}
    for name, (N, M, D) in COSTS.items():
        x, y = torch.randn(N, D), torch.randn(M, D)
        seen = cost_matrix(x[:9], y, backend="cpu").double()
        error = (seen / cost_oracle(x[:9].double(), y.double(), "l1") - 1).abs().max().item()
        if not error < 1e-5:
            raise SystemExit(f"{name}: L1 cost differs from the float64 oracle by {error}")
        xg, yg = x.clone().requires_grad_(), y.clone().requires_grad_()
        C, theirs = cost_matrix(xg, yg, backend="cpu"), torch.cdist(xg, yg, p=1)
        G = torch.randn(N, M)
        rows[f"L1 cost {name}, forward against torch.cdist"] = in_turn(
            lambda x=x, y=y: cost_matrix(x, y, backend="cpu"),
            lambda x=x, y=y: torch.cdist(x, y, p=1),
            repeats,
        )
        rows[f"L1 cost {name}, backward against torch.cdist"] = in_turn(
            lambda C=C, G=G, leaves=(xg, yg): torch.autograd.grad(C, leaves, G, retain_graph=True),
            lambda C=theirs, G=G, leaves=(xg, yg): torch.autograd.grad(
                C, leaves, G, retain_graph=True
            ),
            max(3, repeats // 3),
        )
    return rows


def machine() -> dict[str, str | int]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} cores",
        "isa": backends.native().cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "otdd": otdd.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    results = {"command": "python benchmarks/sinkhorn_cpu.py", "machine": machine()}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows = solve_cases(args.repeats) | cost_cases(max(3, args.repeats // 3))
        results[f"threads={threads}"] = rows
        for name, row in rows.items():
            print(
                f"{threads} thread(s)  {name:70s} {row['ours_ms']:9.2f} ms against "
                f"{row['theirs_ms']:9.2f} ms: {row['ratio']:6.1f}x",
                flush=True,
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
