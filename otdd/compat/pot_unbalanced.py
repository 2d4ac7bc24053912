"""The unbalanced functions of `otdd.compat.pot`, whose docstring has what holds for them all."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from otdd.compat.arguments import Array, without_meaning
from otdd.compat.solution import (
    OLD_NAMES,
    choice,
    column_start,
    largest_error,
    log_scalings,
    pair,
    problem,
    report,
    run,
)
from otdd.ops import SinkhornResult
from otdd.ops.checks import require

_METHODS = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant")


def sinkhorn_unbalanced(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    reg_m: float | Sequence[float],
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: None = None,
    warmstart: tuple[Array, Array] | None = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
) -> Any:
    """``ot.unbalanced.sinkhorn_unbalanced``: the plan, its marginals penalised by `reg_m` KL.

    Args:
        a: Row weights, ``(N,)``; uniform if empty.
        b: Column weights, ``(M,)``.
        M: Costs, ``(N, M)``.
        reg: Regularisation strength > 0.
        reg_m: Penalty on both marginals, or a pair; inf: that one is met.
        method: ``sinkhorn``, ``sinkhorn_stabilized`` or ``sinkhorn_translation_invariant``: the
            same solver.
        reg_type: Only ``kl``.
        c: Only None.
        warmstart: Logarithms of the scalings to start from; only the columns' are used.
        numItermax: Iterations at most.
        stopThr: L1 error of the rows' optimality condition to stop at.
        verbose: Print how the solve ended.
        log: Return ``(plan, log)`` with ``logu``, ``logv``, ``cost`` and ``total_cost``.

    Raises:
        ValueError: As `sinkhorn`.
        TypeError: As `sinkhorn`.
    """
    solved, record, give = _unbalanced(
        a, b, M, reg, reg_m, method, reg_type, c, warmstart, numItermax, stopThr
    )
    report(solved, verbose, warn=True)
    plan = give(solved.plan)
    return (plan, record) if log else plan


def sinkhorn_unbalanced2(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    reg_m: float | Sequence[float],
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: None = None,
    warmstart: tuple[Array, Array] | None = None,
    returnCost: str = "linear",
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
) -> Any:
    """``ot.unbalanced.sinkhorn_unbalanced2``: the cost of `sinkhorn_unbalanced`'s plan.

    Arguments and errors as there; `returnCost` is ``linear``, ``<P, M>``, or ``total``, the
    objective.
    """
    choice(returnCost, "returnCost", ("linear", "total"))
    solved, record, _ = _unbalanced(
        a, b, M, reg, reg_m, method, reg_type, c, warmstart, numItermax, stopThr
    )
    report(solved, verbose, warn=True)
    cost = record["cost" if returnCost.lower() == "linear" else "total_cost"]
    return (cost, record) if log else cost


def _unbalanced(
    a: Array,
    b: Array,
    M: Array,
    reg: float,
    reg_m: float | Sequence[float],
    method: str,
    reg_type: str,
    c: None,
    warmstart: tuple[Array, Array] | None,
    numItermax: int,
    stopThr: float,
) -> tuple[SinkhornResult, dict[str, Any], Callable[[Tensor], Any]]:
    """The solve of both unbalanced functions, its log, and what gives results their kind."""
    choice(method, "method", _METHODS)
    choice(reg_type, "reg_type", ("kl",))
    without_meaning("the solver", c=(c, None))
    rho = pair(reg_m, "reg_m")
    require(rho is not None, "reg_m", None, "a number > 0, inf, or a pair")
    (C, p, q), give = problem(M, a, b, "(N, M)")
    start = column_start(warmstart, "warmstart", C, q, reg, weighted=False)
    names = OLD_NAMES | {"rho_a": "reg_m", "rho_b": "reg_m"}
    solved = run(C, p, q, reg, rho, max_iter=numItermax, tol=stopThr, start=start, names=names)
    u, v = log_scalings(solved, weighted=False)
    record = {"err": [largest_error(solved)], "logu": give(u), "logv": give(v)}
    return solved, record | {"cost": give(solved.cost), "total_cost": give(solved.value)}, give
