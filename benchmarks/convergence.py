"""Time and iterations to a marginal error of 1e-4, from zero and from a neighbour's potentials.

    python benchmarks/convergence.py --out benchmarks/results/convergence.json

Costs are given, in float32, on one core; eps is a fraction of their standard deviation. Warm starts
are the potentials (error 1e-5) of the same problem with its points, or random costs, moved by 2 %.
A time is the least of calls made in turn, divided by the problems of the batch. OTT and POT, with
their own options and stopping rules, get the first problem of the batch, and no more iterations
than some seconds allow. Errors are measured anew in float64.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import otdd
from otdd import backends
from otdd.ops import cost_matrix, sinkhorn

TOL, MAX_ITER, RATIOS, MOVE = 1e-4, 10_000, (1.0, 0.1, 0.03, 0.01, 0.001), 0.02
PEER_WORK = 3e8  # entries of the cost that a peer may visit in a solve
Potentials = tuple[Tensor, Tensor] | None
OTDD = {
    "plain": {},
    "schedule": {"schedule": 0.1},
    "anderson": {"accelerate": "anderson"},
    "schedule + anderson": {"schedule": 0.1, "accelerate": "anderson"},
}
PEERS = {
    "POT sinkhorn_log": lambda *p: pot(*p),
    "OTT": lambda *p: ott(*p),
    "OTT momentum": lambda *p: ott(*p, momentum=True),
    "OTT anderson": lambda *p: ott(*p, anderson=True),
}


def digits(N: int, M: int, B: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = images[order].split([len(images) // 2, len(images) - len(images) // 2])
    return x[: B * N].reshape(B, N, -1), y[: B * M].reshape(B, M, -1)


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, cost, and the cost of the problem a step before."""
    torch.manual_seed(0)
    C = torch.rand(16, 64, 64)
    yield "16 of 64x64, uniform costs", C, C + MOVE * C.std() * torch.randn_like(C)
    clouds = {
        "16 of 64x64, points in 2-D, sqeuclidean": (torch.randn(16, 64, 2), torch.randn(16, 64, 2)),
        "16 of 64x64, points in 8-D, sqeuclidean": (torch.randn(16, 64, 8), torch.randn(16, 64, 8)),
        "5 of 100x150, digits, sqeuclidean": digits(100, 150, 5),
        "4 of 50x1300, latents of 4096, l1": (torch.randn(4, 50, 4096), torch.randn(4, 1300, 4096)),
        "128x128, softmax of 100, l1": tuple(torch.randn(2, 1, 128, 100).mul(3).softmax(-1)),
        "1000x1000, points in 3-D, sqeuclidean": (torch.rand(1, 1000, 3), torch.rand(1, 1000, 3)),
    }
    for name, (x, y) in clouds.items():
        metric = name.split()[-1]
        before = x + MOVE * x.std() * torch.randn_like(x)
        yield name, cost_matrix(x, y, metric), cost_matrix(before, y, metric)


def least(runs: dict[str, Callable], seconds: float) -> dict[str, tuple[float, object]]:
    """For each, the least seconds of calls made in turn, and what the last one returned.

    Two rounds or more, unless a call is slow, and more while `seconds` last.
    """
    start, seen = time.perf_counter(), {name: (float("inf"), None) for name in runs}
    for rounds in range(30):
        if rounds >= 2 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            if rounds == 1 and seen[name][0] > 3:
                continue
            before = time.perf_counter()
            result = run()
            seen[name] = min(seen[name][0], time.perf_counter() - before), result
    return seen


def row(seconds: float, problems: int, iterations: float, met: bool, error: float) -> dict:
    return {
        "ms": round(1e3 * seconds / problems, 4),
        "iterations": round(iterations, 1),
        "error": float(f"{error:.2g}"),
        "met": met,
    }


def otdd_rows(C: Tensor, eps: float, init: Potentials) -> dict[str, dict]:
    shared = {"eps": eps, "max_iter": MAX_ITER, "tol": TOL, "init": init, "backend": "cpu"}
    runs = {
        name: functools.partial(sinkhorn, C, **shared, **options)
        for name, options in OTDD.items()
        if not (init and "schedule" in options)  # which forgets where it starts
    }
    rows = {}
    for name, (seconds, result) in least(runs, 1.0).items():
        errors = error_of(C, result.f, result.g, eps)
        met, iterations = bool(result.converged.all()), result.n_iter.double().mean().item()
        rows[name] = row(seconds, len(C), iterations, met, errors.max().item())
    return rows


def error_of(C: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """L1 error of both marginals of ``exp((f + g - C) / eps) / (N M)``, in float64."""
    N, M = C.shape[-2:]
    P = ((f.double().unsqueeze(-1) + g.double().unsqueeze(-2) - C.double()) / eps).exp() / (N * M)
    rows, columns = (P.sum(-1) - 1 / N).abs().sum(-1), (P.sum(-2) - 1 / M).abs().sum(-1)
    return rows + columns


def peer_iterations(C: Tensor) -> int:
    return int(min(MAX_ITER, PEER_WORK / C.numel()))


def pot(C: Tensor, eps: float, init: Potentials) -> tuple[Callable, Callable]:
    import ot

    N, M = C.shape
    a, b = torch.full((N,), 1 / N), torch.full((M,), 1 / M)
    # its error is the L2 norm of the columns' sums, its potentials have the weights inside
    options = {
        "numItermax": peer_iterations(C),
        "stopThr": TOL / M**0.5,
        "log": True,
        "warn": False,
    }
    warm = (init[0] / eps + a.log(), init[1] / eps + b.log()) if init else None

    def run() -> tuple:
        return ot.bregman.sinkhorn_log(a, b, C, eps, warmstart=warm, **options)

    def read(result: tuple) -> tuple[int, Tensor, Tensor]:
        log = result[1]
        return log["niter"], eps * (log["log_u"] - a.log()), eps * (log["log_v"] - b.log())

    return run, read


@functools.cache
def ott_solver(max_iter: int, momentum: bool, anderson: bool) -> Callable:
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear import acceleration
    from ott.solvers.linear.sinkhorn import Sinkhorn

    solver = Sinkhorn(
        threshold=TOL,
        max_iterations=max_iter,
        momentum=acceleration.Momentum(start=50) if momentum else None,
        anderson=acceleration.AndersonAcceleration(memory=5) if anderson else None,
    )

    @jax.jit
    def solve(C: jax.Array, eps: float, f: jax.Array, g: jax.Array) -> tuple:
        problem = LinearProblem(Geometry(C, epsilon=eps))
        out = solver(problem, init=(f, g))
        return out.f, out.g, out.n_iters

    return solve


def ott(
    C: Tensor, eps: float, init: Potentials, momentum: bool = False, anderson: bool = False
) -> tuple[Callable, Callable]:
    import jax
    import numpy as np

    solve, (N, M) = ott_solver(peer_iterations(C), momentum, anderson), C.shape
    # its potentials have the weights inside; without `init` it too starts with 0
    f, g = init or (eps * torch.full((n,), n).log() for n in (N, M))
    f, g = f - eps * torch.tensor(N).log(), g - eps * torch.tensor(M).log()
    arguments = jax.numpy.asarray(C.numpy()), eps, f.numpy(), g.numpy()

    def run() -> tuple:
        return jax.block_until_ready(solve(*arguments))

    def read(result: tuple) -> tuple[int, Tensor, Tensor]:
        f, g, n = (torch.from_numpy(np.array(t)) for t in result)
        return int(n), f - eps * torch.tensor(1 / N).log(), g - eps * torch.tensor(1 / M).log()

    return run, read


def peer_rows(C: Tensor, eps: float, init: Potentials) -> dict[str, dict]:
    rows, runs, reads = {}, {}, {}
    for name, peer in PEERS.items():
        try:
            runs[name], reads[name] = peer(C[0], eps, init and tuple(t[0] for t in init))
        except ImportError as error:
            rows[name] = {"missing": str(error)}
    for name, (seconds, result) in least(runs, 0.5).items():
        iterations, *potentials = reads[name](result)
        met = iterations < peer_iterations(C[0]) - 1
        rows[name] = row(seconds, 1, iterations, met, error_of(C[0], *potentials, eps).item())
    return rows


def machine() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, one used",
        "isa": backends.native().cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "otdd": otdd.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # XLA has a thread for every core
    results = {"command": "python benchmarks/convergence.py", "machine": machine(), "cases": {}}
    for name, C, before in cases():
        by_ratio = results["cases"][name] = {}
        for ratio in RATIOS:
            eps = ratio * C.std().item()
            neighbour = sinkhorn(
                before,
                eps=eps,
                max_iter=MAX_ITER,
                tol=TOL / 10,
                schedule=0.1,
                accelerate="anderson",
            )
            for start, init in (("cold", None), ("warm", (neighbour.f, neighbour.g))):
                rows = otdd_rows(C, eps, init)
                if options.peers and ratio >= 0.01:
                    rows |= peer_rows(C, eps, init)
                by_ratio[f"eps/std {ratio:g}, {start}"] = rows
                print(name, ratio, start, json.dumps(rows), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
