"""Measures one case after another on a fixed number of threads; `test_cpu.py` starts it.

Reads a line of JSON per case from standard input and answers with one. `conftest.Workers` starts
it, pinned to as many cores as it is to have threads.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import cases
import floors
import torch
from contender import DISAGREES, Contender, Run, Unsupported
from peers import CONTENDERS

TOLERANCE = {"float32": (1e-2, 1e-2), "float64": (1e-4, 1e-3)}
CONVERGED = 1500  # iterations, where a contender with other iterates is compared


@dataclass(frozen=True)
class Budget:
    """Seconds: of timing per contender, and above which a call is not repeated; rounds at most."""

    seconds: float
    call: float
    rounds: int


FULL, QUICK = Budget(0.4, 10.0, 20), Budget(0.02, 2.0, 3)


@functools.cache
def truth(
    piece: cases.Case, dtype: str, iterations: int, gradient: str, primal: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    data = cases.make(piece, cases.DTYPES[dtype])
    return cases.oracle(piece, data, iterations, gradient, primal)


def disagreement(
    contender: Contender, case: cases.Case, dtype: str, direction: str
) -> tuple[float, float]:
    """Distance from the oracle on a part of the case: of the value, of the gradient.

    The value's is in units of eps, as what matters is the exponent; the gradient's relative in L1.
    """
    same = contender.same_iterates
    piece = cases.part(case) if same else cases.part(case, 2**14, 2**20)
    iterations = case.iterations if same else CONVERGED
    data = cases.make(piece, cases.DTYPES[dtype])
    run = contender.build(piece, data, direction, iterations)
    value, gradients = contender.read(piece, data, run())
    exact, wanted = truth(piece, dtype, iterations, contender.gradient, contender.primal)
    unit = data.eps * (piece.N if case.kind == "logits" else 1)  # SinKD's plan has mass N
    errors = [
        ((got - want).abs().sum() / want.abs().sum()).item()
        for got, want in zip(gradients, wanted, strict=bool(gradients))
    ]
    return ((value - exact).abs().max() / unit).item(), max(errors, default=0.0)


def prepare(
    contender: Contender, case: cases.Case, data: cases.Data, dtype: str, direction: str,
    budget: Budget,
) -> tuple[dict, Run | None, float]:  # fmt: skip
    """The contender's row so far, what to time further if anything, and its seconds per call."""
    row = {"safe": contender.safe, "gradient": contender.gradient}
    if reason := contender.missing():
        return row | {"reason": reason}, None, 0.0
    try:
        run = contender.build(case, data, direction, case.iterations)
        value_error, gradient_error = disagreement(contender, case, dtype, direction)
        row |= {"value_error": value_error, "gradient_error": gradient_error}
        bounds = TOLERANCE[dtype]
        if not (value_error <= bounds[0] and gradient_error <= bounds[1]):
            return row | {"reason": DISAGREES}, None, 0.0
        few = max(case.iterations // 10, 1)
        estimate = projected(contender, case, data, direction, few)
        if estimate > budget.call:
            times = {"median_ms": 1e3 * estimate, "min_ms": 1e3 * estimate, "rounds": 0}
            reason = f"too slow: projected from {2 * few} iterations"
            return row | times | {"reason": reason}, None, 0.0
        return row, run, estimate or min(clock(run), clock(run))
    except Unsupported as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    return row | {"reason": reason}, None, 0.0


def projected(
    contender: Contender, case: cases.Case, data: cases.Data, direction: str, few: int
) -> float:
    """Seconds that a call will take if that may be long; 0 if `few` iterations are fast."""
    once = clock(contender.build(case, data, direction, few)) if few < case.iterations else 0.0
    if once < 1:
        return 0.0
    twice = clock(contender.build(case, data, direction, 2 * few))
    return once + max(twice - once, 0.0) / few * (case.iterations - few)


def clock(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    runs: dict[str, Run], single: dict[str, float], budget: Budget
) -> dict[str, list[float]]:
    """Seconds per call, round by round: A B C A B C ...

    A sample is as many calls as fill a millisecond. Before each, an untimed call brings caches and
    threads back from the contender before; slow contenders do without, and take part in fewer
    rounds.
    """
    calls = {name: max(1, round(1e-3 / t)) for name, t in single.items()}
    rounds = {
        name: min(budget.rounds, max(1, int(budget.seconds / (t * (calls[name] + 1)))))
        for name, t in single.items()
    }
    times = {name: [] for name in runs}
    for i in range(max(rounds.values(), default=0)):
        for name in (name for name in runs if i < rounds[name]):
            if single[name] < budget.seconds:
                runs[name]()
            start = time.perf_counter()
            for _ in range(calls[name]):
                runs[name]()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds that both took part in."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=False))


def measure(case: cases.Case, dtype: str, direction: str, quick: bool) -> dict:
    """One row of the result file."""
    torch.manual_seed(0)
    budget = QUICK if quick else FULL
    data = cases.make(case, cases.DTYPES[dtype])
    rows, runs, single = {}, {}, {}
    for contender in CONTENDERS:
        row, run, seconds = prepare(contender, case, data, dtype, direction, budget)
        rows[contender.name] = row
        if run is not None:
            runs[contender.name], single[contender.name] = run, seconds
    for name, times in interleaved(runs, single, budget).items():
        milliseconds = [1e3 * t for t in times]
        rows[name] |= {"median_ms": statistics.median(milliseconds), "min_ms": min(milliseconds)}
        rows[name] |= {"rounds": len(times), "times_ms": milliseconds}
    for row in rows.values():
        ours = rows["otdd"].get("times_ms")
        if ours and "median_ms" in row:
            row["ratio"] = ratio(row.get("times_ms", [row["median_ms"]]), ours)
    return {"case": case.name, "dtype": dtype, "direction": direction, "contenders": rows}


def main() -> None:
    threads = torch.get_num_threads()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not mix with the answers
    cache = floors.core_cache() * threads
    by_name = {case.name: case for case in cases.CASES}
    rates = {}
    for line in sys.stdin:
        request = json.loads(line)
        case, dtype, direction = (request[key] for key in ("case", "dtype", "direction"))
        if dtype not in rates:
            rates[dtype] = floors.rates(cases.DTYPES[dtype], 0.03 if request["quick"] else 0.3)
        row = measure(by_name[case], dtype, direction, request["quick"])
        work = cases.work(by_name[case], direction, cases.DTYPES[dtype].itemsize, cache)
        row |= {"floor_ms": floors.floor_ms(work, rates[dtype]), "work": asdict(work)}
        row |= {"rates": rates[dtype], "threads": threads}
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    main()
