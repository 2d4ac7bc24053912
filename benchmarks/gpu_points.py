"""Clouds on the GPU without their cost matrix: contenders, and how exact each of them is.

The rows answer three questions: otdd against its peers at equal plan error, which of its backends
is the fastest, and how much of the floor it reaches. Nothing here needs a GPU but the graphs.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import cases
import gpu_cases
import gpu_contenders
import peers
import torch
from cases import Case, Data
from contender import (
    ROWS_MET,
    Contender,
    Output,
    Run,
    Solution,
    by_plan,
    leaves_of,
    read_torch,
    refuse,
    torch_cost,
)
from gpu_contenders import graphed
from libraries import LIBRARIES
from measure import CONVERGED
from references import (
    clouds_oracle,
    plan_error,
    plan_oracle,
    plan_rows,
    some_rows,
    torch_loop,
)
from torch import Tensor

BOUNDS = (0.1, 0.1)  # of the errors of value and gradient; TF32 is to be told, not refused
LONGEST = 1e12  # operations of one pass that is still tried with 44 kinds of tiles
WITH_COSTS = 4096  # points up to which contenders that keep the costs take part
NO_ROOM, MANY = "has no room for all costs", "has too many features to make costs again"
BEYOND = 1 << 24  # costs of a problem that `cuda` is timed with: more than otdd gives it

# otdd ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def border(backend: str | None, keep: str | None = None) -> Iterator[None]:
    """`cuda` asked for by name takes more costs than otdd gives it, so that its border shows.

    With `keep`, so does `triton`: it keeps "all" costs that it would make again in each pass, or
    makes costs again that it would keep ("nothing").
    """
    from otdd.ops.points import dense, tiles

    most = max(dense.CUDA, BEYOND) if backend == "cuda" else dense.CUDA
    features = {None: tiles.THREE, "all": 0, "nothing": max(tiles.REMADE.values())}[keep]
    remade = tiles.REMADE if keep is None else dict.fromkeys(tiles.REMADE, features)
    with (
        mock.patch.object(dense, "CUDA", most),
        mock.patch.multiple(tiles, REMADE=remade, THREE=features),
    ):
        yield


def solve(
    data: Data,
    x: Tensor,
    iterations: int,
    backend: str | None,
    precision: str = "highest",
    keep: str | None = None,
) -> object:
    from otdd.ops import sinkhorn_points

    options = {"eps": data.eps, "max_iter": iterations, "precision": precision, "backend": backend}
    with gpu_contenders.refusals(), border(backend, keep):
        return sinkhorn_points(x, data.y, data.a, data.b, **options)


def keeps(case: Case, data: Data, precision: str) -> str:
    """What `triton` keeps of the costs of a case."""
    from otdd.ops.points import tiles

    sizes = case.B, case.N, case.M, case.D, data.x.element_size()
    return tiles.plan_of(*sizes, case.metric, precision).keep


def otdd(
    name: str, backend: str | None = None, precision: str = "highest", keep: str | None = None
) -> Contender:
    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        if keep is not None:
            usual = keeps(case, data, precision)
            refuse(usual == keep or usual == "resident", "is what triton does")
            with border(backend, keep):
                found = keeps(case, data, precision)
            refuse(found != keep, NO_ROOM if keep == "all" else MANY)
        elif backend is not None:
            chosen = solve(data, data.x, 1, None).backend
            refuse(chosen == backend, "is what otdd chooses")
        leaf = leaves_of(case, data, direction)[0]

        def run() -> Output:
            value = solve(data, leaf, iterations, backend, precision, keep).value
            gradients = [] if direction == "forward" else torch.autograd.grad(value.sum(), leaf)
            return value, list(gradients)

        return run

    def solution(case: Case, data: Data, iterations: int) -> Solution:
        r, rows = solve(data, data.x, iterations, backend, precision, keep), some_rows(data.x)
        chosen = torch.nn.functional.one_hot(rows, case.N).mT.to(data.x.dtype)  # (N, rows)
        return Solution(r.apply(chosen, transpose=True).mT, r.backend)

    products = 3 if precision == "highest" else 1
    return Contender(name, "otdd", build, read_torch, solution=solution, products=products)


# Peers --------------------------------------------------------------------------------------------


def with_costs(contender: Contender) -> Contender:
    """For as many points as their costs are kept of."""

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        refuse(max(case.N, case.M) > WITH_COSTS, f"keeps the costs: up to {WITH_COSTS} points")
        return contender.build(case, data, direction, iterations)

    return replace(contender, build=build)


def of_torch(name: str, solved: Callable, loop: Callable) -> Contender:
    def solution(case: Case, data: Data, iterations: int) -> Solution:
        C, rows = torch_cost(data.x, data.y, case.metric), some_rows(data.x)
        f, g = loop(C, data, iterations)
        few = (t.double() for t in (C[:, rows], f[:, rows], g, data.a[:, rows], data.b))
        return Solution(plan_oracle(*few, data.eps))

    build = by_plan(solved)
    return with_costs(Contender(name, "torch", build, read_torch, solution=solution))


def plain_loop(C: Tensor, data: Data, iterations: int) -> tuple[Tensor, Tensor]:
    return torch_loop(C, data.a, data.b, data.eps, iterations)


def flash(name: str, allow_tf32: bool) -> Contender:
    """Its iterates are ours; its gradient scales each row of the plan to the row's weight.

    Its plan is that of its potentials and of the points that it rounds to TF32, if it does: the
    products of those are exact, but for their sums.
    """

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        slow = not allow_tf32 and 2.0 * case.N * case.M * case.D > LONGEST
        refuse(slow, "its search for tiles without TF32 takes longer here than a row may")
        tune_in_parallel()
        return gpu_contenders.flash(allow_tf32)(case, data, direction, iterations)

    def solution(case: Case, data: Data, iterations: int) -> Solution:
        loss = gpu_contenders.flash_loss(data, iterations, allow_tf32, potentials=True)
        pairs = [loss(*p) for p in zip(data.a, data.x, data.b, data.y, strict=True)]
        f, g = (torch.stack(side) for side in zip(*pairs, strict=True))
        x, y = data.x, data.y
        if allow_tf32:
            from flash_sinkhorn.samples_loss import _center_coords, _round_to_tf32

            centred = _center_coords(x, y, data.a, data.b, batched=True)
            x, y = (_round_to_tf32(t) for t in centred)
        return Solution(plan_rows(x, y, data.a, data.b, f, g, data.eps, some_rows(x)))

    how = {"gradient": ROWS_MET, "solution": solution, "products": 1 if allow_tf32 else 3}
    return Contender(name, "flash_sinkhorn", build, read_torch, **how)


@functools.cache
def tune_in_parallel() -> None:
    """flash-sinkhorn's search for the fastest tiles, in less time but over as many tiles."""
    from flash_sinkhorn.kernels import sinkhorn_flashstyle_sqeuclid as kernels

    compiled_first(kernels._flashsinkhorn_lse_fused_kernel_autotune)


def compiled_first(tuner: object) -> None:
    """A Triton autotuner compiles all its configurations on all cores, then times each briefly."""
    import triton
    from triton.testing import do_bench

    run, seen, apart = tuner.run, set(), ("grid", "CACHE_KEY_N", "CACHE_KEY_M")

    def run_compiled(*args, **kwargs):
        launch = {k: v for k, v in kwargs.items() if k != "warmup"}
        variant = tuple(sorted((k, v) for k, v in launch.items() if k not in apart))
        if variant not in seen:
            seen.add(variant)
            try:
                pool = ThreadPoolExecutor(os.cpu_count())
                with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
                    tuner.warmup(*args, **launch)
            except Exception as error:  # then each is compiled when it is timed
                print(f"gpu_points: not compiled in parallel: {type(error).__name__}: {error}")
        return run(*args, **kwargs)

    tuner.run, tuner._do_bench = run_compiled, functools.partial(do_bench, warmup=5, rep=25)


LIBRARY = {contender.name: contender for contender in LIBRARIES}
OTDD = [
    otdd("otdd"),
    otdd("otdd, cuda", "cuda"),
    otdd("otdd, triton", "triton"),
    otdd("otdd, high", None, "high"),
    otdd("otdd, triton, high", "triton", "high"),
    otdd("otdd, triton, kept", "triton", keep="all"),
    otdd("otdd, triton, high, kept", "triton", "high", keep="all"),
    otdd("otdd, triton, remade", "triton", keep="nothing"),
]
FLASH = [flash("flash-sinkhorn", False), flash("flash-sinkhorn, TF32", True)]
COMPILED = of_torch("torch.compile", peers.compiled_envelope, peers.compiled_loop)


def in_a_graph(contender: Contender) -> Contender:
    """Its plan is that of the calls without one, and not made twice.

    Only otdd's own choice is captured where launches are next to nothing.
    """
    whole = graphed(contender)

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        late = case.N > WITH_COSTS and contender.name != "otdd"
        refuse(late, "launches are next to nothing here")
        return whole.build(case, data, direction, iterations)

    return replace(whole, build=build, solution=None)


CONTENDERS = [
    *OTDD,
    *FLASH,
    LIBRARY["geomloss KeOps"],
    with_costs(LIBRARY["OTT-JAX"]),
    of_torch("torch loop", peers.torch_envelope, plain_loop),
    COMPILED,
    *map(in_a_graph, [*OTDD, *FLASH, COMPILED]),
]

# Errors -------------------------------------------------------------------------------------------


class Truth:
    """The oracle of one row of clouds; a contender with other iterates gets one of its own."""

    bounds = BOUNDS

    def __init__(self, case: Case, dtype: str, data: Data) -> None:
        self.whole, self.dtype, self.data, self.made = case, dtype, data, {}

    def exact(self, case: Case, data: Data, iterations: int) -> dict[str, Tensor]:
        if (case, iterations) not in self.made:
            problem = data.x, data.y, data.a, data.b
            solved = clouds_oracle(*problem, eps=data.eps, max_iter=iterations)
            self.made[case, iterations] = solved
        return self.made[case, iterations]

    def errors(self, contender: Contender, run: Run, direction: str) -> dict:
        """Distances from the oracle: of the value, in units of eps, and of the gradient, in L1.

        The gradient's is relative. Where the plan is told, also that of it: in L1, of a mass of 1.
        """
        case, data, iterations = self.whole, self.data, self.whole.iterations
        if not contender.same_iterates:
            case, iterations = cases.part(case, 2**14, 2**20), CONVERGED
            data = gpu_cases.make(case, cases.DTYPES[self.dtype], data.a.device)
            run = contender.build(case, data, direction, iterations)
        value, gradients = contender.read(case, data, run())
        exact = self.exact(case, data, iterations)
        device = exact["value"].device
        off = (value.to(device) - exact["value"]).abs().max()
        found = {"value_error": (off / data.eps).item(), "gradient_error": 0.0}
        wanted = exact["dx_met" if contender.gradient == ROWS_MET else "dx"]
        for dx in gradients:
            error = (dx.to(device) - wanted).abs().sum() / wanted.abs().sum()
            found["gradient_error"] = error.item()
        if contender.solution is not None:
            seen, backend = contender.solution(case, data, iterations)
            problem = data.x, data.y, data.a, data.b, exact["f"], exact["g"], data.eps
            found["plan_error"] = plan_error(seen, plan_rows(*problem, some_rows(data.x)))
            found |= {"backend": backend} if backend else {}
        return found


EQUAL = 1e-5  # of a mass of 1: differences below are those of float32, whatever the method


def lead(rows: dict[str, dict]) -> dict[str, dict]:
    """How far each of otdd's ways is ahead of the fastest peer of no more than twice its error.

    Errors up to `EQUAL` are alike. The error is that of the plan; of a contender that tells none,
    the larger of the others.
    """

    def error(name: str) -> float:
        seen = rows[name.removesuffix(", graph")]
        others = max(seen.get("value_error", 1.0), seen.get("gradient_error", 1.0))
        return seen.get("plan_error", others)

    timed = {name: row["median_ms"] for name, row in rows.items() if "median_ms" in row}
    found = {}
    for ours in (name for name in timed if name.startswith("otdd")):
        enough = max(2 * error(ours), EQUAL)
        peers = [n for n in timed if not n.startswith("otdd") and error(n) <= enough]
        if peers:
            peer = min(peers, key=timed.get)
            found[ours] = {"peer": peer, "ratio": timed[peer] / timed[ours]}
    return found
