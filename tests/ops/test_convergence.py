"""`schedule=` and `accelerate=`: the same fixed point, in fewer iterations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import plan_oracle, problem

from otdd.ops import SinkhornResult, cost_matrix, sinkhorn

BACKENDS = ("reference", "cpu")
OPTIONS = (
    {"accelerate": "anderson"},
    {"schedule": 0.2},
    {"schedule": 0.1, "accelerate": "anderson"},
)


def points(N: int, M: int, D: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, dtype=torch.float64, generator=generator)
    return cost_matrix(x, 0.3 + torch.randn(M, D, dtype=torch.float64, generator=generator))


def mismatched_blocks(gap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Costs of two blocks with masses that differ by a tenth, far from each other."""
    C, _, _ = problem(1, 20, 20)
    C[:, :10, 10:] += gap
    C[:, 10:, :10] += gap
    a = torch.full((1, 20), 1 / 20, dtype=torch.float64)
    a[:, :10] *= 1.1
    a[:, 10:] *= 0.9
    return C, a, torch.full((1, 20), 1 / 20, dtype=torch.float64)


def check_is_a_result(result: SinkhornResult, tol: float) -> None:
    """Columns are met, rows to `tol`, and the other outputs belong to the potentials."""
    P = plan_oracle(result.C, result.f, result.g, result.a, result.b, result.eps)
    torch.testing.assert_close(P.sum(-2), result.b, rtol=1e-9, atol=1e-12)
    error = (P.sum(-1) - result.a).abs().sum(-1)
    torch.testing.assert_close(result.marginal_error, error, rtol=1e-6, atol=1e-11)
    assert (error <= tol * (1 + 1e-6)).all()
    value = (result.a * result.f).sum(-1) + (result.b * result.g).sum(-1)
    torch.testing.assert_close(result.value, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.cost, (P * result.C).sum((-1, -2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("decades", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["uniform", "points"])
def test_reaches_the_fixed_point(backend, options, decades, kind):
    C, a, b = problem(2, 30, 40, decades=decades)
    if kind == "points":
        C = points(30, 40, 3).expand(2, 30, 40)
    eps = torch.tensor([1.0, 0.1], dtype=torch.float64) * C.std()
    plain = sinkhorn(C, a, b, eps=eps, max_iter=5000, tol=1e-12, backend=backend)
    result = sinkhorn(C, a, b, eps=eps, max_iter=5000, tol=1e-12, backend=backend, **options)
    assert plain.converged.all()
    assert result.converged.all()
    check_is_a_result(result, 1e-12)
    torch.testing.assert_close(result.plan, plain.plan, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(result.value, plain.value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 2, 8])
def test_takes_a_fraction_of_the_iterations(backend, dtype, D):
    C = points(64, 64, D).to(dtype)
    options = {"eps": 0.02 * C.std().item(), "max_iter": 3000, "tol": 1e-4, "backend": backend}
    plain = sinkhorn(C, **options)
    result = sinkhorn(C, accelerate="anderson", **options)
    assert plain.converged
    assert result.converged
    assert result.n_iter * 4 < plain.n_iter


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedule_pays_at_small_eps(backend):
    C = points(40, 40, 4)
    options = {"eps": 1e-3 * C.std().item(), "max_iter": 3000, "tol": 1e-4, "backend": backend}
    slow = sinkhorn(C, accelerate="anderson", **options)
    fast = sinkhorn(C, accelerate="anderson", schedule=0.1, **options)
    assert slow.converged
    assert fast.converged
    assert fast.n_iter < slow.n_iter
    check_is_a_result(fast, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [10.0, 100.0])
def test_drifting_blocks(backend, gap):
    """Plain iterations move one block's potentials at a constant rate; jumps have no such limit."""
    C, a, b = mismatched_blocks(gap)
    options = {"eps": 0.3, "max_iter": 20000, "tol": 1e-6, "backend": backend}
    plain, result = (
        sinkhorn(C, a, b, **options),
        sinkhorn(C, a, b, accelerate="anderson", **options),
    )
    assert plain.converged
    assert result.converged
    assert result.n_iter < plain.n_iter
    torch.testing.assert_close(result.plan, plain.plan, rtol=1e-4, atol=1e-6)
    assert result.g.abs().max() < 10 * gap


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (5, 7), (33, 50), (64, 64), (20, 300)])
@pytest.mark.parametrize("max_iter", [1, 3, 4, 5, 30])
def test_backends_do_the_same_iterations(options, size, max_iter):
    C, a, b = problem(3, *size)
    eps = torch.tensor([0.5, 0.05, 0.02])
    seen = [
        sinkhorn(C, a, b, eps=eps, max_iter=max_iter, backend=backend, **options)
        for backend in BACKENDS
    ]
    assert torch.equal(seen[0].n_iter, seen[1].n_iter)
    for name in ("plan", "value", "cost", "marginal_error"):
        one, other = (getattr(r, name) for r in seen)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=name)
    if "schedule" not in options:
        assert (seen[0].n_iter == max_iter).all()  # without tol all of them are done


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_each_problem_of_a_batch_goes_its_own_way(backend, options):
    C, a, b = problem(6, 20, 20)
    eps = torch.tensor([1.0, 0.3, 0.1, 0.05, 0.03, 0.01])
    together = sinkhorn(C, a, b, eps=eps, max_iter=400, tol=1e-6, backend=backend, **options)
    assert len(set(together.n_iter.tolist())) > 3
    for k in range(6):
        alone = sinkhorn(
            C[k], a[k], b[k], eps=eps[k], max_iter=400, tol=1e-6, backend=backend, **options
        )
        assert together.n_iter[k] == alone.n_iter
        torch.testing.assert_close(together.plan[k], alone.plan, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padding", [0.0, 1e6, -1e6])
def test_masks_take_no_part(backend, options, padding):
    C, a, b = problem(3, 12, 20)
    rows, columns = [12, 7, 1], [3, 20, 20]
    for k, (n, m) in enumerate(zip(rows, columns, strict=True)):
        a[k, n:], b[k, m:] = 0, 0
        a[k], b[k] = a[k] / a[k].sum(), b[k] / b[k].sum()
        C[k, n:], C[k, :, m:] = padding, padding
    result = sinkhorn(C, a, b, eps=0.02, max_iter=500, tol=1e-9, backend=backend, **options)
    assert result.converged.all()
    assert torch.isfinite(result.f).all()
    assert torch.isfinite(result.g).all()
    for k, (n, m) in enumerate(zip(rows, columns, strict=True)):
        part = C[k, :n, :m], a[k, :n], b[k, :m]
        alone = sinkhorn(*part, eps=0.02, max_iter=500, tol=1e-9, backend=backend, **options)
        torch.testing.assert_close(result.plan[k, :n, :m], alone.plan, rtol=1e-6, atol=1e-9)
        assert (result.plan[k, n:] == 0).all()
        assert (result.plan[k, :, m:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rho", [(0.5, None), (None, 0.5), (2.0, 0.1), (0.05, 0.05)])
def test_unbalanced(backend, options, rho):
    C, a, b = problem(2, 15, 25)
    a = 1.7 * a
    shared = {"eps": 0.02, "rho_a": rho[0], "rho_b": rho[1], "max_iter": 4000, "tol": 1e-11}
    plain = sinkhorn(C, a, b, backend=backend, **shared)
    result = sinkhorn(C, a, b, backend=backend, **shared, **options)
    assert plain.converged.all()
    assert result.converged.all()
    torch.testing.assert_close(result.plan, plain.plan, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(result.value, plain.value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_gradients_are_those_of_the_fixed_point(backend, options, grad):
    inputs = [t.requires_grad_() for t in problem(2, 9, 11)]
    shared = {"eps": 0.05, "max_iter": 3000, "tol": 1e-13, "grad": grad, "backend": backend}
    seen = []
    for more in ({}, options):
        result = sinkhorn(*inputs, **shared, **more)
        target = result.value.sum() if grad == "envelope" else (result.plan**2).sum()
        dC, da, db = torch.autograd.grad(target, inputs)
        centred = (t - t.mean(-1, keepdim=True) for t in (da, db))  # known up to a constant
        seen.append((dC, *centred))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1e2, 1e4])
@pytest.mark.parametrize("decades", [0.0, 12.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_extremes_stay_finite(backend, dtype, ratio, decades, options):
    C, a, b = problem(2, 20, 30, dtype, decades)
    C = C * 1e6
    result = sinkhorn(C, a, b, eps=1e6 / ratio, max_iter=60, tol=1e-9, backend=backend, **options)
    for name in ("f", "g", "plan", "value", "cost", "marginal_error"):
        assert torch.isfinite(getattr(result, name)).all(), name
    assert result.g.abs().max() <= 100 * 1e6
    tol = (1e-5 if dtype == torch.float32 else 1e-12) * ratio
    torch.testing.assert_close(result.plan.sum(-2), b, rtol=tol, atol=tol)


def drawn(
    N: int, M: int, D: int, decades: float, exponent: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """A problem and its eps, ``10 ** exponent`` of the costs' spread."""
    C, a, b = (t[0] for t in problem(1, N, M, decades=decades, seed=seed))
    C = points(N, M, D, seed) if D else C
    spread = C.std().item() if C.numel() > 1 else 1.0
    return C, a, b, 10**exponent * max(spread, 0.05)


@given(
    N=st.integers(1, 20),
    M=st.integers(1, 20),
    D=st.integers(0, 6),
    decades=st.sampled_from([0.0, 1.0, 3.0]),
    exponent=st.floats(-2, 0),
    digits=st.integers(2, 8),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_converges_where_plain_iterations_do(N, M, D, decades, exponent, digits, seed):
    C, a, b, eps = drawn(N, M, D, decades, exponent, seed)
    shared = {"eps": eps, "tol": 10.0**-digits, "backend": "cpu"}
    plain = sinkhorn(C, a, b, max_iter=2000, **shared)
    result = sinkhorn(C, a, b, max_iter=10000, accelerate="anderson", **shared)
    if plain.converged:
        assert result.converged
    assert result.value >= plain.value - 1e-3 * abs(plain.value) - 1e-6


def test_hardly_ever_costs_iterations():
    """400 small problems take a quarter of the iterations, and 1 % of them more than plain ones."""
    counts = []
    for seed in range(400):
        N, M = 2 + 7 * seed % 19, 2 + 5 * seed % 17
        C, a, b, eps = drawn(N, M, seed % 7, float(seed % 4), -2 * (seed % 11) / 10, seed)
        shared = {"eps": eps, "max_iter": 2000, "tol": 10.0 ** -(2 + seed % 7), "backend": "cpu"}
        pair = (sinkhorn(C, a, b, **shared, accelerate=name) for name in (None, "anderson"))
        counts.append([r.n_iter.item() for r in pair])
    plain, fast = torch.tensor(counts).T
    assert (fast > 1.2 * plain + 4).sum() <= 4
    assert 4 * fast.sum() < plain.sum()


@pytest.mark.parametrize("options", OPTIONS)
def test_threads_do_not_change_the_result(options):
    C = points(500, 400, 3)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(sinkhorn(C, eps=0.05, max_iter=40, backend="cpu", **options))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert torch.equal(seen[0].f, other.f)
        assert torch.equal(seen[0].g, other.g)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerate": "newton"}, "accelerate: got 'newton'; accepted: None, anderson"),
        ({"accelerate": True}, "accelerate: got True"),
        ({"schedule": 0.0}, "schedule: got 0.0; accepted: None, or a ratio in"),
        ({"schedule": 1}, "schedule: got 1"),
        ({"schedule": float("nan")}, "schedule: got nan"),
        ({"schedule": "half"}, "schedule: got 'half'"),
        ({"schedule": True}, "schedule: got True"),
        ({"schedule": 0.5, "grad": "unrolled"}, "grad: got 'unrolled' beside schedule"),
        ({"accelerate": "anderson", "grad": "unrolled"}, "grad: got 'unrolled' beside"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.rand(3, 4), eps=0.1, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_compiles(options):
    C = torch.rand(2, 8, 9)

    def solve(C: torch.Tensor) -> torch.Tensor:
        return sinkhorn(C, eps=0.1, max_iter=30, backend="cpu", **options).value

    compiled = torch.compile(solve, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(C), solve(C))
