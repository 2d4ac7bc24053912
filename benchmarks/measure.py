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
HUGE = 2**25  # elements, from which one iteration says enough
CONVERGED = 600  # iterations, where a contender with other iterates is compared


@dataclass(frozen=True)
class Budget:
    """Seconds of timing per contender, seconds that one call may take, rounds at most."""

    seconds: float
    call: float
    rounds: int


FULL, QUICK = Budget(0.4, 12.0, 20), Budget(0.02, 2.0, 3)


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
        seconds, few, projected = foreseen(contender, case, data, direction, budget)
        if projected and seconds > budget.call:
            reason = f"too slow: projected from {few} of {case.iterations} iterations"
            times = {"median_ms": 1e3 * seconds, "min_ms": 1e3 * seconds, "rounds": 0}
            return row | times | {"reason": reason}, None, 0.0
        return row, run, seconds or min(clock(run), clock(run))
    except Unsupported as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    return row | {"reason": reason}, None, 0.0


def foreseen(
    contender: Contender, case: cases.Case, data: cases.Data, direction: str, budget: Budget
) -> tuple[float, int, bool]:
    """About how long a slow call takes, or 0; the iterations that say so; if it is projected.

    From a few iterations follows what a call takes at most, as costs are made once; if that is far
    too long, some more tell the part that grows.
    """
    tenth = max(case.iterations // 10, 1)
    few = 1 if case.B * case.N * case.M >= HUGE else tenth
    if few == case.iterations:
        return 0.0, few, False
    once = clock(contender.build(case, data, direction, few), contender.compiles)
    at_most = once * case.iterations / few
    if at_most > 3 * budget.call:
        more = clock(contender.build(case, data, direction, few + tenth), contender.compiles)
        growth = max(more - once, 0.0) / tenth
        return once + growth * (case.iterations - few), few + tenth, True
    slow = at_most > 2 * budget.seconds and not contender.compiles
    return at_most if slow else 0.0, few, False


def clock(run: Run, warm: bool = False) -> float:
    if warm:
        run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def by_wall_clock(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def interleaved(
    runs: dict[str, Run],
    single: dict[str, float],
    budget: Budget,
    seconds_per_call: Callable[[Run, int], float] = by_wall_clock,
) -> dict[str, list[float]]:
    """Seconds per call, round by round: A B C A B C ...

    A sample is as many calls as fill a millisecond. Before each, an untimed call brings caches and
    threads back from the contender before; slow contenders do without, and take part in fewer
    rounds.
    """
    calls = {name: max(1, round(1e-3 / t)) for name, t in single.items()}
    rounds = {}
    for name, t in single.items():
        wanted = max(3 if t < budget.seconds else 1, int(budget.seconds / (t * (calls[name] + 1))))
        rounds[name] = min(budget.rounds, wanted)
    times = {name: [] for name in runs}
    for i in range(max(rounds.values(), default=0)):
        for name in (name for name in runs if i < rounds[name]):
            if single[name] < budget.seconds:
                runs[name]()
            times[name].append(seconds_per_call(runs[name], calls[name]))
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
        start = time.perf_counter()
        row, run, seconds = prepare(contender, case, data, dtype, direction, budget)
        rows[contender.name] = row | {"prepared_s": time.perf_counter() - start}
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
    what = {"case": case.name, "dtype": dtype, "direction": direction}
    what["iterations"] = case.iterations
    return what | summary(rows) | {"contenders": rows}


def summary(rows: dict[str, dict]) -> dict:
    """How far otdd is ahead of the fastest peer in the log domain, and of POT's exp domain."""
    ratios = {name: row["ratio"] for name, row in rows.items() if "ratio" in row}
    peers = {name: r for name, r in ratios.items() if not name.startswith("otdd")}
    safe = {name: r for name, r in peers.items() if rows[name]["safe"]}
    fastest = min(safe, key=safe.get, default=None)
    exp = [r for name, r in peers.items() if name.startswith("POT exp")]
    return {
        "fastest_safe_peer": fastest,
        "ratio_to_it": safe.get(fastest),
        "ratio_to_pot_exp": min(exp, default=None),
    }


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
        seen = floors.rates(cases.DTYPES[dtype], 0.03 if request["quick"] else 0.1)
        rates[dtype] = floors.highest(seen, rates.get(dtype, seen))
        row = measure(by_name[case], dtype, direction, request["quick"])
        work = cases.work(by_name[case], direction, cases.DTYPES[dtype].itemsize, cache)
        row |= {"work": asdict(work), "rates": rates[dtype], "threads": threads}
        floors.put(row)
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    main()
