"""Small clouds: some problems at a time with their whole cost matrix, solved as given costs are.

All of the `cuda` backend of `sinkhorn_points`, and what the `cpu` backend does while it is faster.
"""

import torch
from torch import Tensor

from otdd.ops.cost import cost_gradients, cost_matrix
from otdd.ops.matmul import product
from otdd.ops.points.reference import Clouds, PointSolution, label_costs
from otdd.ops.sinkhorn import sinkhorn
from otdd.ops.sinkhorn.op import plan_op

CUDA = 1 << 23  # entries of a problem's cost above which the CUDA kernels would read it from afar
AT_ONCE = 1 << 28  # entries of the costs that exist at a time on a GPU


def cuda_refusal(x: Tensor, N: int, M: int, schedule: float | None) -> str | None:
    """What keeping the costs has against a problem, wherever it is."""
    if schedule is not None:
        return "the CUDA kernels have no schedule"
    entries = N * M
    return None if entries <= CUDA else f"{entries} costs; the CUDA kernels keep at most {CUDA}"


def stored(
    p: Clouds,
    g: Tensor,
    metric: str,
    max_iter: int,
    tol: float,
    schedule: float,
    backend: str,
    most: int,
) -> PointSolution:
    """See `points_reference`; as many problems at a time as have at most `most` costs, or one."""
    batch, parts = p.eps.shape, []
    for some, start in _chunks(most, p, g):
        one = Clouds(*some)
        C = _costs(one, metric, backend)
        options = {"max_iter": max_iter, "tol": tol, "schedule": schedule or None}
        penalties = {"rho_a": one.rho_a, "rho_b": one.rho_b, "init": (None, start)}
        r = sinkhorn(C, one.a, one.b, eps=one.eps, **penalties, **options, backend=backend)
        parts.append((r.f, r.g, r.value, r.cost, r.marginal_error, r.n_iter))
    joined = parts[0] if len(parts) == 1 else (torch.cat(t) for t in zip(*parts, strict=True))
    return PointSolution(*(t.reshape(batch + t.shape[1:]) for t in joined))


def product_stored(
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
    backend: str,
) -> Tensor:
    """See `product_reference`."""
    batch, parts = p.x.shape[:-1], []
    for some, f_, g_, u_, v_, kappa_, z_ in _chunks(AT_ONCE, p, f, g, u, v, kappa, z):
        one = Clouds(*some)
        distance = cost_matrix(one.x, one.y, metric, backend=backend)
        C = distance if p.label_cost is None else distance + label_costs(one, slice(None))
        P = plan_op(C, f_, g_, one.a, one.b, one.eps, None, False, False, backend)
        w = P * (u_.unsqueeze(-1) + v_.unsqueeze(-2) + kappa_.to(C.dtype)[:, None, None] * C)
        if over_distance:
            w = torch.where(distance > 0, w / distance, 0)
        parts.append(weighted_sum(w, one.x, z_, one.b, mode, backend))
    return torch.cat(parts).reshape(*batch, z.shape[-1])


def weighted_sum(w: Tensor, x: Tensor, z: Tensor, b: Tensor, mode: str, backend: str) -> Tensor:
    """``sum_j w_ij h(x_i, z_j)``, as in `product_reference`, with a matrix of weights."""
    if mode == "value":
        return product(w, z)
    if mode == "sign":
        return cost_gradients(w, x, z, "l1", True, False, backend)[0]
    # Differences are small against the points where clouds are far off. What has no weight may be
    # anywhere.
    centre = mean_of(z, b)
    z = torch.where(b.unsqueeze(-1) > 0, z - centre, 0)
    return (x - centre) * w.sum(-1, keepdim=True) - product(w, z)


def mean_of(x: Tensor, w: Tensor) -> Tensor:
    """Mean of the points of weight > 0, ``(B, 1, D)``."""
    w = (w / w.sum(-1, keepdim=True)).unsqueeze(-1)
    return torch.where(w > 0, w * x, 0).sum(-2, keepdim=True)


def _costs(p: Clouds, metric: str, backend: str) -> Tensor:
    C = cost_matrix(p.x, p.y, metric, backend=backend)
    return C if p.label_cost is None else C + label_costs(p, slice(None))


def _chunks(most: int, p: Clouds, *others: Tensor) -> list[tuple]:
    """Problems and what goes with them, with one batch dimension and few enough costs."""
    B, dims = p.eps.numel(), p.eps.dim()
    flat = [None if t is None else t.reshape(B, *t.shape[dims:]) for t in (*p, *others)]
    step = max(1, most // (p.x.shape[-2] * p.y.shape[-2]))
    chunks = []
    for k in range(0, max(1, B), step):
        some = [None if t is None else t[k : k + step] for t in flat]
        chunks.append((some[: len(p)], *some[len(p) :]))
    return chunks
