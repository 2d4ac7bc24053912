"""The `triton` backend of `sinkhorn`: see `triton_solve` for what its programs do."""

import math

import torch
import triton
from torch import Tensor

from otdd.ops import pointers
from otdd.ops.sinkhorn import triton_backward, triton_solve
from otdd.ops.sinkhorn.op import MOST_ENTRIES, filled
from otdd.ops.sinkhorn.reference import Solution, potentials_backward_reference

# Registers of a thread of `solve_streamed`, and of `backward_unrolled`: all that it can have. Given
# no number, ptxas of Triton 3.7 and 3.9 aims at one of its own, such as 32, 80 or 96, and keeps to
# it by spilling a few values. AMD's compiler takes no number.
REGISTERS = {} if torch.version.hip else {"maxnreg": 128}
MOST_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}
# Of a tile of float32 costs; with 4, AMD's compiler spills values of `backward_unrolled` for RDNA.
WARPS = 8 if torch.version.hip else 4


def strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    """Of a tensor with a batch dimension or none, over ``dims`` in all."""
    if t is None:
        return (0,) * dims
    return (*(0,) * (dims - t.dim()), *t.stride())


def problem_strides(
    a: Tensor | None, b: Tensor | None, eps: Tensor, rho_a: Tensor | None, rho_b: Tensor | None
) -> tuple[int, ...]:
    weights = *strides(a, 2), *strides(b, 2)
    return *weights, *(strides(t, 1)[0] for t in (eps, rho_a, rho_b))


def tol_below(tol: float) -> float:
    """The largest float32, which is what a kernel takes a number as, that is at most `tol`."""
    nearest = torch.tensor(tol, dtype=torch.float32)
    if nearest.double() > tol:
        nearest = torch.nextafter(nearest, nearest.new_zeros(()))
    return nearest.item()


def aligned(C: Tensor) -> Tensor:
    """`C`, or a copy, with contiguous rows that begin at multiples of 16 entries.

    So a kernel learns that it may read several entries at once, and gives a thread a compact piece
    of the matrix rather than a column of it, whose sums would take more registers than the costs.
    """
    steps = (*C.stride()[:-1], C.data_ptr() // C.element_size())
    if C.stride(-1) == 1 and not any(step % 16 for step in steps):
        return C
    *batch, M = C.shape
    return C.new_empty(*batch, triton.cdiv(M, 16) * 16)[..., :M].copy_(C)


def layout(N: int, M: int, dtype: torch.dtype) -> tuple[bool, tuple[int, int], int]:
    """Whether a problem's costs stay in registers; the tile; warps.

    Compiled for sm_80 to sm_100, no kernel spills for the tiles that there are.
    """
    rows, columns = triton.next_power_of_2(N), triton.next_power_of_2(M)
    single = dtype == torch.float32
    most, longest = (8192, 1024) if single else (2048, 512)
    if rows * columns <= most and max(rows, columns) <= longest:
        per_warp = 512 if single else 256
        fewest = 1 if single else 4
        return True, (rows, columns), min(8, max(fewest, rows * columns // per_warp))
    # float64: more than 4 entries a thread and their exponentials do not fit into REGISTERS.
    entries, warps = (4096, WARPS) if single else (1024, 8)
    rows = min(rows, 32)
    return False, (rows, min(columns, entries // rows, longest)), warps


def sinkhorn_triton(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    g: Tensor | None,
    max_iter: int,
    tol: float,
    keep_history: bool,
    sinkd: bool,
) -> Solution:
    """See `sinkhorn_reference`; the same iterates, in one launch; one more for `value`.

    What is too much for one program has many, and two launches an iteration.
    """
    *batch, N, M = C.shape
    B = math.prod(batch)
    out = Solution.empty(C, a, b, eps, max_iter, keep_history)
    if B == 0:
        return out
    if N * M > MOST_ENTRIES:
        problem = filled(C, a, b, eps, rho_a, rho_b, sinkd)
        return _by_many(problem, g, max_iter, tol)
    C, a, b, eps, rho_a, rho_b, g = pointers.flat(
        len(batch), aligned(C), a, b, eps, rho_a, rho_b, g
    )
    resident, blocks, warps = layout(N, M, C.dtype)
    outputs = out.cost, out.marginal_error, out.n_iter, out.history
    weights = problem_strides(a, b, eps, rho_a, rho_b)
    sizes = N, M, *strides(C, 3)[:2], *weights, *strides(g, 2)
    options = max_iter, tol_below(tol), sinkd, *blocks
    problem = C, a, b, eps, rho_a, rho_b, g, out.f, out.g
    kernel, compiled = triton_solve.solve_resident, {"num_warps": warps}
    if not resident:
        kernel, outputs = triton_solve.solve_streamed, (*outputs, C.new_empty(B, 2 * N + M))
        compiled |= REGISTERS
    solution = out.f, out.g, a, b, eps, rho_a, rho_b, out.value
    with pointers.on_device(C):
        kernel[(B,)](*problem, *outputs, *sizes, *options, **compiled)
        triton_solve.values[(B,)](*solution, N, M, *weights, sinkd, BLOCK=512)
    return out


def _by_many(problem: tuple[Tensor, ...], g: Tensor | None, max_iter: int, tol: float) -> Solution:
    """The solve by the passes of `sinkhorn_points`, without a history."""
    C, a, b, eps, *rho = problem
    batch = C.shape[:-2]
    g = torch.zeros_like(b) if g is None else g
    flat = (t.reshape(-1, *t.shape[len(batch) :]) for t in (C, a, b, eps, *rho, g))
    goal = torch.full_like(eps, tol_below(tol)).flatten() if tol > 0 else 0.0
    made = pointers.triton_kernels("points").given_triton(*flat, max_iter, goal)
    return Solution(*(t.reshape(batch + t.shape[1:]) for t in made), None)


def plan_triton(
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    scale: Tensor | None,
    sinkd: bool,
) -> Tensor:
    """``scale * P`` from the potentials."""
    *batch, N, M = C.shape
    P = C.new_empty(C.shape)
    if P.numel() == 0:
        return P
    C, f, g, a, b, eps, scale = pointers.flat(
        len(batch), pointers.with_rows(C), f, g, a, b, eps, scale
    )
    sizes = *strides(C, 3)[:2], *(n for t in (f, g, a, b) for n in strides(t, 2))
    grid = math.prod(batch), triton.cdiv(N, 16), triton.cdiv(M, 128)
    sizes = *sizes, *strides(eps, 1), *strides(scale, 1)
    with pointers.on_device(C):
        triton_backward.plan[grid](C, f, g, a, b, eps, scale, P, N, M, *sizes, sinkd, 16, 128)
    return P


def potentials_backward_triton(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    rho_b: Tensor,
    f: Tensor,
    g: Tensor,
    history: Tensor | None,
    n_iter: Tensor | None,
    df: Tensor,
    dg: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `potentials_backward_reference`; ``implicit`` is that.

    It is made of PyTorch's products, in float64.
    """
    problem = C, a, b, eps, rho_a, rho_b
    if mode == "implicit":
        return potentials_backward_reference(*problem, f, g, history, n_iter, df, dg, mode)
    *batch, N, M = C.shape
    dC, da, db = C.new_zeros(C.shape), C.new_zeros(*batch, N), C.new_zeros(*batch, M)
    if dC.numel() == 0:
        return dC, da, db
    df, dg = (torch.where(w > 0, t, 0).contiguous() for w, t in ((a, df), (b, dg)))
    C, a, b, eps, rho_a, rho_b = pointers.flat(len(batch), aligned(C), *problem[1:])
    _, blocks, warps = layout(N, M, C.dtype)
    sizes = N, M, *strides(C, 3)[:2], *problem_strides(a, b, eps, rho_a, rho_b), history.shape[-2]
    steps = history.contiguous(), n_iter.contiguous()
    with pointers.on_device(C):
        triton_backward.backward_unrolled[(math.prod(batch),)](
            *(C, a, b, eps, rho_a, rho_b, *steps, df, dg, dC, da, db, *sizes, *blocks),
            num_warps=warps,
            **MOST_REGISTERS,
        )
    return dC, da, db
