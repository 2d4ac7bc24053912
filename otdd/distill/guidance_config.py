"""The settings of every term of the guided update, and how settings are refused.

A part of `otdd.distill.config`, without torch as well. A term of strength 0 is off: it costs
nothing and needs nothing.
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that is unknown or not accepted."""


def require(ok: bool, key: str, value: Any, accepted: str) -> None:
    """Raise a `ConfigError` that names the key, the value and what is accepted."""
    if not ok:
        seen = repr(value)
        seen = seen if len(seen) <= 200 else f"{seen[:200]}..."
        raise ConfigError(f"{key}: {seen} is not accepted; expected {accepted}")


def printable(text: str) -> str:
    """A text in one line, what does not print in it as Python spells it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class GuidanceConfig:
    """Optimal-transport guidance of the sampler."""

    target: Literal["z_t", "x0", "through", "q_sample"] = "x0"
    """What the cost is taken on: the noisy latents, x0_hat, x0_hat with the gradient through the
    denoiser, or the noisy latents against equally noised references."""
    form: Literal["projection", "gradient"] = "projection"
    """Move towards the barycentric projection, or along the gradient of the transport cost."""
    metric: Literal["l1", "l2", "sqeuclidean", "cosine"] = "sqeuclidean"
    """Ground cost between latents."""
    lambda_1: float = 0.1
    """eps of the entropic problem, as a factor of the standard deviation of its costs."""
    max_iter: int = 20
    """Sinkhorn iterations in each guided step."""
    reference_size: int = 200
    """Most real latents of the class in one problem."""
    strength: float = 0.7
    """beta_1, the guidance in one step: a fraction of the way to the projection, or a factor of the
    gradient; 0: off."""
    repulsion: float = 0.3
    """Push away from near real latents of other classes, as a fraction of the pull of the own."""
    detail: float = 0.5
    """Of the projection, and latents with height and width: a spatial frequency moves whole where
    the projection keeps this part of the real energy, else less, so that the blur of a mean is not
    taken over, and towards the real energy, so that its contrast is kept; 0: all move whole."""
    window: tuple[float, float] = (0.0, 1.0)
    """Guided part of the schedule, from and to, as fractions of it (0: pure noise, 1: the
    image)."""
    memory: int = 64
    """Most finished latents of a class kept in a sequential problem."""

    def __post_init__(self) -> None:
        require_kinds(self)
        # Below, rounding of float32 costs is no longer small beside eps: plans become wrong.
        require(self.lambda_1 >= 1e-5, "lambda_1", self.lambda_1, "a number >= 1e-5")
        require(self.max_iter >= 1, "max_iter", self.max_iter, "an integer >= 1")
        require(self.reference_size >= 1, "reference_size", self.reference_size, "an integer >= 1")
        _require_term(self.strength, self.window)
        require(0 <= self.repulsion < 1, "repulsion", self.repulsion, "a number in [0, 1)")
        require(0 <= self.detail <= 1, "detail", self.detail, "a number in [0, 1]")
        require(self.memory >= 1, "memory", self.memory, "an integer >= 1")


@dataclass(frozen=True)
class DiversityConfig:
    """Diversity guidance: away from the nearest finished latents of the class."""

    strength: float = 0.0
    """gamma, the factor of the gradient of the cosine to the nearest; 0: off."""
    target: Literal["z_t", "x0", "through"] = "z_t"
    """What is compared: the noisy latents, x0_hat, or x0_hat with the gradient through the
    denoiser."""
    memory: int = 64
    """Most finished latents of a class that are looked at."""
    window: tuple[float, float] = (0.0, 1.0)
    """Guided part of the schedule, from and to, as fractions of it (0: pure noise, 1: the
    image)."""

    def __post_init__(self) -> None:
        require_kinds(self)
        _require_term(self.strength, self.window)
        require(self.memory >= 1, "memory", self.memory, "an integer >= 1")


@dataclass(frozen=True)
class InfluenceConfig:
    """Influence guidance: towards images whose training gradient is that of the real ones."""

    strength: float = 0.0
    """k, the factor of the gradient, in units of rho_t; 0: off."""
    surrogate: str | None = None
    """Folder of the networks that `otdd fit-surrogate` trained; by default the run trains them,
    with the defaults of that command and its own seed, into surrogate/ of its output."""
    target: Literal["through", "x0"] = "through"
    """The gradient goes through the denoiser to z_t, or is applied to x0_hat."""
    reference_size: int = 200
    """Most real images of the class in the mean gradient."""
    window: tuple[float, float] = (0.08, 0.4)
    """Guided part of the schedule, from and to, as fractions of it (0: pure noise, 1: the
    image)."""

    def __post_init__(self) -> None:
        require_kinds(self)
        _require_term(self.strength, self.window)
        require(self.reference_size >= 1, "reference_size", self.reference_size, "an integer >= 1")


@dataclass(frozen=True)
class ModeConfig:
    """Mode guidance: each image of a class towards its own k-means centre of the real latents."""

    strength: float = 0.0
    """Fraction of the way from x0_hat to the mode in one step; 0: off."""
    window: tuple[float, float] = (0.0, 0.5)
    """Guided part of the schedule, from and to, as fractions of it (0: pure noise, 1: the
    image)."""

    def __post_init__(self) -> None:
        require_kinds(self)
        _require_term(self.strength, self.window)


def require_kinds(config: object) -> None:
    """Raise a `ConfigError` for a field whose value is not of its type, as annotated."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        require(_fits(kind, value), name, value, _named(kind))


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of an annotated type; lists pass for tuples, and integers for numbers."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in args
    if get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(kinds) and all(map(_fits, kinds, value))
    if kind in (int, float):
        right = isinstance(value, int if kind is int else int | float)
        return right and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _named(kind: Any) -> str:
    """An annotated type in words."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(args)}" if len(args) > 1 else str(args[0])
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_named(arg) for arg in args)
    if get_origin(kind) is tuple:
        count = "" if args[-1] is Ellipsis else f" of {len(args)}"
        return f"a tuple{count}, each {_named(args[0])}"
    words = {int: "an integer", float: "a finite number", str: "a text", bool: "True or False"}
    return words.get(kind) or ("None" if kind is type(None) else f"a {kind.__name__}")


def _require_term(strength: float, window: tuple[float, float]) -> None:
    require(strength >= 0, "strength", strength, "a number >= 0")
    ok = 0.0 <= window[0] < window[1] <= 1.0
    require(ok, "window", window, "two fractions start < end in [0, 1]")
