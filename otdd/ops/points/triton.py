"""The `triton` backend of `sinkhorn_points`: tiles of the cost, streamed through the chip.

An iteration is two passes over the tiles, one for the rows and one for the columns. Where their
costs come from is a matter of size (`plan_of`):

- few features: made anew in each pass, from differences, or from products on the matrix units;
- many features: made once and kept, where all of them fit into `STORED` bytes;
- else made once an iteration, some rows at a time: a panel of `PANEL` bytes stays in the cache for
  both passes, whose parts of the column sums are put together at the end.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from otdd.ops.points import kernels
from otdd.ops.points.dense import weighted_sum
from otdd.ops.points.reference import Clouds, PointSolution
from otdd.ops.sinkhorn.reference import damping, dual_value, kept, weighted

STORED = 1 << 30  # bytes of the costs that are kept for a whole solve
PANEL = 1 << 25  # bytes of the costs that are kept from the row pass to the column pass
BY_DIFFERENCES = 16  # features up to which differences are cheaper than products
REMADE = 64  # features up to which a cost is made again rather than read
FEATURES = 16  # of a product's step: with 32, three products of TF32 and labels spill registers
LOG2_E = 1.4426950408889634
_POLL = 16  # iterations from one look at whether all problems have stopped to the next


class Plan(NamedTuple):
    """How the costs of a batch are made."""

    cost: str  # "product" or "differences"
    keep: str  # "nothing", "all" or "panels"
    group: int  # problems that are solved together
    rows: int  # of a panel


def plan_of(B: int, N: int, M: int, D: int, size: int, metric: str, precision: str) -> Plan:
    """See the module; `size` is that of a number in bytes.

    Distances that are small against the points lose digits in products: their square root loses
    half of them. So ``l2`` comes from differences unless less is allowed, and ``l1`` always.
    """
    by_products = metric == "sqeuclidean" or (metric == "l2" and precision != "highest")
    cost = "product" if by_products and D > BY_DIFFERENCES else "differences"
    remade = REMADE if cost == "product" else BY_DIFFERENCES
    if remade >= D:
        return Plan(cost, "nothing", B, N)
    problem = N * M * size
    if problem <= STORED:
        return Plan(cost, "all", min(B, STORED // problem), N)
    return Plan(cost, "panels", 1, min(N, max(1, PANEL // (M * size))))


@dataclass(frozen=True)
class _Tiles:
    """Problems as the kernels take them: where costs come from, for rows and for columns."""

    x: Tensor  # (B, N, D) centred and padded, (B, D, N), or the costs (B, N, M)
    y: Tensor
    norms_x: Tensor
    norms_y: Tensor
    labels: tuple[Tensor, Tensor, Tensor] | None
    N: int
    M: int
    D: int
    cost: str  # "product", "differences", or of what is stored "stored", and "across" its columns
    metric: str
    precision: str

    def swapped(self) -> _Tiles:
        """Columns for rows."""
        labels = self.labels
        return replace(
            self,
            x=self.y,
            y=self.x,
            norms_x=self.norms_y,
            norms_y=self.norms_x,
            labels=labels and (labels[1], labels[0], labels[2].mT.contiguous()),
            N=self.M,
            M=self.N,
            cost={"stored": "across", "across": "stored"}.get(self.cost, self.cost),
        )

    def rows(self, chosen: slice) -> _Tiles:
        """Some rows of the only problem."""
        by_rows = self.cost == "product"
        labels = self.labels
        return replace(
            self,
            x=self.x[:, chosen] if by_rows else self.x[..., chosen].contiguous(),
            norms_x=self.norms_x[:, chosen],
            labels=labels and (labels[0][:, chosen], *labels[1:]),
            N=len(range(self.N)[chosen]),
        )

    def stored(self, C: Tensor) -> _Tiles:
        """The same problems with their costs made."""
        return replace(self, x=C, y=C, labels=None, cost="stored")

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of a tile, powers of two, and the warps that share it; see NOTES for spills."""
        double = self.x.dtype == torch.float64
        n, m = (min(32 if double else 64, max(16, _power_of_two(k))) for k in (self.N, self.M))
        sizes = {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": FEATURES}
        wide = self.cost in ("stored", "across") or (double and self.labels is not None)
        return sizes | {"num_warps": 8 if wide else 4, "num_stages": 2}

    def sources(self) -> dict[str, object]:
        """Arguments of the kernels that say where costs come from."""
        of_x, of_y, W = self.labels or (self.x, self.x, self.x)
        K, L = W.shape[-2:]
        return {
            "x": self.x,
            "y": self.y,
            "norms_x": self.norms_x,
            "norms_y": self.norms_y,
            "labels_x": of_x,
            "labels_y": of_y,
            "label_cost": W,
            "K": K,
            "L": L,
            "N": self.N,
            "M": self.M,
            "D": self.D,
            "stride_problem_x": self.x.stride(0),
            "stride_problem_y": self.y.stride(0),
            "COST": self.cost,
            "METRIC": self.metric,
            "LABELS": self.labels is not None,
            "PRECISION": self.precision,
            **self.shape,
        }


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tiles(p: Clouds, metric: str, precision: str, cost: str) -> _Tiles:
    """Points as the kernels want them, of a problem with one batch dimension.

    For products they are centred between the two clouds' means: an offset that both have would cost
    digits. For differences the features go first, so that neighbours in a tile are neighbours.
    """
    N, M, D = p.x.shape[-2], p.y.shape[-2], p.x.shape[-1]
    x, y = p.x, p.y
    if cost == "product":
        centre = (_mean(x, p.a) + _mean(y, p.b)) / 2
        spare = -D % FEATURES
        x, y = (torch.nn.functional.pad(t - centre, (0, spare)) for t in (x, y))
        norms = (torch.linalg.vector_norm(t, dim=-1).square() for t in (x, y))
        D += spare
    else:
        norms = x, y = x.mT.contiguous(), y.mT.contiguous()
    labels = None
    if p.label_cost is not None:
        labels = tuple(t.contiguous() for t in (p.labels_x, p.labels_y, p.label_cost))
    used = _multiplied(x, precision) if cost == "product" else ""
    return _Tiles(x, y, *norms, labels, N, M, D, cost, metric, used)


def _multiplied(x: Tensor, precision: str) -> str:
    """How the matrix units multiply: float32 as three products of TF32, if they have those."""
    if x.dtype == torch.float64:
        return "ieee"
    if precision == "medium":
        return "bf16" if x.is_cuda else "bf16 interpreted"
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if precision == "high" else "tf32x3"


def _mean(x: Tensor, w: Tensor) -> Tensor:
    """Of the points of weight > 0, ``(B, 1, D)``: a masked one may be anywhere."""
    w = (w / w.sum(-1, keepdim=True)).unsqueeze(-1)
    return torch.where(w > 0, w * x, 0).sum(-2, keepdim=True)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(programs: int, columns: int, processors: int) -> int:
    """Into how many programs the columns of a block of rows are cut.

    Two programs for each processor, and at least four tiles for each program; a power of two, as
    each number is a kernel of its own.
    """
    wanted = min(2 * processors // max(1, programs), columns // 4)
    return 1 << max(0, wanted.bit_length() - 1)


def _on(t: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


class _Scales(NamedTuple):
    """Numbers of each problem, ``(B,)`` in the dtype of the points."""

    scale: Tensor  # log2(e) / eps
    damp_a: Tensor
    damp_b: Tensor
    one: Tensor
    active: Tensor  # int32


def _softmin(
    tiles: _Tiles,
    potential: Tensor,
    log2_weight: Tensor,
    out: Tensor,
    scales: _Scales,
    damp: Tensor,
    stops: bool,
    raw: bool = False,
) -> None:
    """Row potentials into `out`, ``(B, N)``; `raw`: the logarithms of their sums."""
    B, shape = len(potential), tiles.shape
    programs = B * -(-tiles.N // shape["BLOCK_N"])
    tiles_across = -(-tiles.M // shape["BLOCK_M"])
    cuts = 1 if raw else splits(programs, tiles_across, _processors(potential.device))
    parts = out if cuts == 1 else out.new_empty(cuts, B, tiles.N)
    kernels.softmin_kernel[(programs, cuts)](
        parts,
        potential,
        log2_weight,
        scales.scale,
        damp,
        scales.active,
        B=B,
        SPLITS=cuts,
        RAW=raw or cuts > 1,
        STOPS=stops,
        **tiles.sources(),
    )
    if cuts > 1:
        _merge(parts, out, scales, damp, stops)


def _merge(parts: Tensor, out: Tensor, scales: _Scales, damp: Tensor, stops: bool) -> None:
    count, B, N = parts.shape
    grid = (B * -(-N // 128),)
    rest = scales.scale, damp, scales.active, count, B, N
    kernels.merge_kernel[grid](out, parts, *rest, STOPS=stops, BLOCK=128)


class _Whole:
    """Passes over all tiles, whose costs are made anew or are all there."""

    def __init__(self, tiles: _Tiles, log2_a: Tensor, log2_b: Tensor, scales: _Scales) -> None:
        self.tiles, self.across = tiles, tiles.swapped()
        self.log2_a, self.log2_b, self.scales = log2_a, log2_b, scales

    def rows(self, g: Tensor, out: Tensor, damp: Tensor, stops: bool) -> None:
        _softmin(self.tiles, g, self.log2_b, out, self.scales, damp, stops)

    def columns(self, f: Tensor, out: Tensor, stops: bool) -> None:
        _softmin(self.across, f, self.log2_a, out, self.scales, self.scales.damp_b, stops)


class _Panels:
    """Passes over one problem, some rows at a time: their costs are made once for both."""

    def __init__(
        self, tiles: _Tiles, log2_a: Tensor, log2_b: Tensor, scales: _Scales, height: int
    ) -> None:
        self.log2_a, self.log2_b, self.scales = log2_a, log2_b, scales
        self.slices = [slice(i, i + height) for i in range(0, tiles.N, height)]
        self.tiles = [tiles.rows(chosen) for chosen in self.slices]
        self.costs = log2_a.new_empty(1, height, tiles.M)
        self.parts = log2_a.new_empty(len(self.slices), 1, tiles.M)

    def rows(self, g: Tensor, out: Tensor, damp: Tensor, stops: bool) -> None:
        scales = self.scales
        for k, (chosen, tiles) in enumerate(zip(self.slices, self.tiles, strict=True)):
            panel = tiles.stored(_costs(tiles, self.costs[:, : tiles.N]))
            f = out[:, chosen]
            _softmin(panel, g, self.log2_b, f, scales, damp, stops)
            f = f if damp is scales.damp_a else f * scales.damp_a
            rest = self.log2_a[:, chosen], self.parts[k], scales, scales.damp_b, stops
            _softmin(panel.swapped(), f, *rest, raw=True)

    def columns(self, f: Tensor, out: Tensor, stops: bool) -> None:
        _merge(self.parts, out, self.scales, self.scales.damp_b, stops)


def _costs(tiles: _Tiles, out: Tensor) -> Tensor:
    """All costs, ``(B, N, M)``."""
    _fill(tiles, out, *(None,) * 8)
    return out


def _fill(
    tiles: _Tiles,
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


class _Watch:
    """Looks now and then whether every problem has stopped, without waiting for the device."""

    def __init__(self, active: Tensor) -> None:
        self.active, self.seen, self.event = active, None, None

    def over(self, iteration: int) -> bool:
        if self.active.device.type != "cuda":
            return not bool(self.active.any())
        if torch.cuda.is_current_stream_capturing():
            return False
        if self.event is not None and self.event.query():
            if not bool(self.seen):
                return True
            self.event = None
        if self.event is None and iteration % _POLL == 0:
            self.seen = torch.empty((), dtype=torch.bool, pin_memory=True)
            self.seen.copy_(self.active.any(), non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        return False


def points_triton(
    p: Clouds, g: Tensor, metric: str, max_iter: int, tol: float | Tensor, precision: str
) -> PointSolution:
    """See `points_reference`."""
    batch = p.x.shape[:-2]
    p, g, *tolerance = _flat(p, g, *([tol] if isinstance(tol, Tensor) else []))
    B, (N, D), M = len(p.x), p.x.shape[-2:], p.y.shape[-2]
    plan = plan_of(B, N, M, D, p.x.element_size(), metric, precision)
    parts = []
    with _on(p.x):
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
    dtype, B = p.x.dtype, len(p.x)
    log2_a, log2_b = p.a.log2().contiguous(), p.b.log2().contiguous()
    damp_a, damp_b = (damping(rho, p.eps, dtype).flatten() for rho in (p.rho_a, p.rho_b))
    active = torch.ones(B, dtype=torch.int32, device=p.x.device)
    scale = (LOG2_E / p.eps).to(dtype)
    scales = _Scales(scale, damp_a, damp_b, torch.ones_like(scale), active)
    tiles = _tiles(p, metric, precision, plan.cost)
    if plan.keep == "panels":
        passes = _Panels(tiles, log2_a, log2_b, scales, plan.rows)
    else:
        if plan.keep == "all":
            tiles = tiles.stored(_costs(tiles, p.x.new_empty(B, tiles.N, tiles.M)))
        passes = _Whole(tiles, log2_a, log2_b, scales)
    f, g, n_iter = _iterate(passes, p, g, scales, max_iter, tol)
    one, none = torch.ones_like(f), torch.zeros_like(g)
    ones, zero = none.unsqueeze(-1) + 1, torch.zeros_like(p.eps)
    options = metric, "value", False, precision
    sums = product_triton(p, f, g, one, none, zero, ones, *options).squeeze(-1)
    costs = product_triton(p, f, g, 0 * one, none, zero + 1, ones, *options).squeeze(-1)
    error = (sums - weighted(p.a, kept(f, p.rho_a))).abs().sum(-1)
    value = dual_value(f, g, p.a, p.b, p.eps, p.rho_a, p.rho_b)
    return PointSolution(f, g, value, costs.sum(-1), error, n_iter)


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
        for _ in range(max_iter):
            passes.rows(g, f, scales.damp_a, False)
            passes.columns(f, g, False)
        return f, g, torch.full_like(p.eps, max_iter, dtype=torch.int64)
    n_iter = torch.zeros_like(p.eps, dtype=torch.int64)
    f_next, a, watch = torch.empty_like(f), p.a.contiguous(), _Watch(scales.active)
    goal = (tol if isinstance(tol, Tensor) else torch.full_like(p.eps, tol)).to(f.dtype)
    rate = (LOG2_E / p.rho_a).to(f.dtype)
    rest = scales.scale, scales.damp_a, rate, goal.contiguous(), scales.active, n_iter, f.shape[-1]
    for k in range(max_iter):
        passes.rows(g, f_next, scales.one, True)
        kernels.decide_kernel[(len(f),)](f, f_next, a, *rest, STARTED=k > 0, BLOCK=256)
        passes.columns(f, g, True)
        if watch.over(k):
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
    most = PANEL // p.x.element_size() // (N * M)  # problems in a panel
    height = N if most else max(1, PANEL // p.x.element_size() // M)
    group = max(1, most)
    dtype = p.x.dtype
    log2 = [w.log2().contiguous() for w in (p.a, p.b)]
    per_row = [t.contiguous() for t in (f, log2[0], u)]
    per_column = [t.contiguous() for t in (g, log2[1], v)]
    kappa, scale = kappa.to(dtype).contiguous(), (LOG2_E / p.eps).to(dtype)
    with _on(p.x):
        tiles = _tiles(p, metric, precision, plan.cost)
        for k in range(0, B, group):
            some = slice(k, k + group)
            these = _problems(tiles, some)
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
                out[some, rows] = weighted_sum(w, x, z[some], mode, "triton")
    return out.reshape(*batch, *out.shape[1:])


def _problems(tiles: _Tiles, some: slice) -> _Tiles:
    fields = "x", "y", "norms_x", "norms_y"
    labels = tiles.labels and tuple(t[some] for t in tiles.labels)
    return replace(tiles, labels=labels, **{name: getattr(tiles, name)[some] for name in fields})
