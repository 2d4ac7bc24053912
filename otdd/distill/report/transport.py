"""Transport between the sets and the real images: costs, maps and convergence, class by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from otdd.distill.codec import Codec
from otdd.distill.data import ImageData
from otdd.distill.geometry import MAX_ITER, TOL, real_latents, transport_problem

POINTS = 150  # real images that a map shows
# Iterations at which the convergence is looked at, about evenly on a logarithmic scale.
MARKS = (*range(1, 11), *range(12, 31, 3), 35, 40, 50, 60, 80, 100, 130, 170, 220, 300, 400, 500)


@dataclass(frozen=True)
class Solve:
    """Transport from the images of a set to the real ones of a class.

    Attributes:
        points: the images of the set on the map, (N, 2).
        images: where the plan sends the real images of the map, on average, (n, 2).
        cost: transport cost.
        n_iter: iterations that it took.
        converged: whether the marginal error came under the tolerance.
        errors: marginal error after each number of iterations of `MARKS`, (len(MARKS),).
    """

    points: Tensor
    images: Tensor
    cost: float
    n_iter: int
    converged: bool
    errors: Tensor


@dataclass(frozen=True)
class ClassTransport:
    """One class.

    Attributes:
        label: of the class.
        real: the real images of the map in their first two principal components, (n, 2).
        count: real images of the solves.
        explained: share of their variance that the map shows.
        sets: name -> its transport.
    """

    label: int
    real: Tensor
    count: int
    explained: float
    sets: dict[str, Solve]


@dataclass(frozen=True)
class Transports:
    """Transport of the classes that a report shows.

    Attributes:
        classes: none where the real images cannot be had.
        space: between what costs are: ``pixels`` or ``latents``.
        absent: why there are none.
    """

    classes: list[ClassTransport]
    space: str = ""
    absent: str | None = None


def transports(
    sets: Mapping[str, tuple[Tensor, Tensor]],
    data: ImageData,
    codec: Codec,
    labels: Sequence[int],
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Transports:
    """Transport of every set to the real images of some classes.

    Costs are those whose mean over all classes is `ot_cost` in `metrics.json`.

    Args:
        sets: name -> images uint8 (N, C, H, W) and labels (N,).
        data: the real images.
        codec: makes the latents between which costs are.
        labels: of the classes.
        seed: of the run; draws the real images of classes that have very many.
        progress: called as progress(text, done, total).
    """
    made = []
    for number, label in enumerate(labels, start=1):
        y = real_latents(data, codec, label, seed=seed)
        origin, axes, explained = principal_axes(y)
        kept = torch.linspace(0, len(y) - 1, min(POINTS, len(y))).round().long()
        solves = {}
        for name, (images, own) in sets.items():
            if bool((own == label).any()):
                x = codec.encode(images[own == label]).flatten(1).double()
                solves[name] = _solve(x, y, kept, origin, axes)
        real = (y[kept] - origin) @ axes
        made.append(ClassTransport(label, real, len(y), explained, solves))
        if progress is not None:
            progress("transport", number, len(labels))
    space = "pixels" if codec.config()["kind"] == "pixels" else "latents"
    return Transports(made, space)


def principal_axes(y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean (D,), first two principal axes (D, 2), and the share of variance along them."""
    origin = y.mean(0)
    _, values, rows = torch.linalg.svd(y - origin, full_matrices=False)
    axes = y.new_zeros(y.shape[1], 2)
    found = rows[:2].T
    # The sign of an axis is free: its largest entry is positive.
    sign = found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
    axes[:, : found.shape[1]] = found * sign
    total = float(values.square().sum())
    return origin, axes, float(values[:2].square().sum()) / total if total > 0 else 1.0


def _solve(x: Tensor, y: Tensor, kept: Tensor, origin: Tensor, axes: Tensor) -> Solve:
    from otdd.ops import sinkhorn

    C, eps = transport_problem(x, y)
    result = sinkhorn(C, eps=eps, max_iter=MAX_ITER, tol=TOL)
    share = result.plan[:, kept] / result.plan[:, kept].sum(0)
    points = (x - origin) @ axes
    return Solve(
        points,
        share.T @ points,
        float(result.cost),
        int(result.n_iter),
        bool(result.converged),
        convergence(C, eps),
    )


def convergence(C: Tensor, eps: float) -> Tensor:
    """Marginal error of a solve after each number of iterations of `MARKS`."""
    from otdd.ops import sinkhorn

    state, errors = None, []
    for before, after in pairwise((0, *MARKS)):  # a solve goes on exactly where its init stopped
        state = sinkhorn(C, eps=eps, max_iter=after - before, init=state)
        errors.append(float(state.marginal_error))
    return torch.tensor(errors)
