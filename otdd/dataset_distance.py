"""`DatasetDistance`: optimal transport between labelled data sets."""

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from otdd.backends import NAMES
from otdd.ops import METRICS, PointsResult, classes, sinkhorn_points
from otdd.ops.checks import (
    as_float,
    finite,
    number,
    require,
    same_kind,
    solver_options,
    values_are_checked,
)
from otdd.ops.divergence import half_within
from otdd.ops.points import clouds_of, labels_of_points


class DatasetDistance(nn.Module):
    """Optimal transport distance between two labelled data sets.

    Alvarez-Melis & Fusi, "Geometric Dataset Distances via Optimal Transport", NeurIPS 2020, eq. 4
    and 5: entropic transport of the points of x to those of y under the ground cost::

        C_ij = lambda_x c(x_i, y_j) + lambda_y W(class of x_i, class of y_j)

    W of two classes being the transport cost, under c again, from the points of one to those of the
    other. So the labels of x and of y need have nothing in common. The distance is in the units of
    C: under ``sqeuclidean`` the square of the paper's (p = 2), without a root.

    Nothing of N x M numbers is made: points go through `otdd.ops.sinkhorn_points`, with memory for
    these, for K M + L N costs and, of the labels, for what is held for each class. Gradients with
    respect to x and y go through both terms of C, with plans held fixed (envelope).

    With `debias`, less half the distances of x and y from themselves, as in
    `otdd.ops.sinkhorn_divergence`: zero for equal data sets, and not negative where exp(-C / eps)
    is a positive definite kernel. That is so of c, and of W where it is a squared distance in a
    Hilbert space: between normal distributions whose covariances commute, for one. Elsewhere it is
    not known.

    Args:
        eps: Regularisation strength > 0 in the units of C.
        metric: Ground cost c, as in `otdd.ops.cost_matrix`.
        labels: How W is made. ``sinkhorn``: entropic transport between the points of the classes,
            without its bias. ``gaussian``, under ``sqeuclidean``: the squared 2-Wasserstein
            distance of normal distributions with the mean and the covariance (over n) of each
            class, the paper's approximation. Or W itself: ``(K, K)``, symmetric, for labels
            that both data sets share, or without `debias` ``(K, L)``, labels of x by labels of y.
        eps_labels: Regularisation strength of W in the units of c; that of `eps` by default.
        lambda_x: Factor > 0 of the cost between points.
        lambda_y: Factor >= 0 of the cost between labels.
        debias: Subtract the self-transport terms of the data sets.
        debias_labels: Subtract those of the classes, so that equal ones are at 0.
        num_classes: Number of classes of each data set, or ``(K, L)``: labels are then below it.
            None: labels may be any whole numbers. Those of a given W are its indices.
        max_iter: Iterations of each solve.
        tol: L1 marginal error at which a problem stops by itself; 0 never.
        backend: As in `otdd.ops.sinkhorn_points`.

    Differentiable in x and y; twice but under ``gaussian`` and, in the metric, ``l1``. Gradients
    are those at convergence, as of `otdd.ops.sinkhorn_points` under ``envelope``.

    A GPU is waited for at the start alone: for the labels that there are, without `num_classes`,
    and for the sizes of the classes; not with a given W. (The decompositions of ``gaussian`` are
    those of torch.linalg, which wait for it as well.)

    Shape: x ``(..., N, D)``, labels of x int64 ``(..., N)``, y ``(..., M, D)``, labels of y
    ``(..., M)`` -> ``(...)``. All points of a data set weigh the same; a class may be empty. Under
    `torch.func.vmap` labels are the same for all, but with a given W.
    """

    def __init__(
        self,
        eps: float = 0.05,
        *,
        metric: str = "sqeuclidean",
        labels: str | Tensor = "sinkhorn",
        eps_labels: float | None = None,
        lambda_x: float = 1.0,
        lambda_y: float = 1.0,
        debias: bool = True,
        debias_labels: bool = True,
        num_classes: int | tuple[int, int] | None = None,
        max_iter: int = 100,
        tol: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.eps_labels = eps, eps_labels
        self.lambda_x, self.lambda_y = lambda_x, lambda_y
        self.metric, self.max_iter, self.tol, self.backend = metric, max_iter, tol, backend
        self.debias, self.debias_labels = debias, debias_labels
        self.table: Tensor | None
        self.register_buffer("table", None)
        self.labels = "given" if isinstance(labels, Tensor) else labels
        if isinstance(labels, Tensor):
            self.table = as_float(labels, "labels")
            require(num_classes is None, "num_classes", num_classes, "None beside a cost of labels")
        self.num_classes = num_classes
        self._check_options()

    def _check_options(self) -> None:
        """Raises for the first that is not accepted; in every call, as users set attributes."""
        backends = (None, *NAMES)
        choices = {"metric": (self.metric, METRICS), "backend": (self.backend, backends)}
        solver_options(self.max_iter, self.tol, **choices)
        _numbers(self.num_classes)
        number(self.eps, "eps")
        number(self.lambda_x, "lambda_x")
        if self.eps_labels is not None:
            number(self.eps_labels, "eps_labels")
        real = isinstance(self.lambda_y, numbers.Real) and not isinstance(self.lambda_y, bool)
        if not (real and self.lambda_y == 0):
            number(self.lambda_y, "lambda_y")
        if self.table is not None:
            given = self.labels == "given"
            require(given, "labels", repr(self.labels), "'given', as the costs of labels were")
            _check_table(self.table, self.debias)
        elif self.labels == "gaussian":
            squared = self.metric == "sqeuclidean"
            require(squared, "metric", repr(self.metric), "sqeuclidean with gaussian")
        else:
            known = self.labels == "sinkhorn"
            require(known, "labels", repr(self.labels), "sinkhorn, gaussian or a tensor")

    def forward(self, x: Tensor, labels_x: Tensor, y: Tensor, labels_y: Tensor) -> Tensor:
        self._check_options()
        x, y = clouds_of(x, y)
        require(0 not in x.shape[:-2], "x", f"shape {tuple(x.shape)}", "a batch of at least one")
        if values_are_checked(x):
            finite(x, "x")
            finite(y, "y")
        lx = labels_of_points(labels_x, "labels_x", tuple(x.shape[:-1]), x.device)
        ly = labels_of_points(labels_y, "labels_y", tuple(y.shape[:-1]), y.device)
        if self.table is None:
            of_x, of_y = _numbers(self.num_classes)
            lx, K = _numbered(lx, "labels_x", of_x)
            ly, L = _numbered(ly, "labels_y", of_y)
            tables = self._tables(x, lx, K, y, ly, L)
        else:
            table = as_float(self.table, "labels")
            same_kind(table, "labels", x, "x")
            tables = (table,) * 3
        factor = self.lambda_y / self.lambda_x
        between, within_x, within_y = (None if W is None else factor * W for W in tables)
        if not self.debias:
            return self.lambda_x * self._solve(x, lx, y, ly, between).value
        half_x, _ = half_within(self._solve(x, lx, x, lx, within_x))
        half_y, q = half_within(self._solve(y, ly, y, ly, within_y))
        value = self._solve(x, lx, y, ly, between, q).value
        return self.lambda_x * (value - half_x - half_y)

    def _solve(
        self,
        x: Tensor,
        lx: Tensor,
        y: Tensor,
        ly: Tensor,
        W: Tensor | None,
        start: Tensor | None = None,
    ) -> PointsResult:
        init = None if start is None else (None, start)
        labels: dict[str, Any] = {"labels_x": lx, "labels_y": ly, "label_cost": W}
        eps = self.eps / self.lambda_x
        return sinkhorn_points(x, y, eps=eps, init=init, **labels, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        """Of all solves."""
        options = {"metric": self.metric, "max_iter": self.max_iter, "tol": self.tol}
        return options | {"backend": self.backend}

    def _distance(self) -> classes.Distance:
        """How W is made."""
        if self.labels == "gaussian":
            return classes.Gaussian()
        eps = self.eps if self.eps_labels is None else self.eps_labels
        return classes.Sinkhorn(self.debias_labels, eps=eps, **self._options)

    def _tables(
        self, x: Tensor, lx: Tensor, K: int, y: Tensor, ly: Tensor, L: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """W between the data sets, and with `debias` within each: ``(..., K, L)`` and so on."""
        distance, batch = self._distance(), x.shape[:-2]
        x, y = (t.reshape(-1, *t.shape[-2:]) for t in (x, y))
        lx, ly = (labels.reshape(-1, labels.shape[-1]) for labels in (lx, ly))
        counts = classes.sizes_of(lx, K), classes.sizes_of(ly, L)
        sizes = torch.cat([count.amax(0).sort().values for count in counts]).tolist()
        sides = (x, lx, counts[0], sizes[:K]), (y, ly, counts[1], sizes[K:])
        of_x, of_y = (classes.prepared(classes.classes_of(*side), distance) for side in sides)
        between = classes.between_classes(of_x, of_y, distance).reshape(*batch, K, L)
        if not self.debias:
            return between, None, None
        own_x, own_y = (classes.within_classes(side, distance) for side in (of_x, of_y))
        return between, own_x.reshape(*batch, K, K), own_y.reshape(*batch, L, L)

    def extra_repr(self) -> str:
        return (
            f"eps={self.eps}, metric={self.metric!r}, labels={self.labels!r}, "
            f"lambda_x={self.lambda_x}, lambda_y={self.lambda_y}, debias={self.debias}"
        )


def _numbers(num_classes: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    """`num_classes` of each side, checked."""
    pair = num_classes if isinstance(num_classes, tuple) else (num_classes, num_classes)
    whole = all(isinstance(K, numbers.Integral) and not isinstance(K, bool) and K > 0 for K in pair)
    fits = num_classes is None or (whole and len(pair) == 2)
    accepted = "a whole number >= 1, a pair of them, or None"
    require(fits, "num_classes", repr(num_classes), accepted)
    return pair


def _check_table(W: Tensor, debias: bool) -> None:
    square = W.dim() == 2 and W.numel() > 0 and (not debias or W.shape[0] == W.shape[1])
    accepted = "(K, K), or (K, L) without debias"
    require(square, "labels", f"shape {tuple(W.shape)}", accepted)
    if values_are_checked(W):
        finite(W, "labels")
    if debias and values_are_checked(W):
        far = (W - W.mT).abs().max().item()
        require(far <= 1e-5 * W.abs().max().item(), "labels", "costs that differ", "symmetric ones")


def _numbered(labels: Tensor, name: str, K: int | None) -> tuple[Tensor, int]:
    """Labels from 0 to K - 1, and K; how many points a class has is to be known to the host."""
    if not torch.compiler.is_compiling() and _is_batched(labels):
        accepted = "the same for all of it (points may differ), or a batch in place of vmap"
        require(False, name, "labels that torch.func.vmap batches", accepted)
    if K is None:
        found, labels = torch.unique(labels, return_inverse=True)
        return labels, len(found)
    if values_are_checked(labels):
        low, high = (bound.item() for bound in labels.aminmax())
        accepted = f"0 to {K - 1}, as num_classes says"
        require(low >= 0 and high < K, name, f"labels from {low} to {high}", accepted)
    return labels, K


def _is_batched(t: Tensor) -> bool:
    """Whether `torch.func.vmap` batches `t`, below other transforms or not."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False
