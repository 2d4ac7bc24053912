"""Second derivatives of `value`, and the derivatives of an image of the plan."""

import torch
from torch import Tensor

from otdd.ops.dispatch import custom_op
from otdd.ops.points.blocks import Pullback, apart, blocks, slopes
from otdd.ops.points.implicit import fake_gradients, solve_adjoint, widened
from otdd.ops.points.op import filled
from otdd.ops.points.reference import Clouds, label_costs
from otdd.ops.sinkhorn.gradients import value_slopes_backward
from otdd.ops.sinkhorn.implicit import over


class _Direction:
    """A direction in which the points and the costs between labels move, and the costs with them.

    What is None stands still.
    """

    def __init__(
        self, p: Clouds, metric: str, x: Tensor | None, y: Tensor | None, W: Tensor | None
    ) -> None:
        self._p, self.metric, self.points = p, metric, x is not None or y is not None
        self.x = torch.zeros_like(p.x) if x is None else x.double()
        self.y = torch.zeros_like(p.y) if y is None else y.double()
        self._labels = None if W is None else p._replace(label_cost=W.double())

    @property
    def rests(self) -> bool:
        return not self.points and self._labels is None

    def along(self, rows: slice, distance: Tensor) -> tuple[Tensor, Tensor]:
        """By how much the costs of some rows change, and the part of the points."""
        by_points = torch.zeros_like(distance)
        if self.points:
            by_points = slopes(self._p, self.x, self.y, rows, distance, self.metric)
        if self._labels is None:
            return by_points, by_points
        return by_points + label_costs(self._labels, rows), by_points


def _second(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    labels_x: Tensor | None,
    labels_y: Tensor | None,
    label_cost: Tensor | None,
    f: Tensor,
    g: Tensor,
    dvalue: Tensor,
    w_x: Tensor | None,
    w_y: Tensor | None,
    w_a: Tensor | None,
    w_b: Tensor | None,
    w_label_cost: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_label_cost: bool,
    metric: str,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivative of ``<w, gradient of dvalue * value>`` in x, y, a, b, label costs and dvalue.

    P, f and g move as the fixed point does. With Q the costs' change along w, the costs get
    ``P_ij (k_i + h_j - dvalue Q_ij / eps)`` and the points ``dvalue P_ij dQ_ij`` besides.
    """
    p = filled(x, y, a, b, eps, rho_a, rho_b, labels_x, labels_y, label_cost)
    p, f, g, s = widened(p, f, g, dvalue)
    w_a, w_b = (None if w is None else w.double() for w in (w_a, w_b))
    df, dg, da, db, ds = value_slopes_backward((None, *p[2:7]), f, g, s, w_a, w_b)
    way = _Direction(p, metric, w_x, w_y, w_label_cost)
    e = p.eps.unsqueeze(-1)
    if not way.rests:
        to_rows, to_columns = torch.zeros_like(f), torch.zeros_like(g)
        for rows, plan, distance in blocks(p, f, g, metric, backend):
            flow = plan * way.along(rows, distance)[0]
            to_rows[..., rows] = flow.sum(-1)
            to_columns += flow.sum(-2)
        ds = ds + to_rows.sum(-1)
        to_rows, to_columns = s.unsqueeze(-1) * to_rows, s.unsqueeze(-1) * to_columns
        df, dg = df + to_rows / e, dg + to_columns / e
        da, db = da + over(to_rows, p.a), db + over(to_columns, p.b)
    options = x.dtype, metric, precision, backend
    k, h, by_a, by_b = solve_adjoint(p, f, g, df, dg, *options)
    pull = Pullback(p, metric, backend, need_x, need_y, need_label_cost)
    scale = s[..., None, None]
    for rows, plan, distance in blocks(p, f, g, metric, backend):
        weights = plan * (k[..., rows].unsqueeze(-1) + h.unsqueeze(-2))
        if not way.rests:
            change, by_points = way.along(rows, distance)
            weights = weights - scale * plan * change / e.unsqueeze(-1)
        pull.costs(rows, weights, distance)
        if way.points:
            _bend(pull, rows, scale * plan, by_points, distance, way, p)
    grads = pull.dx, pull.dy, da + by_a, db + by_b, pull.dW, ds
    return tuple(t.to(x.dtype) for t in grads)


def _bend(
    pull: Pullback,
    rows: slice,
    weights: Tensor,
    by_points: Tensor,
    distance: Tensor,
    way: _Direction,
    p: Clouds,
) -> None:
    """Adds ``sum weights_ij dQ_ij`` over some rows, Q the change of the points' costs.

    ``sqeuclidean``: ``Q = 2 <d, w>``; ``l2``: ``Q = <d, w> / |d|``, whose derivative in d is
    ``w / |d| - Q d / |d|^2``.
    """
    if way.metric == "l2":
        weights = apart(weights, 2 * distance)
        pull.differences(rows, -apart(weights * by_points, distance), p.x, p.y)
    pull.differences(rows, weights, way.x, way.y)


def _fake_second(x, y, *others):  # noqa: ANN001, ANN002, ANN202
    return *fake_gradients(x, y, others[7], *others[16:19]), torch.empty_like(others[10])


def _image_backward(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    labels_x: Tensor | None,
    labels_y: Tensor | None,
    label_cost: Tensor | None,
    f: Tensor,
    g: Tensor,
    z: Tensor,
    grad: Tensor,
    need_x: bool,
    need_y: bool,
    need_label_cost: bool,
    metric: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of ``P z`` in x, y, a, b, the label costs, f and g: ``dP_ij = <grad_i, z_j>``."""
    p = Clouds(x, y, a, b, eps, rho_a, rho_b, labels_x, labels_y, label_cost)
    p, f, g, z, grad = widened(p, f, g, z, grad)
    to_rows, to_columns = torch.zeros_like(f), torch.zeros_like(g)
    pull = Pullback(p, metric, backend, need_x, need_y, need_label_cost)
    e = p.eps.unsqueeze(-1)
    for rows, plan, distance in blocks(p, f, g, metric, backend):
        flow = plan * (grad[..., rows, :] @ z.mT)
        to_rows[..., rows] = flow.sum(-1)
        to_columns += flow.sum(-2)
        pull.costs(rows, -flow / e.unsqueeze(-1), distance)
    weights = over(to_rows, p.a), over(to_columns, p.b)
    grads = pull.dx, pull.dy, *weights, pull.dW, to_rows / e, to_columns / e
    return tuple(t.to(x.dtype) for t in grads)


def _fake_image_backward(x, y, *others):  # noqa: ANN001, ANN002, ANN202
    f, g = others[8:10]
    grads = fake_gradients(x, y, others[7], *others[12:15])
    return *grads, torch.empty_like(f), torch.empty_like(g)


second_op = custom_op("otdd::sinkhorn_points_second", _second, _fake_second)
image_backward_op = custom_op(
    "otdd::sinkhorn_points_image_backward", _image_backward, _fake_image_backward
)
