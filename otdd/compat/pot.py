"""Drop-ins for POT's entropic solvers, with the signatures and conventions of POT 0.9.7.

`sinkhorn`, `sinkhorn2` and `solve` are those of ``ot``, `solve_batch` that of ``ot.batch``,
`sinkhorn_unbalanced` and `sinkhorn_unbalanced2` those of ``ot.unbalanced``. They take NumPy arrays
and PyTorch tensors and return the same. All solve by `otdd.ops.sinkhorn`, in the log domain
whatever the `method`, so that a small `reg` does not underflow. At convergence the results are
POT's; on the way there these differ:

- `stopThr` and `tol` are L1 errors of the rows' marginal, looked at in every iteration, problem by
  problem. POT takes the L2 error of one marginal at every tenth, the largest of a batch, or for
  unbalanced problems how much the scalings change. Columns are met exactly, in POT the side that
  its method updates last.
- Iterations are counted from 1, and ``log["err"]`` holds the last error only.
- Gradients of everything but ``grad="envelope"`` are those of the optimum (implicit
  differentiation); POT goes back through its iterations. Weights get theirs up to a constant.
- Under ``grad="envelope"`` gradients are those of `value` in the weights, too. POT's `solve` gives
  them those of ``entropy`` whatever the `reg_type`, and its `solve_batch` gives them none.
- Between hard marginals a and b must have one mass, to 1e-3. POT meets one of them, which one
  depends on the method.
- Half precision is computed, and results are given, in float32.
- Potentials are logarithms of scalings for every `method` of `solve_batch`.
- The value of an unbalanced problem is the objective that was minimised. POT 0.9.7 leaves the
  masses out of each ``KL(p | q) = sum p log(p / q) - p + q``; its total is then 0 at every optimum
  between two soft marginals.
- POT's ``sinkhorn_translation_invariant`` ends elsewhere than its other methods where the two of
  `reg_m` differ; here every method ends where those others do.

Not here, for it is not the same problem: ``ot.partial.entropic_partial_wasserstein`` regularises
only what is transported, `otdd.ops.partial` also what stays. Nor are: exact transport, quadratic
regularisation, reference measures `c`, penalties other than KL, and ``grad="last_step"``, whose
gradient lacks a term.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from otdd.compat.arguments import Array, without_meaning
from otdd.compat.pot_unbalanced import sinkhorn_unbalanced, sinkhorn_unbalanced2
from otdd.compat.solution import (
    OLD_NAMES,
    OTResult,
    choice,
    column_start,
    largest_error,
    log_scalings,
    most_iterations,
    objective,
    pair,
    problem,
    report,
    run,
)
from otdd.ops import SinkhornResult

__all__ = [
    "OTResult",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "solve",
    "solve_batch",
]

_METHODS = ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized")
_BATCH_METHODS = ("auto", "log_sinkhorn", "sinkhorn")
_REG_TYPES = ("kl", "entropy")
_GRADS = ("envelope", "autodiff", "detach")


def sinkhorn(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: tuple[Array, Array] | None = None,
) -> Any:
    """``ot.sinkhorn``: the plan ``(N, M)`` that minimises ``<P, M> + reg sum_ij P_ij log P_ij``.

    Args:
        a: Row weights, ``(N,)``; uniform if empty.
        b: Column weights, ``(M,)``; or H columns of them, ``(M, H)``: then the H costs
            ``<P, M>`` are returned in place of a plan.
        M: Costs, ``(N, M)``.
        reg: Regularisation strength > 0, in the units of M.
        method: ``sinkhorn``, ``sinkhorn_log`` or ``sinkhorn_stabilized``: the same solver.
        numItermax: Iterations at most.
        stopThr: L1 marginal error to stop at.
        verbose: Print how the solve ended.
        log: Return ``(plan, log)``; the log's keys are those of the `method` in POT.
        warn: Warn if `stopThr` was not met.
        warmstart: Potentials to start from, as in POT: logarithms of the scalings, or for
            ``sinkhorn_stabilized`` those times `reg`. Only the columns' are used.

    Raises:
        ValueError: An option or a value that is not accepted; masses that differ.
        TypeError: Not floating point, different dtypes, arrays mixed with tensors.
    """
    solved, record, give = _entropic(a, b, M, reg, method, numItermax, stopThr, warmstart)
    report(solved, verbose, warn)
    many = solved.C.dim() == 3
    found = give(solved.cost if many else solved.plan)
    return (found, record) if log else found


def sinkhorn2(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: tuple[Array, Array] | None = None,
) -> Any:
    """``ot.sinkhorn2``: the cost ``<P, M>`` of `sinkhorn`'s plan, without its regulariser.

    Arguments and errors as `sinkhorn`.
    """
    solved, record, give = _entropic(a, b, M, reg, method, numItermax, stopThr, warmstart)
    report(solved, verbose, warn)
    cost = give(solved.cost)
    return (cost, record) if log else cost


def solve(
    M: Array,
    a: Array | None = None,
    b: Array | None = None,
    reg: float | None = None,
    c: None = None,
    reg_type: str = "KL",
    unbalanced: float | Sequence[float] | None = None,
    unbalanced_type: str = "KL",
    method: None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: None = None,
    potentials_init: tuple[Array, Array] | None = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
) -> OTResult:
    """``ot.solve`` with a `reg`: entropic transport, balanced or with KL penalties.

    Args:
        M: Costs, ``(N, M)``.
        a: Row weights, ``(N,)``; uniform by default.
        b: Column weights, ``(M,)``.
        reg: Regularisation strength > 0; exact transport is not offered.
        c: Only None.
        reg_type: ``KL`` (against a x b) or ``entropy`` (``sum P log P``); the plan is the same,
            value differs. Only ``KL`` with `unbalanced`.
        unbalanced: KL penalty on both marginals, or a pair; None or inf: they are met.
        unbalanced_type: Only ``KL``.
        method: Only None.
        n_threads: Only 1; threads are torch's.
        max_iter: Iterations at most, 1000 by default.
        plan_init: Only None.
        potentials_init: Potentials to start from, as those of the result.
        tol: L1 marginal error to stop at, 1e-9 by default.
        verbose: Print how the solve ended.
        grad: ``autodiff``, ``envelope`` (of value; of value_linear the plan is held fixed) or
            ``detach``.

    Raises:
        ValueError: As `sinkhorn`.
        TypeError: As `sinkhorn`.
    """
    options = {"c": (c, None), "method": (method, None), "plan_init": (plan_init, None)}
    without_meaning("the entropic solver", **options, n_threads=(n_threads, 1))
    choice(unbalanced_type, "unbalanced_type", ("kl",))
    rho = pair(unbalanced, "unbalanced")
    choice(reg_type, "reg_type", _REG_TYPES if rho is None else ("kl",))
    choice(grad, "grad", _GRADS)
    (C, p, q), give = problem(M, a, b, "(N, M)")
    start = column_start(potentials_init, "potentials_init", C, q, reg, weighted=rho is None)
    limits: dict[str, Any] = {
        "max_iter": 1000 if max_iter is None else max_iter,
        "tol": 1e-9 if tol is None else tol,
    }
    names = {"rho_a": "unbalanced", "rho_b": "unbalanced", "init": "potentials_init"}
    solved = run(C, p, q, reg, rho, start=start, grad=grad, names=names, **limits)
    report(solved, verbose, warn=True)
    return _result(solved, reg_type, rho, give)


def solve_batch(
    M: Array,
    reg: float | None = None,
    a: Array | None = None,
    b: Array | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> OTResult:
    """``ot.batch.solve_batch`` with a `reg`: B entropic problems at once.

    Args:
        M: Costs, ``(B, N, M)``.
        reg: Regularisation strength > 0; without one POT takes its proximal method, not here.
        a: Row weights, ``(B, N)``; uniform by default.
        b: Column weights, ``(B, M)``.
        max_iter: Iterations at most.
        tol: L1 marginal error at which each problem stops by itself.
        method: ``auto``, ``log_sinkhorn`` or ``sinkhorn``: the same solver.
        inner_iter: Only its default, as the next: for the proximal method.
        inner_reg: Only its default.
        reg_type: ``entropy`` (``sum P log P``) or ``kl`` (against a x b).
        grad: ``envelope`` (of value; of value_linear the plan is held fixed), ``autodiff`` or
            ``detach``.

    Raises:
        ValueError: As `sinkhorn`.
        TypeError: As `sinkhorn`.
    """
    choice(method, "method", _BATCH_METHODS)
    choice(reg_type, "reg_type", _REG_TYPES)
    choice(grad, "grad", _GRADS)
    without_meaning("sinkhorn", inner_iter=(inner_iter, 1), inner_reg=(inner_reg, 1e-3))
    (C, p, q), give = problem(M, a, b, "(B, N, M)")
    solved = run(C, p, q, reg, max_iter=max_iter, tol=tol, grad=grad)
    return _result(solved, reg_type, None, give)


def _entropic(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    method: str,
    numItermax: int,
    stopThr: float,
    warmstart: tuple[Array, Array] | None,
) -> tuple[SinkhornResult, dict[str, Any], Callable[[Tensor], Any]]:
    """The solve of `sinkhorn` and `sinkhorn2`, its log, and what gives results their kind."""
    choice(method, "method", _METHODS)
    (C, p, q), give = problem(M, a, b, "(N, M)")
    many = q is not None and q.dim() == 2  # histograms with the same a and M
    if q is not None and many:
        q = q.mT
        C = C.expand(q.shape[0], *C.shape)
    stabilized = method.lower() == "sinkhorn_stabilized"
    start = column_start(warmstart, "warmstart", C, q, reg, weighted=True, scaled=stabilized)
    solved = run(C, p, q, reg, max_iter=numItermax, tol=stopThr, start=start, names=OLD_NAMES)
    u, v = (t.mT if many else t for t in log_scalings(solved, weighted=True))
    if stabilized:
        ends = give(reg * u), give(reg * v)
        found = {"n_iter": most_iterations(solved), "logu": give(u), "logv": give(v)}
        found |= {"alpha": ends[0], "beta": ends[1], "warmstart": ends}
    else:
        found = {"niter": most_iterations(solved), "log_u": give(u), "log_v": give(v)}
        found |= {"u": give(u.exp()), "v": give(v.exp())}
    return solved, {"err": [largest_error(solved)]} | found, give


def _result(
    solved: SinkhornResult,
    reg_type: str,
    rho: tuple[float, float] | None,
    give: Callable[[Tensor], Any],
) -> OTResult:
    u, v = log_scalings(solved, weighted=rho is None)
    value = objective(solved, reg_type.lower())
    record = {"n_iter": most_iterations(solved), "err": largest_error(solved)}
    potentials = give(u), give(v)
    return OTResult(give(value), give(solved.cost), give(solved.plan), potentials, record)
