"""The drop-ins for POT, against the definitions and, where it is installed, against POT."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from references import problem, sinkhorn_oracle, unbalanced_primal

from otdd.compat import pot

REG = 0.1
EXACT = {"rtol": 1e-6, "atol": 1e-9}
NAN = [0.0, np.nan] + 7 * [0.0]


def single(dtype=torch.float64, N=7, M=9, decades=2):
    C, a, b = problem(1, N, M, dtype, decades)
    return C[0], a[0], b[0]


def oracle(C, a, b, reg=REG, max_iter=3000, **rho):
    return sinkhorn_oracle(C, a, b, eps=reg, max_iter=max_iter, **rho)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "SINKHORN"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_is_the_optimum_in_the_kind_it_was_given(method, kind, dtype):
    M, a, b = single(dtype)
    want = oracle(*(t.double() for t in (M, a, b)))
    given = (a, b, M) if kind == "torch" else (a.numpy(), b.numpy(), M.numpy())
    stop = 1e-5 if dtype == torch.float32 else 1e-11
    plan = pot.sinkhorn(*given, REG, method, stopThr=stop)
    cost = pot.sinkhorn2(*given, REG, method, stopThr=stop)
    assert type(plan) is type(given[2])
    assert plan.dtype == given[2].dtype
    if kind == "numpy":
        assert isinstance(cost, np.floating)
    exact = EXACT if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(torch.as_tensor(plan).double(), want["plan"], **exact)
    torch.testing.assert_close(torch.as_tensor(cost).double(), want["cost"], **exact)


def test_lists_and_empty_weights():
    plan = pot.sinkhorn([], [], [[0.0, 1.0], [1.0, 0.0]], 1)
    near = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(plan, np.array([[near, 1 - near], [1 - near, near]]) / 2, rtol=1e-9)
    M = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(pot.sinkhorn([0.5, 0.5], [0.5, 0.5], M, 1), plan, rtol=1e-9)
    with pytest.raises(TypeError, match=r"^a: got ndarray; accepted: torch.Tensor"):
        pot.sinkhorn(np.array([0.5, 0.5]), [0.5, 0.5], M, 1)


def test_arrays_of_any_layout():
    M, a, b = (t.numpy() for t in single())
    want = pot.sinkhorn(a, b, M, REG)
    big_endian, backwards = M.astype(">f8"), np.asfortranarray(M)[::-1]
    M.flags.writeable = False
    np.testing.assert_array_equal(pot.sinkhorn(a, b, M, REG), want)
    np.testing.assert_array_equal(pot.sinkhorn(a, b, big_endian, REG), want)
    np.testing.assert_allclose(pot.sinkhorn(a[::-1], b, backwards, REG)[::-1], want, rtol=1e-6)


def test_masked_points_have_no_plan():
    M, a, b = single()
    a, b = a.clone(), b.clone()
    a[2] = b[0] = 0
    a, b = a / a.sum(), b / b.sum()
    for grad in ("autodiff", "envelope"):
        leaves = [t.clone().requires_grad_() for t in (M, a, b)]
        result = pot.solve(*leaves, REG, grad=grad, reg_type="entropy")
        assert bool((result.plan[2] == 0).all())
        assert bool((result.plan[:, 0] == 0).all())
        result.value.backward()
        assert all(torch.isfinite(t.grad).all() for t in leaves)
        assert bool((leaves[0].grad[2] == 0).all())
    cut = oracle(M[a > 0][:, b > 0], a[a > 0], b[b > 0])
    torch.testing.assert_close(result.plan[a > 0][:, b > 0], cut["plan"], **EXACT)


def test_many_histograms_are_many_problems():
    M, a, b = single()
    many = torch.stack([b, b.flip(0), torch.full_like(b, 1 / 9)], 1)
    costs, log = pot.sinkhorn(a, many, M, REG, log=True)
    want = [oracle(M, a, column)["cost"] for column in many.unbind(1)]
    torch.testing.assert_close(costs, torch.stack(want), **EXACT)
    torch.testing.assert_close(pot.sinkhorn2(a, many, M, REG), costs)
    assert log["u"].shape == (7, 3)
    assert log["v"].shape == (9, 3)
    start = (log["log_u"], log["log_v"])
    _, again = pot.sinkhorn(a, many, M, REG, log=True, warmstart=start, stopThr=1e-8)
    assert again["niter"] == 1


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_logs_hold_scalings_that_start_another_solve(method, kind):
    M, a, b = single() if kind == "torch" else (t.numpy() for t in single())
    plan, log = pot.sinkhorn(a, b, M, REG, method, log=True)
    u, v = (log[k] for k in (("logu", "logv") if "logu" in log else ("log_u", "log_v")))
    made = (np if kind == "numpy" else torch).exp(u[:, None] + v[None] - M / REG)
    np.testing.assert_allclose(made, plan, rtol=1e-9)
    start = log.get("warmstart", (u, v))
    _, again = pot.sinkhorn(a, b, M, REG, method, log=True, warmstart=start, stopThr=1e-8)
    assert again.get("niter", again.get("n_iter")) == 1
    assert again["err"][0] <= 1e-8


def test_gradients_of_plan_and_cost_are_those_of_the_optimum():
    leaves = [t.requires_grad_() for t in single()]
    weights = torch.rand(7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M, a, b = leaves
    got = torch.autograd.grad((pot.sinkhorn(a, b, M, REG, stopThr=1e-12) * weights).sum(), leaves)
    want = torch.autograd.grad((oracle(M, a, b, max_iter=500)["plan"] * weights).sum(), leaves)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-8)
    for seen, exact in zip(got[1:], want[1:], strict=True):  # up to a constant
        assert float((seen - exact).std()) < 1e-6 * float(exact.std())
    (seen,) = torch.autograd.grad(pot.sinkhorn2(a, b, M, REG, stopThr=1e-12), M)
    (exact,) = torch.autograd.grad(oracle(M, a, b, max_iter=500)["cost"], M)
    torch.testing.assert_close(seen, exact, rtol=1e-6, atol=1e-8)


def test_warns_and_prints(capsys):
    M, a, b = single()
    with pytest.warns(UserWarning, match="did not converge: marginal error .* after 2 iterations"):
        pot.sinkhorn(a, b, M, 0.01, numItermax=2, verbose=True)
    assert "2 iterations, marginal error" in capsys.readouterr().out
    pot.sinkhorn2(a, b, M, 0.01, numItermax=2)  # silent, as in POT


def test_a_solve_that_stopped_by_itself_does_not_warn():
    """At a tolerance of a rounding or two its error, summed anew, meets it as well."""
    for seed in range(40):
        M = torch.rand(7, 9, generator=torch.Generator().manual_seed(seed))
        with warnings.catch_warnings(action="error"):
            options = {"unbalanced": 1.0, "max_iter": 1000, "tol": 3e-7}
            pot.solve(M, reg=REG, **options)
        with pytest.warns(UserWarning, match="did not converge: .* after 3 iterations"):
            pot.solve(M, reg=0.01, **options | {"max_iter": 3})


@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
@pytest.mark.parametrize("B", [0, 1, 3])
def test_solve_batch(reg_type, B):
    M, a, b = problem(B, 7, 9, decades=2)
    result = pot.solve_batch(M, REG, a, b, tol=1e-11, reg_type=reg_type)
    want = oracle(M, a, b)
    P = want["plan"]
    reference = torch.ones_like(P) if reg_type == "entropy" else a[..., None] * b[:, None]
    value = want["cost"] + REG * torch.xlogy(P, P / reference).sum((-1, -2))
    assert result.value.shape == (B,)
    for seen, exact in (
        (result.plan, P),
        (result.value, value),
        (result.value_linear, want["cost"]),
    ):
        torch.testing.assert_close(seen, exact, **EXACT)
    u, v = result.potentials
    torch.testing.assert_close((u[..., None] + v[:, None] - M / REG).exp(), P, **EXACT)
    torch.testing.assert_close(result.marginal_b, b)
    torch.testing.assert_close(result.marginal_a, a)
    assert (result.log["n_iter"] > 1) == (B > 0)


def test_results_are_shown_in_a_line():
    M, a, b = single()
    result = pot.solve(M, a, b, REG)
    said = (
        "OTResult(value=float64 (), value_linear=float64 (), plan=float64 (7, 9), "
        "potentials=2 tensors, log="
    )
    assert repr(result).startswith(said)
    arrays = pot.solve(M.numpy(), reg=REG)
    assert repr(arrays).startswith(said.replace("tensors", "arrays"))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_results_stay_when_the_costs_change(kind):
    """As those of POT do: a loop may fill one M again and again."""
    M, a, b = single() if kind == "torch" else (t.numpy() for t in single())
    single_one, many = pot.solve(M, a, b, REG), pot.solve_batch(M[None], REG, a[None], b[None])
    want = [torch.as_tensor(t).clone() for t in (pot.sinkhorn(a, b, M, REG), a, b)]
    M *= 0
    for result in (single_one, many):
        found = (result.plan, result.marginal_a, result.marginal_b)
        for seen, exact in zip(found, want, strict=True):
            seen = torch.as_tensor(seen).reshape(exact.shape)
            torch.testing.assert_close(seen, exact, rtol=0, atol=1e-5)


def test_solve_batch_gradient_modes():
    M, a, b = problem(2, 5, 6)
    M.requires_grad_()
    want = oracle(M, a, b, max_iter=500)
    options = {"a": a, "b": b, "tol": 1e-11}
    for grad in ("envelope", "autodiff"):
        value = pot.solve_batch(M, REG, **options, grad=grad).value
        torch.testing.assert_close(torch.autograd.grad(value.sum(), M)[0], want["plan"], **EXACT)
    cost = pot.solve_batch(M, REG, **options, grad="autodiff").value_linear.sum()
    (exact,) = torch.autograd.grad(want["cost"].sum(), M)
    torch.testing.assert_close(torch.autograd.grad(cost, M)[0], exact, rtol=1e-6, atol=1e-8)
    assert not pot.solve_batch(M, REG, **options, grad="detach").value.requires_grad
    assert not pot.solve_batch(M, REG, **options, grad="envelope").plan.requires_grad


@pytest.mark.parametrize("rho", [(0.5, 0.5), (0.3, 2.0), (float("inf"), 0.5), (0.4, float("inf"))])
def test_unbalanced_is_the_optimum_of_the_penalised_problem(rho):
    M, a, b = single()
    a = 1.7 * a
    want = oracle(M, a, b, rho_a=rho[0], rho_b=rho[1])
    plan, log = pot.sinkhorn_unbalanced(a, b, M, REG, rho, stopThr=1e-12, log=True)
    torch.testing.assert_close(plan, want["plan"], **EXACT)
    torch.testing.assert_close(log["cost"], want["cost"], **EXACT)
    torch.testing.assert_close(
        pot.sinkhorn_unbalanced2(a, b, M, REG, rho, stopThr=1e-12), want["cost"], **EXACT
    )
    made = a[:, None] * b * (log["logu"][:, None] + log["logv"] - M / REG).exp()
    torch.testing.assert_close(made, plan, **EXACT)
    if all(map(np.isfinite, rho)):
        primal = unbalanced_primal(plan, M, a, b, REG, *rho)
        torch.testing.assert_close(log["total_cost"], primal, **EXACT)
    start = (log["logu"], log["logv"])
    again = pot.sinkhorn_unbalanced(a, b, M, REG, rho, numItermax=2, warmstart=start)
    torch.testing.assert_close(again, plan)


@pytest.mark.parametrize("grad", ["autodiff", "envelope"])
def test_unbalanced_solve_has_the_gradient_of_its_value(grad):
    leaves = [t.requires_grad_() for t in single(N=4, M=5)]

    def value(*leaves):
        options = {"tol": 1e-13, "max_iter": 5000, "grad": grad}
        return pot.solve(*leaves, REG, unbalanced=0.5, **options).value

    assert torch.autograd.gradcheck(value, leaves, atol=1e-5)


CALLS = {
    "sinkhorn": lambda M, a, b, **o: pot.sinkhorn(a, b, M, **{"reg": REG} | o),
    "sinkhorn2": lambda M, a, b, **o: pot.sinkhorn2(a, b, M, **{"reg": REG} | o),
    "unbalanced": lambda M, a, b, **o: pot.sinkhorn_unbalanced(
        a, b, M, **{"reg": REG, "reg_m": 1.0} | o
    ),
    "solve": lambda M, a, b, **o: pot.solve(M, a, b, **{"reg": REG} | o),
    "batch": lambda M, a, b, **o: pot.solve_batch(
        M[None], a=a[None], b=b[None], **{"reg": REG} | o
    ),
}


@pytest.mark.parametrize(
    ("call", "options", "error", "message"),
    [
        ("sinkhorn", {"method": "greenkhorn"}, ValueError, "^method: got 'greenkhorn'.*_log"),
        ("sinkhorn2", {"method": "x"}, ValueError, "^method: got 'x'"),
        ("sinkhorn", {"reg": 0}, ValueError, "^reg: got 0"),
        ("sinkhorn", {"reg": -1.0}, ValueError, "^reg: got -1"),
        ("sinkhorn", {"numItermax": 0}, ValueError, "^numItermax: got 0"),
        ("sinkhorn", {"stopThr": -1}, ValueError, "^stopThr: got -1"),
        ("sinkhorn", {"warmstart": 3}, ValueError, "^warmstart: got int"),
        (
            "sinkhorn",
            {"warmstart": ([0.0], [0.0])},
            ValueError,
            r"^warmstart, its v: got shape \(1,",
        ),
        ("sinkhorn", {"warmstart": (None, None)}, ValueError, "^warmstart, its v: got nothing"),
        ("sinkhorn", {"warmstart": ([], ["a"] * 9)}, TypeError, "^warmstart, its v: got a list"),
        ("sinkhorn", {"warmstart": ([], NAN)}, ValueError, "^warmstart, its v: got nan"),
        ("unbalanced", {"warmstart": ([], NAN)}, ValueError, "^warmstart, its v: got nan"),
        ("solve", {"potentials_init": ([], NAN)}, ValueError, "^potentials_init, its v: got nan"),
        ("sinkhorn", {"warmstart": ([], [1e308] * 9), "reg": 1e3}, ValueError, "^warmstart: got"),
        ("unbalanced", {"reg_m": "a"}, TypeError, "^reg_m: got 'a'; accepted: a number or a pair"),
        ("unbalanced", {"reg_m": [[1], [2, 3]]}, TypeError, "^reg_m: got .*a number or a pair"),
        ("solve", {"unbalanced": {}}, TypeError, "^unbalanced: got {}; accepted: a number or a"),
        ("sinkhorn", {"tau": 1e3}, TypeError, "unexpected keyword argument 'tau'"),
        ("unbalanced", {"reg_m": -1.0}, ValueError, "^reg_m: got -1"),
        ("unbalanced", {"reg_m": (1, 2, 3)}, ValueError, r"^reg_m: got shape \(3,\)"),
        ("unbalanced", {"reg_m": None}, ValueError, "^reg_m: got None"),
        (
            "unbalanced",
            {"reg_type": "entropy"},
            ValueError,
            "^reg_type: got 'entropy'; accepted: kl",
        ),
        ("unbalanced", {"c": 1}, ValueError, "^c: got 1; accepted: None"),
        (
            "unbalanced",
            {"c": np.ones((7, 9))},
            ValueError,
            r"^c: got ndarray of shape \(7, 9\); accepted: None: it has no meaning",
        ),
        ("solve", {"reg": None}, TypeError, "^reg: got NoneType"),
        ("solve", {"reg_type": "L2"}, ValueError, "^reg_type: got 'L2'; accepted: kl, entropy"),
        ("solve", {"unbalanced": 1.0, "reg_type": "entropy"}, ValueError, "^reg_type: .*: kl$"),
        ("solve", {"unbalanced": 1.0, "unbalanced_type": "TV"}, ValueError, "^unbalanced_type"),
        ("solve", {"unbalanced": -1.0}, ValueError, "^unbalanced: got -1"),
        ("solve", {"grad": "last_step"}, ValueError, "^grad: got 'last_step'"),
        ("solve", {"n_threads": 4}, ValueError, "^n_threads: got 4; accepted: 1"),
        ("solve", {"method": "emd"}, ValueError, "^method: got 'emd'; accepted: None"),
        ("batch", {"method": "proximal"}, ValueError, "^method: got 'proximal'"),
        ("batch", {"inner_iter": 3}, ValueError, "^inner_iter: got 3; accepted: 1"),
        ("batch", {"grad": "last_step"}, ValueError, "^grad: got 'last_step'"),
        ("batch", {"reg_type": "l2"}, ValueError, "^reg_type: got 'l2'"),
    ],
)
def test_refusals_name_the_argument(call, options, error, message):
    M, a, b = single()
    with pytest.raises(error, match=message):
        CALLS[call](M, a, b, **options)


@pytest.mark.parametrize("call", ["sinkhorn", "sinkhorn2", "solve", "batch"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")
def test_masses_that_differ_are_refused(call, kind):
    """POT meets one marginal, another one with each method."""
    M, a, b = single() if kind == "torch" else (t.numpy() for t in single())
    accepted = "^a and b: got masses of 2 and 1; accepted: equal masses, or an unbalanced problem"
    with pytest.raises(ValueError, match=accepted):
        CALLS[call](M, 2 * a, b)
    CALLS[call](M, 3 * a, 3.001 * b)  # to 1e-3
    with pytest.raises(ValueError, match=accepted):
        CALLS["unbalanced"](M, 2 * a, b, reg_m=np.inf)
    CALLS["unbalanced"](M, 2 * a, b, reg_m=(np.inf, 1.0))
    if call.startswith("sinkhorn"):  # the second of two histograms
        module = np if kind == "numpy" else torch
        with pytest.raises(ValueError, match=r"^a and b: got masses of 1 and 2"):
            CALLS[call](M, a, module.stack([b, 2 * b], 1))


@pytest.mark.parametrize("call", CALLS)
def test_bad_tensors_are_named(call):
    M, a, b = single()
    bad = M.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^M: got nan"):
        CALLS[call](bad, a, b)
    with pytest.raises(ValueError, match=r"^a: got a negative weight"):
        CALLS[call](M, -a, b)
    with pytest.raises(TypeError, match=r"^M: got dtype torch.int64"):
        CALLS[call](M.long(), a, b)
    with pytest.raises(TypeError, match=r"^M: got dtype torch.int64"):
        CALLS["sinkhorn"](M.long(), a, b, warmstart=(a, b))
    with pytest.raises(ValueError, match=r"^M: got shape"):
        CALLS[call](M[None, None], a, b)
    with pytest.raises(ValueError, match=r"^M: got nothing"):
        CALLS["solve"]([], a, b)
    with pytest.raises(TypeError, match=r"^a: got dtype torch.float32; accepted: that of M, torch"):
        CALLS[call](M, a.float(), b)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_bad_arrays_are_named():
    M, a, b = (t.numpy() for t in single())
    ragged, numbers = [[1.0, 2.0], [3.0]], "; accepted: numbers, in rows of one length"
    cases = [
        ((a, b, M.astype(object)), "M: got dtype object"),
        ((a, b, M.astype(np.longdouble)), "M: got dtype float128"),
        ((a.astype(object), b, M.tolist()), "a: got dtype object"),
        ((a, b, ragged), "M: got a list that is no array of numbers" + numbers),
        ((ragged, b, M), "a: got a list that is no array of numbers" + numbers),
        ((torch.tensor(a), ragged, torch.tensor(M)), "b: got a list that is no array" + ".*"),
        ((a, b, np.matrix(M)), "M: got matrix; accepted: numpy.ndarray"),
        ((a, b, np.ma.array(M)), "M: got MaskedArray; accepted: numpy.ndarray"),
        ((np.ma.array(a), b, M), "a: got MaskedArray; accepted: numpy.ndarray"),
    ]
    for args, message in cases:
        with pytest.raises(TypeError, match="^" + message):
            pot.sinkhorn(*args, REG)
    with pytest.raises(ValueError, match=r"^a: got shape \(\)"):
        pot.sinkhorn(np.array(1.0), b, M, REG)


def test_kinds_of_arrays_and_tensors_mix():
    M, a, b = single()
    want = pot.sinkhorn(a, b, M, REG)
    leaf = torch.nn.Parameter(M)
    start = np.zeros(7), np.zeros(9, np.float32)
    torch.testing.assert_close(pot.sinkhorn(a, b, leaf, REG).detach(), want)
    torch.testing.assert_close(
        pot.sinkhorn(a, b, leaf, REG, warmstart=start).detach(), want, rtol=1e-6, atol=1e-9
    )


# With POT itself.


@pytest.fixture
def ot():
    return pytest.importorskip("ot")


def test_signatures_are_those_of_pot(ot):
    pairs = [
        (pot.sinkhorn, ot.sinkhorn),
        (pot.sinkhorn2, ot.sinkhorn2),
        (pot.solve, ot.solve),
        (pot.solve_batch, ot.batch.solve_batch),
        (pot.sinkhorn_unbalanced, ot.unbalanced.sinkhorn_unbalanced),
        (pot.sinkhorn_unbalanced2, ot.unbalanced.sinkhorn_unbalanced2),
    ]
    for ours, theirs in pairs:
        names = inspect.signature(theirs).parameters.values()
        want = [(p.name, p.default) for p in names if p.kind is not p.VAR_KEYWORD]
        assert [(p.name, p.default) for p in inspect.signature(ours).parameters.values()] == want


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"])
def test_sinkhorn_agrees_with_pot(ot, method):
    M, a, b = (t.numpy() for t in single())
    options = {"method": method, "stopThr": 1e-12, "numItermax": 5000, "log": True}
    (plan, log), (want, theirs) = (f(a, b, M, REG, **options) for f in (pot.sinkhorn, ot.sinkhorn))
    np.testing.assert_allclose(plan, want, rtol=1e-8, atol=1e-12)
    assert set(log) == set(theirs) | ({"log_u", "log_v"} if method == "sinkhorn" else set())
    u, v = ("logu", "logv") if "logu" in log else ("u", "v")
    for key in (u, v):
        shift = theirs[key] - log[key] if u == "logu" else np.log(theirs[key] / log[key])
        assert shift.std() < 1e-6
    cost = pot.sinkhorn2(a, b, M, REG, method, stopThr=1e-12)
    np.testing.assert_allclose(cost, ot.sinkhorn2(a, b, M, REG, method, stopThr=1e-12), rtol=1e-8)


def test_scalings_of_pot_start_our_solve(ot):
    M, a, b = (t.numpy() for t in single())
    for method in ("sinkhorn_log", "sinkhorn_stabilized"):
        _, log = ot.sinkhorn(a, b, M, REG, method, stopThr=1e-13, log=True)
        start = log.get("warmstart", (log.get("log_u"), log.get("log_v")))
        _, ours = pot.sinkhorn(a, b, M, REG, method, log=True, warmstart=start)
        assert ours.get("niter", ours.get("n_iter")) <= 2


@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
def test_solve_batch_agrees_with_pot(ot, reg_type):
    M, a, b = problem(3, 7, 9, decades=2)
    ours, theirs = M.clone().requires_grad_(), M.clone().requires_grad_()
    options = {"a": a, "b": b, "reg_type": reg_type, "tol": 1e-11, "max_iter": 5000}
    got = pot.solve_batch(ours, REG, **options)
    want = ot.batch.solve_batch(theirs, REG, **options)
    for name in ("value", "value_linear", "plan"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-8, atol=1e-10)
    for seen, exact in zip(got.potentials, want.potentials, strict=True):
        shift = (exact - seen).detach()
        assert float(shift.std(-1).max()) < 1e-8
    for result in (got, want):
        result.value.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
@pytest.mark.parametrize("grad", ["autodiff", "envelope"])
def test_solve_agrees_with_pot(ot, reg_type, grad):
    M, a, b = single()
    found = []
    for module in (pot, ot):
        leaf = M.clone().requires_grad_()
        r = module.solve(leaf, a, b, REG, reg_type=reg_type, grad=grad, tol=1e-12, max_iter=5000)
        found.append((r.plan, r.value, r.value_linear, *torch.autograd.grad(r.value, leaf)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_gradients_of_weights_under_envelope_differ_from_pot(ot, reg_type):
    """Should this fail with a newer POT, the docstring's lines have gone out of date."""
    M, a, b = single()
    options = {"reg": REG, "reg_type": reg_type, "tol": 1e-12, "max_iter": 5000}

    def slopes(solve, *problem, **more):
        costs, *leaves = [t.clone().requires_grad_() for t in problem]
        value = solve(costs, a=leaves[0], b=leaves[1], **options, **more).value
        grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        return [g if g is None else (g - g.mean(-1, keepdim=True)) for g in grads]

    exact = slopes(pot.solve, M, a, b, grad="autodiff")
    seen = slopes(pot.solve, M, a, b, grad="envelope")
    many = slopes(pot.solve_batch, M[None], a[None], b[None], grad="envelope")
    theirs = slopes(ot.solve, M, a, b, grad="envelope")
    for k, w in enumerate((a, b)):
        torch.testing.assert_close(seen[k], exact[k], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(many[k][0], exact[k], rtol=1e-6, atol=1e-9)
        of_entropy = (w.log() - w.log().mean()) * (REG if reg_type == "kl" else 0)
        torch.testing.assert_close(theirs[k], exact[k] + of_entropy, rtol=1e-6, atol=1e-9)
    for none in slopes(ot.batch.solve_batch, M[None], a[None], b[None], grad="envelope"):
        assert none is None or float(none.abs().max()) < 1e-9


@pytest.mark.parametrize("reg_m", [0.7, (0.3, 2.0), (float("inf"), 0.5)])
def test_unbalanced_agrees_with_pot(ot, reg_m):
    M, a, b = (t.numpy() for t in single())
    a = 1.7 * a
    options = {"stopThr": 1e-13, "numItermax": 20000, "log": True}
    plan, log = pot.sinkhorn_unbalanced(a, b, M, REG, reg_m, **options)
    want, theirs = ot.unbalanced.sinkhorn_unbalanced(a, b, M, REG, reg_m, **options)
    np.testing.assert_allclose(plan, want, rtol=1e-8, atol=1e-12)
    for key in ("cost", "logu", "logv"):
        np.testing.assert_allclose(log[key], theirs[key], rtol=1e-7, atol=1e-9, err_msg=key)
    rho = reg_m if isinstance(reg_m, tuple) else (reg_m, reg_m)
    masses = REG * (a.sum() * b.sum() - plan.sum())  # POT leaves them out
    for r, w in zip(rho, (a, b), strict=True):
        masses += 0 if np.isinf(r) else r * (w.sum() - plan.sum())
    np.testing.assert_allclose(log["total_cost"], theirs["total_cost"] + masses, rtol=1e-8)
    got, want = (
        f(a, b, M, REG, reg_m, stopThr=1e-12, numItermax=20000)
        for f in (pot.sinkhorn_unbalanced2, ot.unbalanced.sinkhorn_unbalanced2)
    )
    np.testing.assert_allclose(got, want, rtol=1e-8)
    total = pot.sinkhorn_unbalanced2(a, b, M, REG, reg_m, returnCost="total", stopThr=1e-12)
    np.testing.assert_allclose(total, log["total_cost"], rtol=1e-8)
    result = pot.solve(M, a, b, REG, unbalanced=reg_m, tol=1e-12, max_iter=20000)
    np.testing.assert_allclose(result.value, log["total_cost"], rtol=1e-8)


def test_translation_invariant_iterations_of_pot_end_elsewhere(ot):
    """Should this fail with a newer POT, the docstring's line has gone out of date."""
    M, a, b = (t.numpy() for t in single())
    options = {"stopThr": 1e-12, "numItermax": 20000}
    own = "sinkhorn_translation_invariant"
    for reg_m, same in (((0.5, 0.5), True), ((2.0, 0.3), False)):
        want = ot.unbalanced.sinkhorn_unbalanced(a, b, M, REG, reg_m, **options)
        theirs = ot.unbalanced.sinkhorn_unbalanced(a, b, M, REG, reg_m, own, **options)
        ours = pot.sinkhorn_unbalanced(a, b, M, REG, reg_m, own, **options)
        np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-9)
        assert np.allclose(theirs, want, rtol=1e-6, atol=1e-9) == same
