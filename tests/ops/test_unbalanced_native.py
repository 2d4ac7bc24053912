"""The native solver with KL penalties on the marginals, against a float64 loop and autograd."""

import itertools

import pytest
import torch
from references import problem

from otdd.ops.sinkhorn.cpu import plan_cpu, potentials_backward_cpu, sinkhorn_cpu

INF = torch.inf
SIZES = [(1, 1), (1, 9), (9, 1), (5, 7), (33, 50), (64, 64), (400, 390)]
RHOS = [(1.0, 1.0), (0.02, INF), (INF, 0.3), (1e-3, 5.0), (1e5, 2e5)]


def loop(C, a, b, eps, rho_a, rho_b, max_iter, g):
    """(f, g) after `max_iter` iterations."""
    la = 1.0 if rho_a == INF else rho_a / (rho_a + eps)
    lb = 1.0 if rho_b == INF else rho_b / (rho_b + eps)
    for _ in range(max_iter):
        f = -la * eps * torch.logsumexp((b.log() + g / eps).unsqueeze(-2) - C / eps, -1)
        g = -lb * eps * torch.logsumexp((a.log() + f / eps).unsqueeze(-1) - C / eps, -2)
    return f, g


def worth(f, rho):
    return f if rho == INF else -rho * torch.expm1(-f / rho)


def outputs(C, a, b, eps, rho_a, rho_b, f, g):
    plan = ((f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps).exp() * a.unsqueeze(-1) * b.unsqueeze(-2)
    value = (a * worth(f, rho_a)).sum(-1) + (b * worth(g, rho_b)).sum(-1)
    if (rho_a, rho_b) != (INF, INF):
        value = value - eps * ((b * (-g / rho_b).exp()).sum(-1) - a.sum(-1) * b.sum(-1))
    error = (plan.sum(-1) - a * (-f / rho_a).exp()).abs().sum(-1)
    return plan, value, (plan * C).sum((-1, -2)), error


def solve(C, a, b, eps, rho_a, rho_b, max_iter, g, tol=0.0, history=False):
    full = [torch.full(C.shape[:1], float(v), dtype=torch.float64) for v in (eps, rho_a, rho_b)]
    return sinkhorn_cpu(C, a, b, *full, g, max_iter, tol, history), full


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rho_a", "rho_b"), RHOS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_values(size, rho_a, rho_b, dtype, tol):
    C, a, b = problem(2, *size, dtype)
    g = torch.randn(2, size[1], dtype=dtype) * 0.1
    wide = [t.double() for t in (C, a, b)]
    for eps, max_iter in itertools.product((0.5, 0.01), (1, 2, 20)):
        out, full = solve(C, a, b, eps, rho_a, rho_b, max_iter, g)
        f, g2 = loop(*wide, eps, rho_a, rho_b, max_iter, g.double())
        plan, value, cost, error = outputs(*wide, eps, rho_a, rho_b, f, g2)
        got = plan_cpu(C, out.f, out.g, a, b, full[0], torch.ones(2, dtype=dtype))
        pairs = ((out.f, f), (out.g, g2), (got, plan), (out.value, value), (out.cost, cost))
        for seen, exact in (*pairs, (out.marginal_error, error)):
            scale = max(1.0, exact.abs().max().item())
            torch.testing.assert_close(seen.double(), exact, rtol=tol, atol=tol * scale)


@pytest.mark.parametrize("ratio", [1e0, 1e2, 1e3, 1e5])
@pytest.mark.parametrize("rho", [1e-3, 1e-1, 1e0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("decades", [0.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_ratio(ratio, rho, decades, dtype):
    C, a, b = problem(2, 40, 50, dtype, decades)
    eps, unit = 1 / ratio, 6e-8 if dtype == torch.float32 else 1e-15
    for rho_a, rho_b in ((rho * eps, rho * eps), (rho * eps, INF), (INF, rho * eps)):
        for max_iter in (1, 3, 30):
            g = torch.zeros(2, 50, dtype=dtype)
            wide = [t.double() for t in (C, a, b)]
            out, _ = solve(C, a, b, eps, rho_a, rho_b, max_iter, g)
            f, g2 = loop(*wide, eps, rho_a, rho_b, max_iter, g.double())
            _, value, cost, error = outputs(*wide, eps, rho_a, rho_b, f, g2)
            # the float64 loop itself loses ratio / 1e16 of the plan
            tol = 100 * unit + 1e-16 * ratio
            pairs = (out.f, f), (out.g, g2), (out.value, value), (out.cost, cost)
            for seen, exact in (*pairs, (out.marginal_error, error)):
                scale = max(1.0, exact.abs().max().item())
                torch.testing.assert_close(seen.double(), exact, rtol=tol, atol=tol * scale)


@pytest.mark.parametrize(("rho_a", "rho_b"), RHOS)
def test_tolerance_and_history(rho_a, rho_b):
    C, a, b = problem(3, 20, 30)
    g = torch.zeros(3, 30, dtype=torch.float64)
    out, _ = solve(C, a, b, 0.1, rho_a, rho_b, 500, g, tol=1e-6, history=True)
    for k in range(3):
        n = int(out.n_iter[k])
        part = (C[k], a[k], b[k], 0.1, rho_a, rho_b)
        for steps in (1, n - 1, n):
            f, g2 = loop(*part, max(steps, 1), g[k])
            torch.testing.assert_close(out.history[k, max(steps, 1)], torch.cat([f, g2]))
        assert outputs(*part, f, g2)[3] <= 1e-6 or n == 500
        if n > 1:
            assert outputs(*part, *loop(*part, n - 1, g[k]))[3] > 1e-6


@pytest.mark.parametrize("size", SIZES[:-1])
@pytest.mark.parametrize(("rho_a", "rho_b"), RHOS)
@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
@pytest.mark.parametrize("eps", [0.3, 0.02])
def test_gradients(size, rho_a, rho_b, mode, eps):
    C, a, b = (t.requires_grad_() for t in problem(2, *size))
    g = torch.zeros(2, size[1], dtype=torch.float64)
    steps = 6 if mode == "unrolled" else 600
    f, g2 = loop(C, a, b, eps, rho_a, rho_b, steps, g)
    df, dg = torch.randn_like(f), torch.randn_like(g2)
    if mode == "implicit" and min(rho_a, rho_b) > 10:
        dg = dg - (dg.sum(-1, keepdim=True) - df.sum(-1, keepdim=True)) / size[1]
        if rho_a != INF:
            pytest.skip("a start in float64 is not at this fixed point after 600 steps")
    want = torch.autograd.grad((f * df).sum() + (g2 * dg).sum(), (C, a, b))
    parts = [t.detach() for t in (C, a, b)]
    out, full = solve(*parts, eps, rho_a, rho_b, steps, g, history=mode == "unrolled")
    got = potentials_backward_cpu(
        *parts, *full, out.f, out.g, out.history, out.n_iter, df, dg, mode
    )
    tol = 1e-9 if mode == "unrolled" else 1e-5
    for seen, exact in zip(got, want, strict=True):
        assert (seen - exact).norm() <= tol * exact.norm() + 1e-10
