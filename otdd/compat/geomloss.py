"""Drop-in for GeomLoss's ``SamplesLoss("sinkhorn")``, with the conventions of GeomLoss 0.3.1.

The loss is solved to convergence, where GeomLoss takes one iteration at each level of its
annealing: the values agree as its ``scaling`` tends to 1. Differences:

- Gradients are those of the value. Those of GeomLoss 0.3.1 with a `reach` are off by a factor
  ``(rho + eps / 2) / (rho + eps)``, and of what a `cost` holds besides the points they are twice
  the value's.
- Distances of ``p=1`` are exact; GeomLoss takes at least 1e-4, also from a point to itself.
- Potentials have the shape of the weights and are constants for the gradient. Without a `reach`
  they are up to a constant, as the gradients of weights are.
- A problem that does not converge is warned about. Without a `reach` masses must be equal, to 1e-3:
  GeomLoss's value of others depends on how long it iterates.
- Half precision is computed, and results are given, in float32; `a`, `x`, `b` and `y` are otherwise
  of one type.
"""

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from otdd import ops
from otdd.compat.arguments import named, without_meaning
from otdd.ops.checks import as_float, positive, require, same_kind, weights
from otdd.ops.divergence import check_masses

_BACKENDS = ("auto", "tensorized", "online")
_DENSE = 5000**2  # costs of a problem that are stored under "auto", as in GeomLoss
_MAX_ITER = 2000
_TOL = {torch.float32: 1e-4, torch.float64: 1e-9}  # marginal error over the mass
_LEVEL_TOL, _LEVEL_ITER = 1e-2, 100
_ROUND = 10  # iterations of a self-transport between two means of its potentials


class SamplesLoss(nn.Module):
    """Sinkhorn divergence between sampled measures, or entropic OT: GeomLoss's ``SamplesLoss``.

    ``OT(a, b) = min_P <P, C> + eps KL(P | a x b) + rho KL(P 1 | a) + rho KL(P' 1 | b)`` with
    ``C = |x - y|^p / p``, ``eps = blur^p`` and ``rho = reach^p``; with `debias`
    ``OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + eps (sum(a) - sum(b))^2 / 2`` (Feydy et al., AISTATS
    2019, eq. 3; Sejourne et al. 2019, definition 5).

    Args:
        loss: Only ``sinkhorn``; GeomLoss itself has the kernel losses.
        p: 1, the Euclidean distance, or 2, half its square. With a `cost` any number > 0.
        blur: ``eps^(1 / p)``, in the units of the points.
        reach: ``rho^(1 / p)``; None: the marginals are met.
        diameter: Where annealing starts under ``online``; by default that of the points.
        scaling: Ratio in (0, 1) between levels of `blur`; only speed depends on it.
        truncate: Only its default, as `kernel` and `cluster_scale`: for what is not here.
        cost: None, or a function of x ``(B, N, D)`` and y ``(B, M, D)`` that gives ``(B, N, M)``.
        kernel: Only None.
        cluster_scale: Only None.
        debias: Subtract the self-transport terms.
        potentials: Return the potentials ``(F, G)``, debiased if `debias`, in place of the value.
        verbose: Print iterations and marginal error of each solve.
        backend: ``tensorized``: costs are stored; ``online``: never; ``auto``: up to 5000 x 5000.

    Shape: ``(x, y)`` or ``(a, x, b, y)`` with x ``(N, D)``, y ``(M, D)`` -> ``()``, or
    ``(B, N, D)``, ``(B, M, D)`` -> ``(B,)``; weights ``(N,)``, ``(B, N)``, with a last 1 or not.

    Raises:
        ValueError: An option or a value that is not accepted.
        TypeError: Not floating point, or different dtypes.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: float = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable[[Tensor, Tensor], Tensor] | None = None,
        kernel: None = None,
        cluster_scale: None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.loss, self.p, self.blur, self.reach, self.diameter = loss, p, blur, reach, diameter
        self.scaling, self.truncate, self.cost, self.kernel = scaling, truncate, cost, kernel
        self.cluster_scale, self.debias, self.potentials = cluster_scale, debias, potentials
        self.verbose, self.backend = verbose, backend
        self._check_options()

    def _check_options(self) -> None:
        """Raises for the first that is not accepted; in every call, as users set attributes."""
        require(self.loss == "sinkhorn", "loss", repr(self.loss), "'sinkhorn'; GeomLoss has others")
        require(self.backend in _BACKENDS, "backend", repr(self.backend), ", ".join(_BACKENDS))
        options = {"truncate": (self.truncate, 5), "kernel": (self.kernel, None)}
        without_meaning("this solver", **options, cluster_scale=(self.cluster_scale, None))
        function = self.cost is None or callable(self.cost)
        require(function, "cost", repr(self.cost), "None, or a function of two tensors")
        stored = self.cost is None or self.backend != "online"
        require(stored, "backend", "'online' beside a cost", "auto, tensorized")
        given = {"p": self.p, "blur": self.blur, "reach": self.reach, "diameter": self.diameter}
        for name, number in given.items():
            shape = tuple(getattr(number, "shape", ()))
            require(shape == (), name, f"shape {shape}", "one number")
        require(not isinstance(self.p, Tensor), "p", "a tensor", "1, 2, or a number beside a cost")
        require(self.cost is not None or self.p in (1, 2), "p", self.p, "1, 2, or a cost")
        for name, number in given.items():
            if number is not None:
                positive(number, name, torch.float32, or_inf=name == "reach")
        ratio = isinstance(self.scaling, numbers.Real) and 0 < self.scaling < 1
        require(ratio, "scaling", self.scaling, "a number in (0, 1)")

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self._check_options()
        require(len(args) in (2, 4), "args", f"{len(args)} of them", "(x, y), or (a, x, b, y)")
        a, x, b, y = args if len(args) == 4 else (None, args[0], None, args[1])
        x, y = as_float(x, "x"), as_float(y, "y")
        fits = x.dim() in (2, 3) and x.dim() == y.dim() and x.shape[:-2] == y.shape[:-2]
        shapes = f"shapes {tuple(x.shape)} and {tuple(y.shape)}"
        require(fits, "x and y", shapes, "(N, D) and (M, D), or (B, N, D) and (B, M, D)")
        for name, points in (("x", x), ("y", y)):
            shape = f"shape {tuple(points.shape)}"
            require(0 not in points.shape[-2:], name, shape, "at least one point, D >= 1")
        same_kind(y, "y", x, "x")
        shape_a, shape_b = (x if a is None else a).shape, (y if b is None else b).shape
        a, b = _weights(a, "a", x, "x"), _weights(b, "b", y, "y")
        if len(args) == 4 and self._hard:
            weights(a, "a")
            weights(b, "b")
            check_masses(a, b, "equal masses, or a reach")
        if x.dim() == 2:
            a, x, b, y = (t.unsqueeze(0) for t in (a, x, b, y))
        between = self._transport(a, x, b, y)
        within: tuple[ops.SinkhornResult | ops.PointsResult, ...] = ()
        if self.debias:
            within = self._transport(a, x, a, x), self._transport(b, y, b, y)
        if self.potentials:
            F, G = (t.detach() / self._unit for t in (between.f, between.g))
            if within:
                own = [(r.f + r.g).detach() / (2 * self._unit) for r in within]
                F, G = F - own[0], G - own[1]
            shape_a, shape_b = (s if len(args) == 4 else s[:-1] for s in (shape_a, shape_b))
            return F.reshape(shape_a), G.reshape(shape_b)
        value = self._value(between, a, b)
        if within:
            value = value - (self._value(within[0], a, a) + self._value(within[1], b, b)) / 2
            if self.cost is None:
                # Below 0 is only what rounding and unfinished solves leave: exp(-C / eps) is a
                # positive definite kernel for p = 1 and 2. Its gradient stays.
                value = value - value.detach().clamp(max=0)
        return value if args[-1].dim() == 3 else value.squeeze(0)

    @property
    def _hard(self) -> bool:
        """Whether the marginals are met."""
        return self.reach is None or math.isinf(self.reach)

    @property
    def _unit(self) -> float:
        """What the solver's costs are, over GeomLoss's."""
        return 2.0 if self.cost is None and self.p == 2 else 1.0

    def _value(self, solved: ops.SinkhornResult | ops.PointsResult, a: Tensor, b: Tensor) -> Tensor:
        """GeomLoss's OT: with a reach, ``eps sum(a) sum(b)`` is ``eps (sum(a) + sum(b)) / 2``."""
        value = solved.value / self._unit
        if self.reach is None or self._hard:
            return value
        mass_a, mass_b = a.sum(-1), b.sum(-1)
        return value + self.blur**self.p * ((mass_a + mass_b) / 2 - mass_a * mass_b)

    def _transport(
        self, a: Tensor, x: Tensor, b: Tensor, y: Tensor
    ) -> ops.SinkhornResult | ops.PointsResult:
        rho = None if self.reach is None else self._unit * self.reach**self.p
        eps = self._unit * self.blur**self.p
        options: dict[str, Any] = {"eps": eps, "rho_a": rho, "rho_b": rho}
        tol = _TOL[x.dtype] * _least_mass(a)
        if self._hard:
            tol += _gap(a, b)
        options |= {"max_iter": _MAX_ITER, "tol": tol}
        metric = "sqeuclidean" if self.p == 2 else "l2"
        large = self.backend == "auto" and x.shape[-2] * y.shape[-2] > _DENSE
        solved: ops.SinkhornResult | ops.PointsResult
        with named(C="cost", eps="blur", rho_a="reach", rho_b="reach"):
            if self.cost is None and (large or self.backend == "online"):
                options |= {"metric": metric, "init": self._anneal(a, x, b, y, metric, rho)}
                if a is b and x is y:
                    options["init"] = _averaged(x, a, **options)
                solved = ops.sinkhorn_points(x, y, a, b, **options)
            else:
                C = self._given(x, y) if self.cost else ops.cost_matrix(x, y, metric)
                options |= {"schedule": self.scaling**self.p, "accelerate": "anderson"}
                solved = ops.sinkhorn(C, a, b, **options)
        _report(solved, self.verbose)
        return solved

    def _given(self, x: Tensor, y: Tensor) -> Tensor:
        """What the user's cost makes of the points, checked."""
        assert self.cost is not None
        C = as_float(self.cost(x, y), "cost")
        same_kind(C, "cost", x, "x")
        shape = (*x.shape[:-1], y.shape[-2])
        require(C.shape == shape, "cost", f"shape {tuple(C.shape)}", f"{shape}")
        return C

    @torch.no_grad()
    def _anneal(
        self, a: Tensor, x: Tensor, b: Tensor, y: Tensor, metric: str, rho: float | None
    ) -> ops.PointsResult | None:
        """Where the solve at `blur` starts: levels of epsilon scaling from the diameter."""
        both = torch.cat([x, y], -2).flatten(0, 1)
        size = self.diameter or float((both.amax(0) - both.amin(0)).norm()) if len(both) else 0
        tol = _LEVEL_TOL * _least_mass(a)
        options: dict[str, Any] = {"metric": metric, "rho_a": rho, "rho_b": rho}
        options["max_iter"] = _LEVEL_ITER
        solved = None
        while self.blur < size < math.inf:  # else the solver tells which points are not finite
            eps = self._unit * size**self.p
            solved = ops.sinkhorn_points(x, y, a, b, eps=eps, tol=tol, init=solved, **options)
            size *= self.scaling
        return solved

    def extra_repr(self) -> str:
        return f"p={self.p}, blur={self.blur}, reach={self.reach}, debias={self.debias}"


@torch.no_grad()
def _averaged(x: Tensor, a: Tensor, init: Any, **options: Any) -> tuple[None, Tensor]:
    """Where a cloud's transport to itself ends, by rounds from the mean of both potentials.

    Why the mean is nearer than iterations bring them: see `_within` of `otdd.ops.divergence`, which
    takes it once. Ten iterations and the mean leave at most 1 % of any direction.
    """
    options["max_iter"] = _ROUND
    for _ in range(_MAX_ITER // _ROUND):
        solved = ops.sinkhorn_points(x, x, a, a, init=init, **options)
        if bool(solved.converged.all()):
            break
        init = None, (solved.f + solved.g) / 2
    return None, solved.g


def _least_mass(a: Tensor) -> float:
    """That of the lightest problem; 0 with weights that the solver will refuse, and name."""
    mass = float(a.detach().sum(-1).amin()) if a.numel() else 1.0
    return mass if 0 < mass < math.inf else 0.0


def _gap(a: Tensor, b: Tensor) -> float:
    """How far masses are from each other, in the worst problem: no plan is nearer to a and b.

    Weights that were made in float32 are off by its rounding.
    """
    gap = (a.detach().double().sum(-1) - b.detach().double().sum(-1)).abs()
    return float(gap.amax()) if gap.numel() else 0.0


def _weights(w: Tensor | None, name: str, points: Tensor, points_name: str) -> Tensor:
    """Weights of the shape of the points without their last dimension; uniform by default."""
    shape = points.shape[:-1]
    if w is None:
        return points.new_full(shape, 1 / shape[-1])
    w = as_float(w, name)
    same_kind(w, name, points, points_name)
    accepted = f"{tuple(shape)}, with a last 1 or not"
    require(w.shape in (shape, (*shape, 1)), name, f"shape {tuple(w.shape)}", accepted)
    return w.reshape(shape)


def _report(solved: ops.SinkhornResult | ops.PointsResult, verbose: bool) -> None:
    if solved.n_iter.numel() == 0 or not (verbose or not bool(solved.converged.all())):
        return
    error, n_iter = float(solved.marginal_error.max()), int(solved.n_iter.max())
    if verbose:
        print(f"Sinkhorn: {n_iter} iterations, marginal error {error:.3e}")
    if not bool(solved.converged.all()):
        warnings.warn(
            f"SamplesLoss did not converge: marginal error {error:.3e} after {n_iter} iterations; "
            "a larger blur helps",
            stacklevel=4,
        )
