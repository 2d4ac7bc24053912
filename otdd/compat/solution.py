"""What the functions of `otdd.compat.pot` share: the solve, POT's values, potentials and logs."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otdd import ops
from otdd.compat.arguments import Array, named, tensors
from otdd.ops.checks import (
    as_float,
    described,
    finite,
    positive,
    require,
    same_kind,
    values_are_checked,
    weights,
)
from otdd.ops.divergence import check_masses
from otdd.ops.sinkhorn import problem_tensors

OLD_NAMES = {"max_iter": "numItermax", "tol": "stopThr", "init": "warmstart"}


@dataclass(frozen=True, eq=False, repr=False)
class OTResult:
    """Result of `solve` and `solve_batch`, with those attributes of POT's that have a meaning here.

    Attributes:
        value: Objective with its regulariser, ``()`` or ``(B,)``.
        value_linear: ``<P, M>``.
        plan: Transport plan P, ``(N, M)`` or ``(B, N, M)``; later changes of M don't reach it.
        potentials: Logarithms (u, v) of the scalings, ``P = exp(u + v - M / reg)``; of unbalanced
            problems ``P = a b exp(u + v - M / reg)``.
        log: ``n_iter``, iterations done at most, and ``err``, the largest marginal error.
    """

    value: Any
    value_linear: Any
    plan: Any
    potentials: tuple[Any, Any]
    log: dict[str, Any]

    def __repr__(self) -> str:
        return described(self)

    @property
    def potential_a(self) -> Any:
        return self.potentials[0]

    @property
    def potential_b(self) -> Any:
        return self.potentials[1]

    @property
    def marginal_a(self) -> Any:
        """Row sums of the plan."""
        return self.plan.sum(-1)

    @property
    def marginal_b(self) -> Any:
        """Column sums of the plan."""
        return self.plan.sum(-2)

    @property
    def marginals(self) -> tuple[Any, Any]:
        return self.marginal_a, self.marginal_b


def run(
    M: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    reg: float | None,
    rho: tuple[float, float] | None = None,
    *,
    max_iter: int,
    tol: float,
    start: Tensor | None = None,
    grad: str = "autodiff",
    names: dict[str, str] | None = None,
) -> ops.SinkhornResult:
    """`otdd.ops.sinkhorn` with POT's gradient modes; its errors name POT's arguments.

    Args:
        M: Costs, ``(..., N, M)``.
        a: Row weights, ``(..., N)``.
        b: Column weights, ``(..., M)``.
        reg: Regularisation strength.
        rho: Penalties on both marginals.
        max_iter: Iterations at most.
        tol: L1 marginal error to stop at.
        start: Column potentials in the units of M.
        grad: ``autodiff``, ``envelope`` or ``detach``.
        names: The op's argument=the caller's, for errors.

    Raises:
        ValueError: As the op; or masses that differ where both marginals are to be met.
        TypeError: As the op.
    """
    if grad == "detach":
        M = M.detach()
        a, b = (None if t is None else t.detach() for t in (a, b))
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (M, a, b))
    rho_a, rho_b = rho or (None, None)
    with named(**{"C": "M", "eps": "reg"} | (names or {})):
        if rho is None or all(map(math.isinf, rho)):
            _check_weights(M, a, b, reg)
        return ops.sinkhorn(
            M,
            a,
            b,
            eps=reg,  # type: ignore[arg-type]  # None is refused there, under its name here
            max_iter=max_iter,
            tol=tol,
            init=None if start is None else (torch.zeros_like(M[..., 0]), start),
            grad="implicit" if wanted and grad == "autodiff" else "envelope",
            rho_a=rho_a,
            rho_b=rho_b,
        )


def _check_weights(M: Tensor, a: Tensor | None, b: Tensor | None, reg: float | None) -> None:
    """Raises unless a plan can have both as its marginals."""
    M = as_float(M, "M")
    _, _, a, b, _ = problem_tensors(M, reg, None, a, b)  # type: ignore[arg-type]  # as in `run`
    if values_are_checked(M):
        weights(a, "a")
        weights(b, "b")
        check_masses(a, b, "equal masses, or an unbalanced problem")


def column_start(
    pair: tuple[Array, Array] | None,
    name: str,
    M: Tensor,
    b: Tensor | None,
    reg: float | None,
    *,
    weighted: bool,
    scaled: bool = False,
) -> Tensor | None:
    """Column potentials g to start from, given POT's pair.

    Args:
        pair: Logarithms (u, v) of the scalings.
        name: Of the argument, for errors.
        M: Costs, ``(..., N, M)``.
        b: Column weights, ``(..., M)``.
        reg: Regularisation strength.
        weighted: Whether the scalings hold the weights, ``v = log b + g / reg``.
        scaled: Whether the pair is in the units of M already.
    """
    if pair is None:
        return None
    if reg is None:
        raise TypeError("reg: got NoneType; accepted: a number or a torch.Tensor")
    M = as_float(M, "M")
    positive(reg, "reg", M.dtype)
    two = isinstance(pair, tuple | list) and len(pair) == 2
    require(two, name, type(pair).__name__, "a pair (u, v)")
    name = f"{name}, its v"
    (v,), _ = tensors(**{name: pair[1]})
    if v is None:
        raise ValueError(f"{name}: got nothing; accepted: potentials of the columns")
    require(not v.is_complex(), name, f"dtype {v.dtype}", "real numbers")
    v = v.to(M.dtype) if isinstance(pair[1], Tensor) else v.to(M)
    same_kind(v, name, M, "M")
    if values_are_checked(v):
        finite(v, name)
    if M.dim() == 3 and v.dim() == 2:
        v = v.mT
    want = (*M.shape[:-2], M.shape[-1])
    require(v.shape == want, name, f"shape {tuple(v.shape)}", f"{want}")
    g = v if scaled else reg * v
    if not weighted:
        return g
    b = v.new_full(want, 1 / want[-1]) if b is None else b
    return torch.where(b > 0, g - reg * torch.where(b > 0, b, 1).log(), 0).detach()


def report(solved: ops.SinkhornResult, verbose: bool, warn: bool) -> None:
    """Prints how a solve ended, and warns if it did not meet its tolerance."""
    if verbose or warn:
        iterations, error = most_iterations(solved), largest_error(solved)
    if verbose:
        print(f"Sinkhorn: {iterations} iterations, marginal error {error:.3e}")
    if warn and not bool(solved.converged.all()):
        warnings.warn(
            f"Sinkhorn did not converge: marginal error {error:.3e} after {iterations} iterations; "
            "more of them or a larger reg helps",
            stacklevel=3,
        )


def most_iterations(solved: ops.SinkhornResult) -> int:
    return int(solved.n_iter.max()) if solved.n_iter.numel() else 0


def largest_error(solved: ops.SinkhornResult) -> float:
    return float(solved.marginal_error.max()) if solved.marginal_error.numel() else 0.0


def log_scalings(solved: ops.SinkhornResult, *, weighted: bool) -> tuple[Tensor, Tensor]:
    """POT's potentials: ``f / reg`` and ``g / reg``, with the weights' logarithms or without."""
    eps = solved.eps.to(solved.f.dtype).unsqueeze(-1)
    u, v = solved.f / eps, solved.g / eps
    return (solved.a.log() + u, solved.b.log() + v) if weighted else (u, v)


def objective(solved: ops.SinkhornResult, reg_type: str) -> Tensor:
    """Value with the regulariser ``kl``, or ``entropy``, ``sum P log P``.

    Between hard marginals ``sum P log P = KL(P | a x b) + <a, log a> + <b, log b>``.
    """
    if reg_type == "kl":
        return solved.value
    entropies = ((w * torch.where(w > 0, w, 1).log()).sum(-1) for w in (solved.a, solved.b))
    return solved.value + solved.eps.to(solved.value.dtype) * sum(entropies)


def problem(
    M: Array, a: Array | None, b: Array | None, shape: str
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Callable[[Tensor], Any]]:
    """M, a and b as tensors, M of as many dimensions as `shape` names."""
    (costs, *weights), give = tensors(M=M, a=a, b=b)
    if costs is None or costs.dim() != shape.count(",") + 1:
        found = "nothing" if costs is None else f"shape {tuple(costs.shape)}"
        raise ValueError(f"M: got {found}; accepted: {shape}")
    return (costs, weights[0], weights[1]), give


def choice(seen: str, name: str, accepted: tuple[str, ...]) -> None:
    fits = isinstance(seen, str) and seen.lower() in accepted
    require(fits, name, repr(seen), ", ".join(accepted))


def pair(penalty: float | Sequence[float] | None, name: str) -> tuple[float, float] | None:
    """A penalty for each side, from one for both, a sequence of one, or of two."""
    if penalty is None:
        return None
    if isinstance(penalty, Tensor):
        require(not penalty.requires_grad, name, "a tensor that requires grad", "a constant")
    try:
        numbers = np.atleast_1d(np.asarray(penalty, dtype=float))
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {penalty!r}; accepted: a number or a pair") from None
    require(numbers.shape in ((1,), (2,)), name, f"shape {numbers.shape}", "a number or a pair")
    return float(numbers[0]), float(numbers[-1])
