"""`PointsResult`: a solution between point clouds, and what is made of its plan."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from otdd.ops import checks
from otdd.ops.cost import cost_matrix
from otdd.ops.points.gradients import transport
from otdd.ops.points.reference import Clouds, label_costs
from otdd.ops.sinkhorn.implicit import over
from otdd.ops.sinkhorn.reference import plan_from_potentials

Labels: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class PointsResult:
    """Solution of entropic OT between clouds; like `SinkhornResult`, with points for costs.

    ``value`` and ``cost`` are differentiable in x, y, a, b and the costs between labels under every
    gradient mode; ``f``, ``g`` and what is made of the plan under ``unrolled`` and ``implicit``
    (constants under ``envelope``). That is made of points, weights and `eps` as they are then:
    tensors that were given are not copied.

    Attributes:
        value: Dual objective, ``(...)``.
        cost: Transport cost ``<P, C>``, ``(...)``.
        f: Row potentials, ``(..., N)``, in the units of the cost.
        g: Column potentials, ``(..., M)``.
        n_iter: Iterations done, int64 ``(...)``.
        marginal_error: ``sum_i |sum_j P_ij - a_i exp(-f_i / rho_a)|``, ``(...)``.
        x: Points of the rows, ``(..., N, D)``; under ``cosine`` as ``sqeuclidean`` takes them.
        y: Points of the columns, ``(..., M, D)``.
        a: Row weights, ``(..., N)``.
        b: Column weights, ``(..., M)``.
        eps: Regularisation strength, float64 ``(...)``.
        metric: Ground cost between `x` and `y`.
        tol: Marginal error that was asked for.
        grad: Gradient mode.
        precision: Of the products between points.
        backend: Backend that solved it.
        labels: None, or labels of the rows and of the columns, int64 ``(..., N)``, ``(..., M)``,
            and the cost between labels, ``(..., K, L)``.
    """

    value: Tensor
    cost: Tensor
    f: Tensor
    g: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    eps: Tensor
    metric: str
    tol: float
    grad: str
    precision: str
    backend: str
    labels: Labels | None = None

    def __repr__(self) -> str:
        return checks.described(self)

    @property
    def converged(self) -> Tensor:
        """``marginal_error <= tol``, bool ``(...)``; False for a problem that holds a NaN."""
        return self.marginal_error <= self.tol

    @property
    def plan(self) -> Tensor:
        """Transport plan ``P_ij = a_i b_j exp((f_i + g_j - c(x_i, y_j)) / eps)``.

        Made at each access: ``(..., N, M)`` numbers, and as many for the cost. `apply` and
        `barycentric` need neither.
        """
        p, f, g = self._problem()
        C = costs_of(p, self.metric, self.backend)
        assert p.a is not None  # a result has its weights
        assert p.b is not None
        return plan_from_potentials(C, f, g, p.a, p.b, self.eps)

    def apply(self, z: Tensor, *, transpose: bool = False) -> Tensor:
        """``P z``, or with `transpose` ``P' z``, the plan made tile by tile, backwards too.

        Args:
            z: ``(..., M, K)``, or ``(..., N, K)`` with `transpose`; leading dimensions broadcast to
                those of the solve. Differentiable.
            transpose: From rows to columns.

        Returns:
            ``(..., N, K)`` or ``(..., M, K)``.

        Raises:
            ValueError: Shapes that don't fit, another device, NaN or inf.
            TypeError: `z` is not floating point or has another dtype than the solve.
        """
        z = checks.as_float(z, "z")
        checks.same_kind(z, "z", self.f, "the solve")
        *batch, n = self.f.shape if transpose else self.g.shape
        wanted = f"{(*batch, n)} + (K,), K >= 1, or broadcastable"
        fits = z.dim() >= 2 and z.shape[-2] == n and z.shape[-1] > 0
        try:
            z = z.expand(*batch, *z.shape[-2:]) if fits else z
        except RuntimeError:
            fits = False
        checks.require(fits, "z", f"shape {tuple(z.shape)}", wanted)
        if checks.values_are_checked(z):
            checks.finite(z, "z")
        p, f, g = self._problem()
        if transpose:
            p, f, g = p.swapped(), g, f
        return transport(z, *p, f, g, self.metric, self.precision, self.backend)

    def barycentric(self, z: Tensor) -> Tensor:
        """Barycentric projection ``(1 / a_i) sum_j P_ij z_j``; a row of weight zero is sent to 0.

        Args:
            z: Values at the columns, ``(..., M, K)``, as in `apply`.

        Returns:
            ``(..., N, K)``.
        """
        a = self.a.detach() if self.grad == "envelope" else self.a
        return over(self.apply(z), a.unsqueeze(-1))

    def _problem(self) -> tuple[Clouds, Tensor, Tensor]:
        """The problem and its potentials; constants under ``envelope``."""
        labels = self.labels or (None, None, None)
        points = self.x, self.y, self.a, self.b, self.eps, None, None, *labels
        problem, f, g = Clouds(*points), self.f, self.g
        if self.grad == "envelope":
            problem = Clouds._make(None if t is None else t.detach() for t in problem)
            f, g = f.detach(), g.detach()
        return problem, f, g


def costs_of(p: Clouds, metric: str, backend: str | None) -> Tensor:
    """The cost matrix that nothing else here makes, ``(..., N, M)``; differentiable."""
    C = cost_matrix(p.x, p.y, metric, backend=backend)
    return C if p.label_cost is None else C + label_costs(p, slice(None))
