"""The `triton` backend of `sinkhorn_points`: tiles of the cost, streamed through the chip.

An iteration is two passes over the tiles, one for the rows and one for the columns; `tiles` says
where their costs come from. Few costs are solved as given ones are, in one launch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from otdd.ops.graphs import repeated
from otdd.ops.pointers import on_device, triton_kernels
from otdd.ops.points import kernels
from otdd.ops.points.dense import weighted_sum
from otdd.ops.points.reference import Clouds, PointSolution
from otdd.ops.points.tiles import (
    Plan,
    Tiles,
    given_tiles,
    panel_of,
    plan_of,
    splits,
    tiles_of,
)
from otdd.ops.sinkhorn.reference import damping, dual_value, kept, weighted
from otdd.ops.watch import Watch

LOG2_E = 1.4426950408889634
_LOOK = 16  # iterations from one look at whether all problems have stopped to the next


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Scales(NamedTuple):
    """Numbers of each problem, ``(B,)`` in the dtype of the points."""

    scale: Tensor  # log2(e) / eps
    damp_a: Tensor
    damp_b: Tensor
    one: Tensor
    active: Tensor  # int32


def _softmin(
    tiles: Tiles,
    potential: Tensor,
    log2_weight: Tensor,
    out: Tensor,
    scales: _Scales,
    damp: Tensor,
    stops: bool,
    scratch: Tensor | None = None,
) -> None:
    """Row potentials into `out`, ``(B, N)``; without `scratch` the logarithms of their sums."""
    B, parts = len(potential), out
    programs, cuts = _grid(tiles, B, potential.device)
    if scratch is None:
        cuts = 1
    elif cuts > 1:
        parts = scratch[: cuts * B * tiles.N].view(cuts, B, tiles.N)
    kernels.softmin_kernel[(programs, cuts)](
        parts,
        potential,
        log2_weight,
        scales.scale,
        damp,
        scales.active,
        B=B,
        SPLITS=cuts,
        RAW=scratch is None or cuts > 1,
        STOPS=stops,
        **tiles.sources(),
    )
    if cuts > 1:
        _merge(parts, out, scales, damp, stops)


def _grid(tiles: Tiles, B: int, device: torch.device) -> tuple[int, int]:
    """Programs, and the parts that columns are cut in, so that every processor has some work."""
    shape = tiles.shape
    programs = B * -(-tiles.N // shape["BLOCK_N"])
    return programs, splits(programs, -(-tiles.M // shape["BLOCK_M"]), _processors(device))


def _scratch(like: Tensor, *passes: Tiles) -> Tensor:
    """Memory for the parts of any of these passes."""
    B = len(like)
    return like.new_empty(max(_grid(some, B, like.device)[1] * B * some.N for some in passes))


def _merge(parts: Tensor, out: Tensor, scales: _Scales, damp: Tensor, stops: bool) -> None:
    count, B, N = parts.shape
    grid = (B * -(-N // 128),)
    rest = scales.scale, damp, scales.active, count, B, N
    kernels.merge_kernel[grid](out, parts, *rest, STOPS=stops, BLOCK=128)


class _Whole:
    """Passes over all tiles, whose costs are made anew or are all there.

    Nothing is allocated in a pass, of which a graph may be made.
    """

    launches = 4  # of both passes, where their columns are cut

    def __init__(self, tiles: Tiles, log2_a: Tensor, log2_b: Tensor, scales: _Scales) -> None:
        self.tiles, self.across = tiles, tiles.swapped()
        self.log2_a, self.log2_b, self.scales = log2_a, log2_b, scales
        self.scratch = _scratch(log2_a, self.tiles, self.across)

    def rows(self, g: Tensor, out: Tensor, damp: Tensor, stops: bool) -> None:
        _softmin(self.tiles, g, self.log2_b, out, self.scales, damp, stops, self.scratch)

    def columns(self, f: Tensor, out: Tensor, stops: bool) -> None:
        rest = self.scales, self.scales.damp_b, stops, self.scratch
        _softmin(self.across, f, self.log2_a, out, *rest)


class _Panels:
    """Passes over one problem, some rows at a time: their costs are made once for both.

    Nothing is allocated in a pass, as above.
    """

    def __init__(
        self, tiles: Tiles, log2_a: Tensor, log2_b: Tensor, scales: _Scales, height: int
    ) -> None:
        self.log2_a, self.log2_b, self.scales = log2_a, log2_b, scales
        self.slices = [slice(i, i + height) for i in range(0, tiles.N, height)]
        self.tiles = [tiles.rows(chosen) for chosen in self.slices]
        self.costs = log2_a.new_empty(1, height, tiles.M)
        self.parts = log2_a.new_empty(len(self.slices), 1, tiles.M)
        self.scratch = _scratch(log2_a, *(some.stored(self.costs) for some in self.tiles))
        self.damped = torch.empty_like(log2_a)
        self.launches = 4 * len(self.slices) + 1

    def rows(self, g: Tensor, out: Tensor, damp: Tensor, stops: bool) -> None:
        scales = self.scales
        for k, (chosen, tiles) in enumerate(zip(self.slices, self.tiles, strict=True)):
            panel = tiles.stored(_costs(tiles, self.costs[:, : tiles.N]))
            f = out[:, chosen]
            _softmin(panel, g, self.log2_b, f, scales, damp, stops, self.scratch)
            if damp is not scales.damp_a:
                f = torch.mul(f, scales.damp_a, out=self.damped[:, chosen])
            rest = self.log2_a[:, chosen], self.parts[k], scales, scales.damp_b, stops
            _softmin(panel.swapped(), f, *rest)

    def columns(self, f: Tensor, out: Tensor, stops: bool) -> None:
        _merge(self.parts, out, self.scales, self.scales.damp_b, stops)


def _costs(tiles: Tiles, out: Tensor) -> Tensor:
    """All costs, ``(B, N, M)``."""
    _fill(tiles, out, *(None,) * 8)
    return out


def _fill(
    tiles: Tiles,
    out: Tensor,
    f: Tensor | None,
    g: Tensor | None,
    log2_a: Tensor | None,
    log2_b: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    kappa: Tensor | None,
    scale: Tensor | None,
    over_distance: bool = False,
) -> None:
    """Costs, or with potentials the weights ``P_ij (u_i + v_j + kappa C_ij)``, into `out`."""
    shape = tiles.shape
    grid = (len(out) * -(-tiles.N // shape["BLOCK_N"]) * -(-tiles.M // shape["BLOCK_M"]),)
    given = (out if t is None else t for t in (f, g, log2_a, log2_b, u, v, kappa, scale))
    plan = f is not None
    kernels.tile_kernel[grid](
        out, *given, PLAN=plan, OVER_DISTANCE=over_distance, **tiles.sources()
    )


def points_triton(
    p: Clouds, g: Tensor, metric: str, max_iter: int, tol: float | Tensor, precision: str
) -> PointSolution:
    """See `points_reference`."""
    batch = p.x.shape[:-2]
    p, g, *tolerance = _flat(p, g, *([tol] if isinstance(tol, Tensor) else []))
    B, (N, D), M = len(p.x), p.x.shape[-2:], p.y.shape[-2]
    plan = plan_of(B, N, M, D, p.x.element_size(), metric, precision)
    parts = []
    with on_device(p.x):
        for k in range(0, B, max(1, plan.group)):
            some = slice(k, k + plan.group)
            one = Clouds(*(None if t is None else t[some] for t in p))
            goal = tolerance[0][some] if tolerance else tol
            parts.append(_solve(one, g[some], metric, max_iter, goal, precision, plan))
    if not parts:
        parts.append(_nothing(p))
    joined = parts[0] if len(parts) == 1 else (torch.cat(t) for t in zip(*parts, strict=True))
    return PointSolution(*(t.reshape(batch + t.shape[1:]) for t in joined))


def _flat(p: Clouds, *others: Tensor) -> tuple:
    """Tensors with one batch dimension."""
    dims = p.eps.dim()
    flat = lambda t: None if t is None else t.reshape(p.eps.numel(), *t.shape[dims:])  # noqa: E731
    return Clouds(*map(flat, p)), *map(flat, others)


def _nothing(p: Clouds) -> PointSolution:
    number = p.x.new_empty(0)
    none = torch.empty(0, dtype=torch.int64, device=p.x.device)
    return PointSolution(p.a.clone(), p.b.clone(), number, number, number, none)


def _begin(p: Clouds) -> tuple[Tensor, Tensor, _Scales]:
    """Base-2 logarithms of the weights, and the numbers of each problem."""
    log2_a, log2_b = p.a.log2().contiguous(), p.b.log2().contiguous()
    damp_a, damp_b = (damping(rho, p.eps, p.a.dtype).flatten() for rho in (p.rho_a, p.rho_b))
    active = torch.ones(len(p.a), dtype=torch.int32, device=p.a.device)
    scale = (LOG2_E / p.eps).to(p.a.dtype)
    return log2_a, log2_b, _Scales(scale, damp_a, damp_b, torch.ones_like(scale), active)


def _solve(
    p: Clouds,
    g: Tensor,
    metric: str,
    max_iter: int,
    tol: float | Tensor,
    precision: str,
    plan: Plan,
) -> PointSolution:
    """Problems that are solved together."""
    made = tiles_of(p, metric, precision, plan.cost)
    if plan.keep in ("resident", "all"):
        made = made.stored(_costs(made, p.x.new_empty(len(p.x), made.N, made.M)))
    if plan.keep == "resident" and not isinstance(tol, Tensor):  # its kernel takes one for all
        run = triton_kernels("sinkhorn").sinkhorn_triton
        solved = run(made.x, *p[2:7], g, max_iter, tol, keep_history=False, sinkd=False)
        return PointSolution(*solved[:6])
    log2_a, log2_b, scales = _begin(p)
    if plan.keep == "panels":
        passes = _Panels(made, log2_a, log2_b, scales, plan.rows)
    else:
        passes = _Whole(made, log2_a, log2_b, scales)
    f, g, n_iter = _iterate(passes, p, g, scales, max_iter, tol)
    one, none = torch.ones_like(f), torch.zeros_like(g)
    ones, zero = none.unsqueeze(-1) + 1, torch.zeros_like(p.eps)
    options = metric, "value", False, precision
    sums = product_triton(p, f, g, one, none, zero, ones, *options).squeeze(-1)
    costs = product_triton(p, f, g, 0 * one, none, zero + 1, ones, *options).squeeze(-1)
    error = (sums - weighted(p.a, kept(f, p.rho_a))).abs().sum(-1)
    value = dual_value(f, g, p.a, p.b, p.eps, p.rho_a, p.rho_b)
    return PointSolution(f, g, value, costs.sum(-1), error, n_iter)


def given_triton(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor,
    rho_b: Tensor,
    g: Tensor,
    max_iter: int,
    tol: float | Tensor,
) -> PointSolution:
    """The solve of costs that are given, ``(B, N, M)``; a chip of programs for each problem.

    They are read twice an iteration, and twice after the last.
    """
    C = C.contiguous()
    p = Clouds(C, C, a, b, eps, rho_a, rho_b, None, None, None)
    with on_device(C):
        log2_a, log2_b, scales = _begin(p)
        passes = _Whole(given_tiles(C), log2_a, log2_b, scales)
        f, g, n_iter = _iterate(passes, p, g, scales, max_iter, tol)
        undamped = torch.empty_like(f)
        passes.rows(g, undamped, scales.one, False)
        e = eps.to(f.dtype).unsqueeze(-1)
        off = torch.exp((f - undamped) / e) - kept(f, rho_a)  # of the rows of the plan
        value = dual_value(f, g, a, b, eps, rho_a, rho_b)
        cost = _given_cost(C, f, g, log2_a, log2_b, scales)
    return PointSolution(f, g, value, cost, weighted(a, off).abs().sum(-1), n_iter)


def _given_cost(
    C: Tensor, f: Tensor, g: Tensor, log2_a: Tensor, log2_b: Tensor, scales: _Scales
) -> Tensor:
    """``<P, C>``, ``(B,)``, some rows at a time."""
    (B, N, M), total = C.shape, torch.zeros_like(scales.scale)
    group, height = panel_of(N, M, C.element_size())
    for k in range(0, B, group):
        some = slice(k, k + group)
        for i in range(0, N, height):
            part = C[some, i : i + height]
            fs, la = (t[some, i : i + height].contiguous() for t in (f, log2_a))
            gs, lb = g[some], log2_b[some]
            rest = fs, gs, la, lb, torch.zeros_like(fs), torch.zeros_like(gs), scales.one[some]
            out = torch.empty_like(part)
            _fill(given_tiles(part), out, *rest, scales.scale[some])
            total[some] += out.sum((-1, -2))
    return total


def _iterate(
    passes: _Whole | _Panels,
    p: Clouds,
    g: Tensor,
    scales: _Scales,
    max_iter: int,
    tol: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials, and how many iterations each problem took."""
    f = torch.zeros_like(p.a, memory_format=torch.contiguous_format)
    g = g.clone(memory_format=torch.contiguous_format)
    if not isinstance(tol, Tensor) and tol <= 0:

        def both(_: int) -> None:
            passes.rows(g, f, scales.damp_a, False)
            passes.columns(f, g, False)

        for _ in repeated(both, max_iter, passes.launches, f.device):
            pass
        return f, g, torch.full_like(p.eps, max_iter, dtype=torch.int64)
    n_iter = torch.zeros_like(p.eps, dtype=torch.int64)
    f_next, a, watch = torch.empty_like(f), p.a.contiguous(), Watch(_LOOK, waits=False)
    goal = (tol if isinstance(tol, Tensor) else torch.full_like(p.eps, tol)).to(f.dtype)
    rate = (LOG2_E / p.rho_a).to(f.dtype)
    rest = scales.scale, scales.damp_a, rate, goal.contiguous(), scales.active, n_iter, f.shape[-1]

    def until_met(k: int) -> None:
        passes.rows(g, f_next, scales.one, True)
        kernels.decide_kernel[(len(f),)](f, f_next, a, *rest, STARTED=k > 0, BLOCK=256)
        passes.columns(f, g, True)

    for done in repeated(until_met, max_iter, passes.launches + 1, f.device):
        if watch.over(done - 1, scales.active):
            break
    return f, g, n_iter


def product_triton(
    p: Clouds,
    f: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor,
    kappa: Tensor,
    z: Tensor,
    metric: str,
    mode: str,
    over_distance: bool,
    precision: str,
) -> Tensor:
    """See `product_reference`; the weights of some rows at a time, then a library's product."""
    batch = p.x.shape[:-2]
    p, f, g, u, v, kappa, z = _flat(p, f, g, u, v, kappa, z)
    B, N, M = len(p.x), p.x.shape[-2], p.y.shape[-2]
    plan = plan_of(B, N, M, p.x.shape[-1], p.x.element_size(), metric, precision)
    out = p.x.new_empty(B, N, z.shape[-1])
    group, height = panel_of(N, M, p.x.element_size())
    dtype = p.x.dtype
    log2 = [w.log2().contiguous() for w in (p.a, p.b)]
    per_row = [t.contiguous() for t in (f, log2[0], u)]
    per_column = [t.contiguous() for t in (g, log2[1], v)]
    kappa, scale = kappa.to(dtype).contiguous(), (LOG2_E / p.eps).to(dtype)
    with on_device(p.x):
        made = tiles_of(p, metric, precision, plan.cost)
        for k in range(0, B, group):
            some = slice(k, k + group)
            these = made.problems(some)
            for i in range(0, N, height):
                rows = slice(i, i + height)
                part = these if height == N else these.rows(rows)
                w = out.new_empty(len(part.x), part.N, M)
                of_row = (t[some, rows] for t in per_row)
                fs, la, us = (t.contiguous() for t in of_row)
                gs, lb, vs = (t[some] for t in per_column)
                rest = fs, gs, la, lb, us, vs, kappa[some], scale[some], over_distance
                _fill(part, w, *rest)
                x = p.x[some, rows]
                out[some, rows] = weighted_sum(w, x, z[some], p.b[some], mode, "triton")
    return out.reshape(*batch, *out.shape[1:])
