"""What the GPU can do at best, measured before anything else, and the least work of each case."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Case
from floors import DEGREE

REGISTERS = 64 * 64  # elements of the largest problem that a warp's registers hold
EXPS, SHARED = 16, 128  # exp2 and bytes of shared memory in a clock of a multiprocessor


@dataclass(frozen=True)
class Chip:
    """Of the device: multiprocessors, bytes of L2 and of all shared memory, its own memory."""

    name: str
    multiprocessors: int
    l2: int
    shared: int
    memory: int


def chip() -> Chip:
    p = torch.cuda.get_device_properties(0)
    shared = p.multi_processor_count * p.shared_memory_per_multiprocessor
    return Chip(p.name, p.multi_processor_count, p.L2_cache_size, shared, p.total_memory)


def seconds(function: Callable, calls: int) -> float:
    """By CUDA events, per call, back to back."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def best(function: Callable, rounds: int = 10) -> float:
    function()
    return min(seconds(function, 1) for _ in range(rounds))


def busy_clock(function: Callable, each: float) -> float:
    """Hz of the multiprocessors, read while they have a second of a function that takes `each`."""
    for _ in range(int(1 / each) + 1):
        function()
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    torch.cuda.synchronize()
    return 1e6 * float(told.splitlines()[0])


def rates(chip: Chip) -> dict[str, dict[str, float]]:
    """For each type: bytes copied (read + written), multiply-adds, exps, bytes of shared memory.

    Of float32 also the multiply-adds of a product in TF32.

    Multiply-adds are those of a matrix product without TF32; of float64 it may run on tensor cores.
    No tensor op is bound by exps: their rate is arithmetic, 16 in a clock of a multiprocessor (of
    CUDA's table of throughputs), and so is that of shared memory, 128 bytes, at the clock seen
    under load.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.rand(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best(lambda: target.copy_(source))
    found = {}
    for dtype, n in ((torch.float32, 8192), (torch.float64, 4096)):
        p = torch.rand(n, n, device="cuda", dtype=dtype)
        out = torch.empty_like(p)
        product = lambda p=p, out=out: torch.mm(p, p, out=out)  # noqa: E731
        each = best(product)
        fma, clocks = n**3 / each, busy_clock(product, each) * chip.multiprocessors
        exp = EXPS * clocks if dtype == torch.float32 else fma / DEGREE[dtype]
        name = str(dtype).removeprefix("torch.")
        found[name] = {"copy": copy, "fma": fma, "exp": exp, "shared": SHARED * clocks}
    p = torch.rand(8192, 8192, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    found["float32"]["tf32"] = 8192**3 / best(lambda: torch.mm(p, p))
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


@dataclass(frozen=True)
class Work:
    """The least that has to be done: bytes of memory and of shared memory, slots, exps.

    A slot is a multiply-add or an addition: they share the lanes of a multiprocessor. Products are
    multiply-adds of TF32 on the matrix units.
    """

    bytes: float
    shared: float
    slots: float
    exps: float
    products: float = 0


def work(case: Case, direction: str, gradient: str, itemsize: int, on_chip: int) -> Work:
    """The least work of `case`; `on_chip` is the shared memory of all multiprocessors, in bytes.

    A solve reads the costs once; per iteration an element takes two multiply-adds, and is read from
    shared memory once if its problem is larger than a warp's registers, or from device memory if it
    is larger than the chip. The envelope's gradient is one pass more. The unrolled one takes four
    multiply-adds an iteration more, two for products with K and two for its gradient of rank two.
    An L1 cost takes a difference and a sum; its gradient a difference, and a sum for each side, the
    sign being logic, which runs beside. A squared one is a product, here of the same float32.
    """
    B, N, M, D, T = case.B, case.N, case.M, case.D, case.iterations
    size, on_warp = B * N * M, N * M <= REGISTERS
    backward, alone = direction != "forward", case.kind == "metric"
    sides = (2 if alone else 1) if backward else 0
    costs = 0 if alone and backward else 1
    slots = 0
    if case.metric == "sqeuclidean":
        slots = size * D * (costs + sides)
    elif D:
        slots = size * D * (2 * costs + (1 + sides if sides else 0))
    points, x_alone = (B * N + B * M) * D * itemsize, B * N * D * itemsize
    moved = points * (costs + (sides > 0)) + (points if sides == 2 else x_alone * sides)
    if alone or not D:
        moved += size * itemsize * (1 if alone else 1 + sides)
    if alone:
        return Work(moved, 0, slots, 0)
    iterations = T
    slots += 2 * size * (T + 1 + sides)
    if sides and gradient == "unrolled":
        iterations = 2 * T
        slots += 4 * size * T
        moved += 2 * 8 * B * (N + M) * T  # potentials of every iteration, written and read
    read = size * itemsize * iterations
    shared = 0 if on_warp else read
    if N * M * itemsize > on_chip:
        shared, moved = 0, moved + read
    return Work(moved, shared, slots, size * (1 + sides))


def cloud_works(
    case: Case, direction: str, products: int, itemsize: int, on_chip: int
) -> dict[str, Work]:
    """The least work of a solve between clouds that makes its costs anew, or that keeps them.

    A cost is D multiply-adds on the matrix units for each of `products` of TF32; an iteration takes
    one multiply-add an element for each of its two sums. Made anew, each iteration takes one cost
    and one exp an element, for f and g together. Kept, costs are written once and read in every
    iteration, from shared memory if a problem fits there, and one exp an element does for all (as
    in `work`). The gradient is a pass more and a product with the points.
    """
    B, N, M, D, T = case.B, case.N, case.M, case.D, case.iterations
    size, sides = B * N * M, 0 if direction == "forward" else 1
    each, slots = products * size * D, 2 * size * (T + 1 + sides)
    points = (B * N + B * M) * D * itemsize
    moved = points * (1 + sides) + sides * B * N * D * itemsize
    anew = moved + points * (T - 1) * (points > on_chip)
    remade = Work(anew, 0, slots, size * (T + sides), each * (T + 2 * sides))
    read, fits = size * itemsize * T, N * M * itemsize <= on_chip
    shared = read if fits and N * M > REGISTERS else 0
    far = 0 if fits else read + size * itemsize * (1 + sides)
    kept = Work(moved + far, shared, slots, size * (1 + sides), each * (1 + sides))
    return {"remade": remade, "kept": kept}


def parts_ms(work: Work, rate: dict[str, float]) -> dict[str, float]:
    """What each part would take alone."""
    return {
        "memory": 1e3 * work.bytes / rate["copy"],
        "shared memory": 1e3 * work.shared / rate["shared"],
        "multiply-adds": 1e3 * work.slots / rate["fma"],
        "exps": 1e3 * work.exps / rate["exp"],
        "products": 1e3 * work.products / rate.get("tf32", rate["fma"]),
    }


def floor_ms(work: Work, rate: dict[str, float]) -> float:
    """Memory, shared memory, arithmetic, exps and products all overlap."""
    return max(parts_ms(work, rate).values())


def floors(works: dict[str, Work], rate: dict[str, float], milliseconds: float) -> dict:
    """For a row: the least floor, what binds there, and how much of each floor is reached."""
    found = {}
    for name, work in works.items():
        parts = parts_ms(work, rate)
        binds = max(parts, key=parts.get)
        found[name] = {"ms": parts[binds], "binds": binds, "reached": parts[binds] / milliseconds}
    least = min(found.values(), key=lambda floor: floor["ms"])
    row = {"floor_ms": least["ms"], "binds": least["binds"], "of_floor": least["reached"]}
    return row | ({"floors": found} if len(found) > 1 else {})
