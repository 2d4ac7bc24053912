"""Oracles: the definitions, written as naively as possible, differentiated by autograd in float64.

Shared by the tests and the benchmarks. Nothing here imports otdd.
"""

import math

import torch
from torch import Tensor


def problem(
    B: int, N: int, M: int, dtype: torch.dtype = torch.float64, decades: float = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random costs in [0, 1] and weights of mass 1 over `decades` orders of magnitude."""
    generator = torch.Generator().manual_seed(seed + 7 * N + M)
    C = torch.rand(B, N, M, generator=generator, dtype=dtype)
    a = 10 ** (-decades * torch.rand(B, N, generator=generator, dtype=dtype))
    b = 10 ** (-decades * torch.rand(B, M, generator=generator, dtype=dtype))
    return C, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def clouds(B: int, N: int, M: int, D: int, dtype: torch.dtype, decades: float = 1) -> tuple:
    """Points x, y and weights a, b of mass 1 over `decades` orders of magnitude."""
    generator = torch.Generator().manual_seed(N + 7 * M + D)

    def weights(n: int) -> Tensor:
        w = 10 ** (-decades * torch.rand(B, n, dtype=dtype, generator=generator))
        return w / w.sum(-1, keepdim=True)

    x = torch.randn(B, N, D, dtype=dtype, generator=generator)
    y = torch.randn(B, M, D, dtype=dtype, generator=generator) + 0.3
    return x, y, weights(N), weights(M)


def cost_oracle(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Cost ``(..., N, M)`` through the full ``(..., N, M, D)`` difference."""
    difference = x.unsqueeze(-2) - y.unsqueeze(-3)
    if metric == "l1":
        return difference.abs().sum(-1)
    if metric == "sqeuclidean":
        return difference.square().sum(-1)
    if metric == "l2":
        squared = difference.square().sum(-1)
        safe = torch.where(squared > 0, squared, 1)
        return torch.where(squared > 0, safe.sqrt(), 0)
    if metric == "cosine":
        dot = (x.unsqueeze(-2) * y.unsqueeze(-3)).sum(-1)
        return 1 - dot / (x.norm(dim=-1).unsqueeze(-1) * y.norm(dim=-1).unsqueeze(-2))
    raise ValueError(metric)


def torch_loop(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float | Tensor,
    max_iter: int,
    g: Tensor | None = None,
    rho_a: float = math.inf,
    rho_b: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """The plain log-domain loop that people write: (f, g) after `max_iter` iterations."""
    eps = torch.as_tensor(eps, dtype=C.dtype)
    e1, e2 = (eps[..., None], eps[..., None, None]) if eps.dim() else (eps, eps)
    damp_a, damp_b = 1 / (1 + e1 / rho_a), 1 / (1 + e1 / rho_b)
    log_a, log_b = a.log(), b.log()
    g = torch.zeros_like(b) if g is None else g
    f = torch.zeros_like(a)
    for _ in range(max_iter):
        f = -damp_a * e1 * torch.logsumexp((log_b + g / e1).unsqueeze(-2) - C / e2, -1)
        g = -damp_b * e1 * torch.logsumexp((log_a + f / e1).unsqueeze(-1) - C / e2, -2)
    return f, g


def plan_oracle(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float | Tensor
) -> Tensor:
    e = torch.as_tensor(eps, dtype=C.dtype)
    e = e[..., None, None] if e.dim() else e
    log_plan = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / e + a.log().unsqueeze(-1)
    return (log_plan + b.log().unsqueeze(-2)).exp()


def sinkhorn_oracle(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    max_iter: int,
    g: Tensor | None = None,
    rho_a: float = math.inf,
    rho_b: float = math.inf,
) -> dict[str, Tensor]:
    """f, g, plan, value, cost and marginal error by the plain loop; differentiable throughout.

    With a finite penalty the value is the dual objective written out in full, mass of P included.

    Problems with masks must be cut to their unmasked part by the caller.
    """
    N, M = C.shape[-2:]
    a = C.new_full(C.shape[:-1], 1 / N) if a is None else a
    b = C.new_full((*C.shape[:-2], M), 1 / M) if b is None else b
    f, g = torch_loop(C, a, b, eps, max_iter, g, rho_a, rho_b)
    P = plan_oracle(C, f, g, a, b, eps)
    by_a = a * (f if math.isinf(rho_a) else rho_a * (1 - (-f / rho_a).exp()))
    by_b = b * (g if math.isinf(rho_b) else rho_b * (1 - (-g / rho_b).exp()))
    value = by_a.sum(-1) + by_b.sum(-1)
    if not (math.isinf(rho_a) and math.isinf(rho_b)):
        value = value - eps * (P.sum((-1, -2)) - a.sum(-1) * b.sum(-1))
    return {
        "f": f,
        "g": g,
        "plan": P,
        "value": value,
        "cost": (P * C).sum((-1, -2)),
        "marginal_error": (P.sum(-1) - a * (-f / rho_a).exp()).abs().sum(-1),
    }


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Of centred clouds in float64, ``(B, N, M)``, by one product: exact to 1e-13 of the norms."""
    own_x, own_y = x.square().sum(-1), y.square().sum(-1)
    return (own_x.unsqueeze(-1) + own_y.unsqueeze(-2) - 2 * x @ y.mT).clamp_min(0)


def clouds_oracle(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, eps: float, max_iter: int, entries: int = 1 << 26
) -> dict[str, Tensor]:
    """`torch_loop` in float64 on the squared distances of ``(B, N, D)`` and ``(B, M, D)``.

    Only some rows of the costs, `entries` in all, exist at a time. Returns f, g, value and two
    gradients of x: ``dx`` with the plan held fixed, and ``dx_met`` with each row of the plan scaled
    to its weight first.
    """
    x, y, a, b = (t.double() for t in (x, y, a, b))
    centre = y.mean(-2, keepdim=True)
    x, y, log_a, log_b = x - centre, y - centre, a.log(), b.log()
    step = max(1, entries // (len(x) * y.shape[-2]))
    blocks = [slice(i, i + step) for i in range(0, x.shape[-2], step)]
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(max_iter):
        over_rows = torch.full_like(b, -math.inf)
        for rows in blocks:
            C = squared_distances(x[:, rows], y) / eps
            f[:, rows] = -eps * torch.logsumexp((log_b + g / eps).unsqueeze(-2) - C, -1)
            own = (log_a[:, rows] + f[:, rows] / eps).unsqueeze(-1)
            over_rows = torch.logaddexp(over_rows, torch.logsumexp(own - C, -2))
        g = -eps * over_rows
    dx, dx_met = torch.empty_like(x), torch.empty_like(x)
    for rows in blocks:
        C = squared_distances(x[:, rows], y)
        P = plan_oracle(C, f[:, rows], g, a[:, rows], b, eps)
        mass, moved = P.sum(-1, keepdim=True), P @ y
        dx[:, rows] = 2 * (x[:, rows] * mass - moved)
        met = torch.where(mass > 0, moved / mass, x[:, rows])
        dx_met[:, rows] = 2 * a[:, rows].unsqueeze(-1) * (x[:, rows] - met)
    value = (a * f).sum(-1) + (b * g).sum(-1)
    return {"f": f, "g": g, "value": value, "dx": dx, "dx_met": dx_met}


def plan_rows(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, rows: Tensor
) -> Tensor:
    """Some rows of the plan that potentials stand for, in float64, ``(B, len(rows), M)``."""
    x, y, a, b, f, g = (t.double() for t in (x, y, a, b, f, g))
    centre = y.mean(-2, keepdim=True)
    C = squared_distances(x[:, rows] - centre, y - centre)
    return plan_oracle(C, f[:, rows], g, a[:, rows], b, eps)


def some_rows(x: Tensor, count: int = 64) -> Tensor:
    """Indices of some points, evenly spread."""
    return torch.arange(0, x.shape[-2], max(1, x.shape[-2] // count), device=x.device)


def plan_error(seen: Tensor, exact: Tensor) -> float:
    """``sum |P - P_exact| / sum P_exact`` over some rows of plans, the worst of the batch."""
    off = (seen.double() - exact).abs().sum((-1, -2))
    return (off / exact.sum((-1, -2))).max().item()


def unbalanced_primal(
    P: Tensor, C: Tensor, a: Tensor, b: Tensor, eps: float, rho_a: float, rho_b: float
) -> Tensor:
    """``<P, C> + eps KL(P | a x b) + rho_a KL(P 1 | a) + rho_b KL(P' 1 | b)``, one problem."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (torch.xlogy(p, p / q) - p + q).sum()

    total = (P * C).sum() + eps * kl(P, a[:, None] * b)
    return total + rho_a * kl(P.sum(1), a) + rho_b * kl(P.sum(0), b)


def sinkd_oracle(C: Tensor, eps: float, max_iter: int) -> Tensor:
    """SinKD's plan: ``exp(-C / eps)`` with rows, then columns scaled to sum 1, again and again."""
    K = (-C / eps).exp()
    for _ in range(max_iter):
        K = K / K.sum(-1, keepdim=True)
        K = K / K.sum(-2, keepdim=True)
    return K


def gaussian_ot_1d(mean_x: float, std_x: float, mean_y: float, std_y: float, eps: float) -> float:
    """Entropic OT cost (dual value) of two 1-D Gaussians under (x - y)^2.

    Janati, Muzellec, Peyre & Cuturi, "Entropic Optimal Transport between Unbalanced Gaussian
    Measures has a Closed Form", NeurIPS 2020, theorem 1, with eps = 2 sigma^2 and KL to a x b.
    """
    sigma2 = eps / 2
    d = math.sqrt(4 * std_x**2 * std_y**2 + sigma2**2)
    bures = std_x**2 + std_y**2 - d + sigma2 * (1 - math.log(2 * sigma2) + math.log(d + sigma2))
    return (mean_x - mean_y) ** 2 + bures


def bures_oracle(x: Tensor, y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of normal distributions with the moments of two clouds.

    Malago, Montrucchio & Pistone 2018: the trace of (S S')^(1/2) is that of the roots of its
    eigenvalues, which are those of a product of two positive matrices, so not negative.
    """
    means = x.mean(0), y.mean(0)
    S, T = ((t - m).T @ (t - m) / len(t) for t, m in zip((x, y), means, strict=True))
    squares = torch.linalg.eigvals(S @ T).real
    present = squares > 1e-14
    shared = torch.where(present, squares, 1).sqrt() * present
    return (means[0] - means[1]).square().sum() + S.trace() + T.trace() - 2 * shared.sum()


def dataset_distance_oracle(
    x: Tensor,
    lx: Tensor,
    y: Tensor,
    ly: Tensor,
    *,
    eps: float,
    max_iter: int,
    eps_labels: float | None = None,
    metric: str = "sqeuclidean",
    labels: str | Tensor = "sinkhorn",
    lambda_x: float = 1.0,
    lambda_y: float = 1.0,
    debias: bool = True,
    debias_labels: bool = True,
) -> Tensor:
    """Distance of two labelled data sets, one pair of classes after the other."""

    def transport(p: Tensor, q: Tensor) -> Tensor:
        by = eps if eps_labels is None else eps_labels
        return sinkhorn_oracle(cost_oracle(p, q, metric), eps=by, max_iter=max_iter)["value"]

    def classes(x: Tensor, lx: Tensor) -> list[tuple]:
        """Of each its label, its points and half of what it costs to take them to themselves."""
        parts = [(k, x[lx == k]) for k in lx.unique()]
        debiased = labels == "sinkhorn" and debias_labels
        return [(k, p, transport(p, p) / 2 if debiased else 0) for k, p in parts]

    def distance(x: Tensor, lx: Tensor, y: Tensor, ly: Tensor) -> Tensor:
        W = x.new_zeros(len(x), len(y))
        if isinstance(labels, Tensor):
            W = labels[lx][:, ly]
        else:
            between = bures_oracle if labels == "gaussian" else transport
            of_y = classes(y, ly)
            for k, p, own_p in classes(x, lx):
                for m, q, own_q in of_y:
                    pairs = ((lx == k)[:, None] & (ly == m)).to(x.dtype)
                    W = W + pairs * (between(p, q) - own_p - own_q)
        C = lambda_x * cost_oracle(x, y, metric) + lambda_y * W
        return sinkhorn_oracle(C, eps=eps, max_iter=max_iter)["value"]

    value = distance(x, lx, y, ly)
    if debias:
        value = value - (distance(x, lx, x, lx) + distance(y, ly, y, ly)) / 2
    return value
