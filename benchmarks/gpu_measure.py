"""Measures on the GPU what it is asked for, one line of JSON each; `test_gpu.py` starts it.

A process of its own, for an error of a kernel ends all CUDA work of its process.
"""

import gc
import itertools
import json
import os
import statistics
import sys
import time

import cases
import contender as contenders
import gpu_cases
import gpu_contenders
import gpu_floors
import gpu_points
import gpu_scale
import torch
from contender import DISAGREES, Contender, Run, Unsupported
from measure import CONVERGED, TOLERANCE, Budget, interleaved, ratio

BUDGET = Budget(seconds=0.25, call=5.0, rounds=40)
GPU = torch.device("cuda")


class Truth:
    """The oracle of one row, each kind of it made once."""

    def __init__(self, case: cases.Case, dtype: str, data: cases.Data) -> None:
        self.whole, self.dtype, self.data, self.made = case, dtype, data, {}
        self.bounds = TOLERANCE[dtype]

    def errors(self, contender: Contender, run: Run, direction: str) -> dict[str, float]:
        """Distance of the value, in units of eps, and of the gradient, relative in L1.

        A contender with other iterates is compared on a part of the case, where both converged.
        """
        case, data, iterations = self.whole, self.data, self.whole.iterations
        if not contender.same_iterates:
            case, iterations = cases.part(case, 2**14, 2**20), CONVERGED
            data = gpu_cases.make(case, cases.DTYPES[self.dtype], data.a.device)
            run = contender.build(case, data, direction, iterations)
        key = case, iterations, contender.gradient, contender.primal
        if key not in self.made:
            self.made[key] = gpu_cases.oracle(case, data, *key[1:])
        value, gradients = contender.read(case, data, run())
        exact, wanted = self.made[key]
        unit = data.eps * (case.N if case.kind == "logits" else 1)  # SinKD's plan has mass N
        errors = [
            ((got - want).abs().sum() / want.abs().sum()).item()
            for got, want in zip(gradients, wanted, strict=bool(gradients))
        ]
        value_error = ((value - exact).abs().max() / unit).item()
        return {"value_error": value_error, "gradient_error": max(errors, default=0.0)}


def rules(case: cases.Case) -> tuple[list[Contender], type]:
    """Who takes part, and the oracle."""
    if case.stored:
        return gpu_contenders.CONTENDERS, Truth
    return gpu_points.CONTENDERS, gpu_points.Truth


def prepare(
    contender: Contender,
    case: cases.Case,
    truth: Truth | gpu_points.Truth,
    sets: list[cases.Data],
    direction: str,
) -> tuple[dict, Run | None]:
    """The contender's row so far, and what to time: calls on one set of inputs after another."""
    row = {"gradient": contender.gradient}
    if reason := contender.missing():
        return row | {"reason": reason}, None
    try:
        first = contender.build(case, sets[0], direction, case.iterations)
        row |= truth.errors(contender, first, direction)
        seen = row["value_error"], row["gradient_error"]
        if not all(error <= bound for error, bound in zip(seen, truth.bounds, strict=True)):
            return row | {"reason": DISAGREES}, None
        others = [contender.build(case, data, direction, case.iterations) for data in sets[1:]]
    except Unsupported as error:
        return row | {"reason": str(error)}, None
    except Exception as error:
        return row | {"reason": f"{type(error).__name__}: {str(error)[:200]}"}, None
    turns = itertools.cycle([first, *others])
    return row, lambda: next(turns)()


def measure(
    case: cases.Case, dtype: str, direction: str, chip: gpu_floors.Chip, rate: dict[str, float]
) -> dict:
    """One row of the result file; `fatal` in it if CUDA no longer works in this process."""
    torch.manual_seed(0)
    gpu_contenders.new_pool()
    most = gpu_cases.MOST_SETS if case.stored else gpu_cases.SETS_OF_CLOUDS
    sets = gpu_cases.sets(gpu_cases.make(case, cases.DTYPES[dtype], GPU), chip.l2, most)
    taking_part, oracle = rules(case)
    truth = oracle(case, dtype, sets[0])
    row = {"case": case.name, "dtype": dtype, "direction": direction}
    row |= {"iterations": case.iterations, "device": chip.name, "sets": len(sets)}
    row |= {"set_bytes": gpu_cases.input_bytes(sets[0])}
    rows, runs, single = {}, {}, {}
    for contender in taking_part:
        start = time.perf_counter()
        rows[contender.name], run = prepare(contender, case, truth, sets, direction)
        if not works():
            return row | {"contenders": rows, "fatal": f"CUDA failed in {contender.name}"}
        rows[contender.name]["prepared_s"] = time.perf_counter() - start
        torch.cuda.empty_cache()  # a capture cannot take back what others keep
        if run is not None:
            runs[contender.name] = run
            single[contender.name] = gpu_floors.seconds(run, len(sets) + 1)
    truth.made.clear()
    itemsize, products = cases.DTYPES[dtype].itemsize, {c.name: c.products for c in taking_part}
    for name, times in interleaved(runs, single, BUDGET, gpu_floors.seconds).items():
        milliseconds = [1e3 * t for t in times]
        seen = rows[name]
        seen |= {"median_ms": statistics.median(milliseconds), "min_ms": min(milliseconds)}
        seen |= {"rounds": len(times), "times_ms": milliseconds}
        sizes = itemsize, chip.shared
        if case.stored:
            least = {"kept": gpu_floors.work(case, direction, seen["gradient"], *sizes)}
        else:
            least = gpu_floors.cloud_works(case, direction, products[name], *sizes)
        seen |= gpu_floors.floors(least, rate, seen["median_ms"])
    if not case.stored:
        row["lead"] = gpu_points.lead(rows)
    return row | summary(rows) | {"contenders": rows}


def works() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def summary(rows: dict[str, dict]) -> dict:
    """Ratios to otdd's call, and the fastest peer; single times go."""
    ours = rows["otdd"].get("times_ms")
    for row in rows.values():
        times = row.pop("times_ms", None)
        if ours and times:
            row["ratio"] = ratio(times, ours)
    peers = {name: row["median_ms"] for name, row in rows.items() if "median_ms" in row}
    peers = {name: ms for name, ms in peers.items() if not name.startswith("otdd")}
    return {"fastest_peer": min(peers, key=peers.get, default=None)}


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not mix with the answers
    chip = gpu_floors.chip()
    contenders.MEMORY = chip.memory / 2
    rates = gpu_floors.rates(chip)
    by_name = {case.name: case for case in gpu_cases.CASES}
    for line in sys.stdin:
        request = json.loads(line)
        if "scale" in request:
            answer = {"case": request["scale"]} | gpu_scale.measure(request["scale"])
        else:
            case, dtype, direction = (request[key] for key in ("case", "dtype", "direction"))
            answer = measure(by_name[case], dtype, direction, chip, rates[dtype])
        gc.collect()
        if "fatal" not in answer:
            torch.cuda.empty_cache()
        print(json.dumps(answer | {"rates": rates}), file=answers, flush=True)
        if "fatal" in answer:
            os._exit(0)


if __name__ == "__main__":
    main()
