"""The tiles of the `triton` backend of `sinkhorn_points`: where their costs come from.

That is a matter of size (`plan_of`):

- few points: made once, and solved by one program for each problem, in one launch;
- few features: made anew in each pass, from differences, or from products on the matrix units;
- more features: made once and kept, where all of them fit into `STORED` bytes;
- else made once an iteration, some rows at a time: a panel of `PANEL` bytes stays in the cache for
  both passes, whose parts of the column sums are put together at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from otdd import backends
from otdd.ops.points.dense import mean_of
from otdd.ops.points.reference import Clouds
from otdd.ops.points.tuning import chosen

RESIDENT = 1 << 16  # costs of a problem that one program solves
STORED = 1 << 30  # bytes of the costs that are kept for a whole solve
PANEL = 1 << 25  # bytes of the costs that are kept from the row pass to the column pass
BY_DIFFERENCES = 16  # features up to which differences are cheaper than products
REMADE = {"differences": 16, "product": 64}  # features up to which a cost is made again, not read
THREE = 32  # the same of float32 as three products of TF32, where there is room to keep the costs
FEATURES = 16  # of a product's step: with 32, three products of TF32 and labels spill registers


class Plan(NamedTuple):
    """How the costs of a batch are made."""

    cost: str  # "product" or "differences"
    keep: str  # "resident", "nothing", "all" or "panels"
    group: int  # problems that are solved together
    rows: int  # of a panel


def plan_of(B: int, N: int, M: int, D: int, size: int, metric: str, precision: str) -> Plan:
    """See the module; `size` is that of a number in bytes.

    Distances that are small against the points lose digits in products: their square root loses
    half of them. So ``l2`` comes from differences unless less is allowed, and ``l1`` always.
    """
    by_products = metric == "sqeuclidean" or (metric == "l2" and precision != "highest")
    cost = "product" if by_products and D > BY_DIFFERENCES else "differences"
    few, problem = N * M <= RESIDENT, N * M * size
    remade = REMADE[cost]
    if cost == "product" and precision == "highest" and size == 4 and problem <= STORED:
        remade = min(remade, THREE)
    if remade >= D and not few:
        return Plan(cost, "nothing", B, N)
    if problem <= STORED:
        return Plan(cost, "resident" if few else "all", min(B, STORED // problem), N)
    return Plan(cost, "panels", 1, panel_of(N, M, size)[1])


def panel_of(N: int, M: int, size: int) -> tuple[int, int]:
    """Problems, and of each the rows, that a panel holds."""
    whole = PANEL // (N * M * size)
    return (whole, N) if whole else (1, max(1, PANEL // (M * size)))


@dataclass(frozen=True)
class Tiles:
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

    def swapped(self) -> Tiles:
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

    def rows(self, chosen: slice) -> Tiles:
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

    def problems(self, some: slice) -> Tiles:
        """Some problems of the batch."""
        fields = "x", "y", "norms_x", "norms_y"
        labels = self.labels and tuple(t[some] for t in self.labels)
        return replace(self, labels=labels, **{name: getattr(self, name)[some] for name in fields})

    def stored(self, C: Tensor) -> Tiles:
        """The same problems with their costs made."""
        return replace(self, x=C, y=C, labels=None, cost="stored")

    @property
    def kind(self) -> str:
        """What `tuning` measures sizes for."""
        if self.cost in ("stored", "across"):
            return "stored"
        return f"{self.cost} {self.precision}".strip()

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of a tile, powers of two, and the warps that share it; see NOTES for spills."""
        double = self.x.dtype == torch.float64
        side = 32 if double else 64
        wide = self.kind == "stored" or self.labels is not None
        sizes = {"BLOCK_N": side, "BLOCK_M": side, "num_warps": 8 if wide else 4, "num_stages": 2}
        sizes |= chosen(self.x.device, self.x.dtype, self.kind)
        for size, points in (("BLOCK_N", self.N), ("BLOCK_M", self.M)):
            sizes[size] = min(sizes[size], max(16, _power_of_two(points)))
        return sizes | {"BLOCK_D": FEATURES}

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


def tiles_of(p: Clouds, metric: str, precision: str, cost: str) -> Tiles:
    """Points as the kernels want them, of a problem with one batch dimension.

    For products they are centred between the two clouds' means: an offset that both have would cost
    digits. For differences the features go first, so that neighbours in a tile are neighbours.
    """
    N, M, D = p.x.shape[-2], p.y.shape[-2], p.x.shape[-1]
    x, y = p.x, p.y
    if cost == "product":
        centre = (mean_of(x, p.a) + mean_of(y, p.b)) / 2
        spare = -D % FEATURES
        x, y = (torch.nn.functional.pad(t - centre, (0, spare)) for t in (x, y))
        norms = tuple(torch.linalg.vector_norm(t, dim=-1).square() for t in (x, y))
        D += spare
    else:
        norms = x, y = x.mT.contiguous(), y.mT.contiguous()
    labels = None
    if p.label_cost is not None:
        labels = tuple(t.contiguous() for t in (p.labels_x, p.labels_y, p.label_cost))
    used = _multiplied(x, precision) if cost == "product" else ""
    if used == "tf32":
        x, y = tf32(x), tf32(y)
    return Tiles(x, y, *norms, labels, N, M, D, cost, metric, used)


def given_tiles(C: Tensor) -> Tiles:
    """Costs that are there, ``(B, N, M)`` contiguous."""
    return Tiles(C, C, C, C, None, *C.shape[1:], 1, "stored", "", "")


def tf32(t: Tensor) -> Tensor:
    """`t` rounded to the bits of TF32. The units would cut the others off, an error with a sign."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _multiplied(x: Tensor, precision: str) -> str:
    """How the matrix units multiply: float32 as three products of TF32, if they have those."""
    if x.dtype == torch.float64:
        return "ieee"
    if precision == "medium":
        return "bf16 interpreted" if backends.INTERPRETED else "bf16"
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if precision == "high" else "tf32x3"


def splits(programs: int, columns: int, processors: int) -> int:
    """Into how many programs the columns of a block of rows are cut.

    Two programs for each processor, and at least four tiles for each program; a power of two, as
    each number is a kernel of its own.
    """
    wanted = min(2 * processors // max(1, programs), columns // 4)
    return 1 << max(0, wanted.bit_length() - 1)
