"""otdd on the CPU beside its peers: every contender of every case in one run.

    pytest benchmarks/ --results benchmarks/results/cpu.json

A process pinned to as many cores as it has threads measures (`measure.py`): first whether each
contender agrees with the float64 oracle, then all of them in turn, round by round, so that ratios
are of calls made next to each other. pytest-benchmark's clock here shows the times so measured.
"""

import pytest
from cases import CASES
from contender import DISAGREES
from peers import CONTENDERS

QUICK = {"small", "overhead"}
ROWS = [
    (case.name, dtype, direction)
    for case in CASES
    for dtype in case.dtypes
    for direction in case.directions
]


class Replay:
    """A clock that each call of `advance` moves on by one of the measured times."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, iter(())

    def now(self) -> float:
        return self.seconds

    def advance(self) -> None:
        self.seconds += next(self.steps) / 1e3


CLOCK = Replay()


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("contender", [c.name for c in CONTENDERS])
@pytest.mark.parametrize(("case", "dtype", "direction"), ROWS)
def test_cpu(workers, benchmark, threads, case, dtype, direction, contender):
    if workers.quick and (case not in QUICK or dtype != "float32"):
        pytest.skip("not one of the quick cases")
    row = workers.measure(threads, case, dtype, direction)
    seen = row["contenders"][contender]
    if seen.get("reason") == DISAGREES and contender == "otdd":
        pytest.fail(f"otdd disagrees with the oracle: {seen}")
    if "median_ms" not in seen:
        pytest.skip(f"{contender}: {seen['reason']}")
    times = seen.get("times_ms", [seen["median_ms"]])
    benchmark.group = f"{case} {dtype} {direction}, {threads} thread(s)"
    benchmark.extra_info |= {k: v for k, v in seen.items() if k != "times_ms"}
    benchmark.extra_info["floor_ms"] = row["floor_ms"]
    CLOCK.steps = iter(times)
    benchmark.pedantic(CLOCK.advance, rounds=len(times), iterations=1)
