"""Transport distances between all classes of labelled points, in few batched calls.

Classes of similar sizes share a tensor, padded with points of weight 0; one call then solves a
class against all of a tensor. Padding at most doubles the points, and no pair of classes is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from otdd.ops import checks
from otdd.ops.divergence import half_within
from otdd.ops.matmul import matmul, product
from otdd.ops.points import sinkhorn_points

SPREAD = 2  # the largest over the smallest class of one tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Some classes of every problem, or what a distance needs of them.

    Attributes:
        tensors: Each over ``(B, classes, ...)``; of a new group points ``(B, classes, width, D)``
            and weights ``(B, classes, width)`` of mass 1.
        sizes: Points of each class, in the problem where it has most.
    """

    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    def part(self, first: int, last: int) -> Group:
        tensors = tuple(t.narrow(1, first, last - first) for t in self.tensors)
        return Group(tensors, self.sizes[first:last])


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of one side.

    Attributes:
        groups: From the smallest classes to the largest.
        place: Where each class is in that order, ``(K,)``.
        empty: Whether a problem has no point of a class, ``(B, K)``; it is then given one.
    """

    groups: list[Group]
    place: Tensor
    empty: Tensor


class Distance(Protocol):
    """How far classes are from each other, and from themselves."""

    def prepared(self, group: Group) -> Group:
        """What is made once for each class."""

    def diagonal(self, group: Group) -> Tensor:
        """Distances ``(B, classes)`` of classes from themselves."""

    def between(self, row: Group, group: Group) -> Tensor:
        """Distances ``(B, classes)`` of one class from those of a group."""


def sizes_of(labels: Tensor, K: int) -> Tensor:
    """Points of each class, ``(B, K)``, for labels ``(B, N)`` from 0 to K - 1."""
    zeros = labels.new_zeros(labels.shape[0], K)
    return zeros.scatter_add_(-1, labels, torch.ones_like(labels))


def classes_of(points: Tensor, labels: Tensor, counts: Tensor, sizes: list[int]) -> Classes:
    """Points ``(B, N, D)`` by class.

    Args:
        points: The points; differentiable.
        labels: From 0 to K - 1, ``(B, N)``.
        counts: Their `sizes_of`.
        sizes: The largest of each class over the batch, sorted: all that is known to the host.
    """
    order = counts.amax(0).argsort()
    by_class = labels.argsort(dim=-1, stable=True)
    start = counts.cumsum(-1) - counts
    B, N, D = points.shape
    places = torch.arange(N, device=points.device)
    first_row = torch.arange(B, device=points.device).unsqueeze(-1) * N
    rows = points.reshape(B * N, D)
    groups, first = [], 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and sizes[last] <= SPREAD * max(1, sizes[first]):
            last += 1
        width = max(1, sizes[last - 1])
        chosen, place = order.narrow(0, first, last - first), places.narrow(0, 0, width)
        count = counts.index_select(1, chosen).unsqueeze(-1).clamp(min=1)
        at = start.index_select(1, chosen).unsqueeze(-1) + place
        at = by_class.gather(1, at.clamp(max=N - 1).flatten(1)) + first_row
        # A point comes up once, and again only as padding, whose gradient is 0.
        cloud = rows.index_select(0, at.flatten()).reshape(B, last - first, width, D)
        weights = (place < count).to(points.dtype) / count
        groups.append(Group((cloud, weights), tuple(sizes[first:last])))
        first = last
    return Classes(groups, order.argsort(), counts == 0)


def between_classes(rows: Classes, columns: Classes, distance: Distance) -> Tensor:
    """Distances of all classes of two sides, ``(B, K, L)``; 0 for an empty class."""
    lines = [
        torch.cat([distance.between(row, group) for group in columns.groups], -1)
        for row in _each(rows)
    ]
    table = torch.stack(lines, 1).index_select(1, rows.place).index_select(2, columns.place)
    return table.masked_fill(rows.empty.unsqueeze(-1) | columns.empty.unsqueeze(-2), 0)


def within_classes(classes: Classes, distance: Distance) -> Tensor:
    """Distances of the classes of one side, ``(B, K, K)``; each pair once."""
    own = torch.cat([distance.diagonal(group) for group in classes.groups], -1)
    lines = []
    for k, row in enumerate(_each(classes)):
        parts, first = [own.new_zeros(own.shape[0], k + 1)], 0
        for group in classes.groups:
            count = len(group.sizes)
            if first + count > k + 1:
                later = group.part(max(0, k + 1 - first), count)
                parts.append(distance.between(row, later))
            first += count
        lines.append(torch.cat(parts, -1))
    upper = torch.stack(lines, 1)
    table = upper + upper.mT + torch.diag_embed(own)
    table = table.index_select(1, classes.place).index_select(2, classes.place)
    return table.masked_fill(classes.empty.unsqueeze(-1) | classes.empty.unsqueeze(-2), 0)


def prepared(classes: Classes, distance: Distance) -> Classes:
    return replace(classes, groups=[distance.prepared(group) for group in classes.groups])


def _each(classes: Classes) -> Iterator[Group]:
    for group in classes.groups:
        for k in range(len(group.sizes)):
            yield group.part(k, k + 1)


class Sinkhorn:
    """Entropic transport between classes, by default less its bias.

    Args:
        debias: Subtract the halves of the transport of each class to itself.
        options: Of `sinkhorn_points`.
    """

    def __init__(self, debias: bool, **options: Any) -> None:
        self.debias, self.options = debias, options

    def prepared(self, group: Group) -> Group:
        x, a = group.tensors
        solved = sinkhorn_points(x, x, a, a, **self.options)
        if not self.debias:
            return replace(group, tensors=(x, a, solved.value, torch.zeros_like(solved.g)))
        return replace(group, tensors=(x, a, *half_within(solved)))

    def diagonal(self, group: Group) -> Tensor:
        own = group.tensors[2]
        return torch.zeros_like(own) if self.debias else own

    def between(self, row: Group, group: Group) -> Tensor:
        (x, a, half_x, _), (size,) = row.tensors, row.sizes
        y, b, half_y, start = group.tensors
        count, size = y.shape[1], max(1, size)
        x, a = (t.narrow(2, 0, size) for t in (x, a))
        x, a = x.expand(-1, count, -1, -1), a.expand(-1, count, -1)
        value = sinkhorn_points(x, y, a, b, init=(None, start), **self.options).value
        return value - half_x - half_y if self.debias else value


class Gaussian:
    """Squared 2-Wasserstein distance of the normal distributions with the classes' moments.

    ``|m - m'|^2 + tr(S + S' - 2 (S^(1/2) S' S^(1/2))^(1/2))``, the last trace as the sum of the
    singular values of ``R R''`` with ``S = R' R``, for which no root of a matrix is needed: its
    derivative exists where S is singular, as with fewer points than features.
    """

    def prepared(self, group: Group) -> Group:
        x, a = group.tensors
        mean = (a.unsqueeze(-1) * x).sum(-2)
        centred = a.sqrt().unsqueeze(-1) * (x - mean.unsqueeze(-2))
        # A constant Q loses nothing: singular values do not change with a turn of the rows.
        Q = torch.linalg.qr(centred.detach()).Q
        return replace(group, tensors=(mean, matmul(Q.mT, centred), centred.square().sum((-1, -2))))

    def diagonal(self, group: Group) -> Tensor:
        return torch.zeros_like(group.tensors[2])

    def between(self, row: Group, group: Group) -> Tensor:
        (m, R, trace), (m_, R_, trace_) = row.tensors, group.tensors
        shared, _ = _singular_values(matmul(R.expand(-1, m_.shape[1], -1, -1), R_.mT))
        return (m - m_).square().sum(-1) + trace + trace_ - 2 * shared


class _SingularValues(torch.autograd.Function):
    """Sum of the singular values ``(...)`` of matrices ``(..., m, n)``, and its derivative.

    That is ``U V'`` of those above rounding: that of torch's svd divides by their gaps.
    """

    generate_vmap_rule = True

    @staticmethod
    @checks.outside_autocast
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        unit = torch.finfo(S.dtype).eps * max(matrix.shape[-2:])
        turn = product(U * (unit * S[..., :1] < S).unsqueeze(-2), Vh)
        return S.sum(-1), turn

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return _no_second(grad, *ctx.saved_tensors)


class _NoSecond(torch.autograd.Function):
    """That derivative; it depends on the matrix, and says that it cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, matrix: Tensor, turn: Tensor) -> Tensor:
        return grad[..., None, None] * turn

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            "DatasetDistance: labels='gaussian' has no second derivatives; 'sinkhorn' has them"
        )


_singular_values: Callable[[Tensor], tuple[Tensor, Tensor]] = _SingularValues.apply
_no_second: Callable[..., Tensor] = _NoSecond.apply
