"""Sums over the plan whose weights are no number of the row plus one of the column.

Some rows of the plan at a time, in plain PyTorch around the costs of each backend, in float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from otdd.ops.cost.cpu import cost_backward_cpu, cost_matrix_cpu
from otdd.ops.cost.reference import cost_backward_reference, cost_matrix_reference
from otdd.ops.points.reference import Clouds, label_costs
from otdd.ops.sinkhorn.reference import plan_from_potentials

# Entries of the plan that exist at a time: in the cache of a CPU, and enough for a GPU's launches.
_BLOCK, _BLOCK_OF_GPU = 1 << 18, 1 << 22


def blocks(
    p: Clouds, f: Tensor, g: Tensor, metric: str, backend: str
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of rows with their plan, and with the part of their cost that is of the points."""
    run = cost_matrix_cpu if backend == "cpu" else cost_matrix_reference
    most = _BLOCK_OF_GPU if p.x.is_cuda else _BLOCK
    step = max(1, most // max(1, p.eps.numel() * p.y.shape[-2]))
    for i in range(0, p.x.shape[-2], step):
        rows = slice(i, i + step)
        distance = run(p.x[..., rows, :], p.y, metric)
        C = distance + label_costs(p, rows)
        yield rows, plan_from_potentials(C, f[..., rows], g, p.a[..., rows], p.b, p.eps), distance


class Pullback:
    """Gradients of the points and of the costs between labels from those of the costs.

    They are gathered from blocks of rows, in place; a side that is not needed stays empty.
    """

    def __init__(
        self, p: Clouds, metric: str, backend: str, need_x: bool, need_y: bool, need_labels: bool
    ) -> None:
        self._p, self._metric = p, metric
        self._run = cost_backward_cpu if backend == "cpu" else cost_backward_reference
        self._needs = need_x, need_y
        self.dx, self.dy = (
            t.new_zeros(*t.shape[:-1], t.shape[-1] if needed else 0)
            for t, needed in ((p.x, need_x), (p.y, need_y))
        )
        labels = p.label_cost if need_labels else None
        self.dW = p.x.new_zeros((*p.eps.shape, 0, 0) if labels is None else labels.shape)
        if labels is not None:
            K, L = labels.shape[-2:]
            number = torch.arange(max(K, L), device=p.x.device)
            self._of_x = (p.labels_x.unsqueeze(-2) == number[:K].unsqueeze(-1)).to(p.x.dtype)
            self._of_y = (p.labels_y.unsqueeze(-1) == number[:L]).to(p.x.dtype)

    def costs(self, rows: slice, weights: Tensor, distance: Tensor) -> None:
        """Adds ``sum weights_ij dC_ij`` over some rows i."""
        if self.dW.shape[-1]:
            self.dW += self._of_x[..., rows] @ (weights @ self._of_y)
        if self._metric == "l2":
            weights = apart(weights, 2 * distance)
        metric = "l1" if self._metric == "l1" else "sqeuclidean"
        self._points(rows, weights, self._p.x, self._p.y, metric)

    def differences(self, rows: slice, weights: Tensor, x: Tensor, y: Tensor) -> None:
        """Adds ``2 sum weights_ij (x_i - y_j)`` to dx, over some rows i, and takes it from dy."""
        self._points(rows, weights, x, y, "sqeuclidean")

    def _points(self, rows: slice, weights: Tensor, x: Tensor, y: Tensor, metric: str) -> None:
        if not any(self._needs):
            return
        dx, dy = self._run(weights, x[..., rows, :], y, metric, *self._needs)
        if dx.shape[-1]:
            self.dx[..., rows, :] += dx
        if dy.shape[-1]:
            self.dy += dy


def apart(numerator: Tensor, distance: Tensor) -> Tensor:
    """``numerator / distance``; 0 where points coincide."""
    return torch.where(distance > 0, numerator / torch.where(distance > 0, distance, 1), 0)


def slopes(p: Clouds, wx: Tensor, wy: Tensor, rows: slice, distance: Tensor, metric: str) -> Tensor:
    """How the costs of some rows change as x moves along wx and y along wy; not for ``l1``."""
    centre = p.y.mean(-2, keepdim=True)
    x, y, u = p.x[..., rows, :] - centre, p.y - centre, wx[..., rows, :]
    own = (x * u).sum(-1).unsqueeze(-1) + (y * wy).sum(-1).unsqueeze(-2)
    inner = own - torch.cat([x, u], -1) @ torch.cat([wy, y], -1).mT
    return 2 * inner if metric == "sqeuclidean" else apart(inner, distance)
