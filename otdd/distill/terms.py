"""What the terms of the guided update have in common.

A term looks at the latents in flight and says how to move them. `denoise` calls it at every step
of its window, and so can any other sampling loop: `x = guidance(x, t, class_labels, ...)`. Where it
looks is its `target`: the noisy latents (`z_t`, and `q_sample` of OT), or the prediction of the
finished ones, with the correction applied to that prediction (`x0`), or carried through the
denoiser to the noisy latents (`through`).
"""

from __future__ import annotations

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from otdd.ops.checks import outside_autocast

P = ParamSpec("P")
R = TypeVar("R")

RHO = 0.0015

Memory = tuple[Tensor, Tensor]
"""Finished latents (M, ...) and their labels (M,)."""


class Guidance(ABC):
    """One term: its settings have `strength`, `window` and perhaps `target`."""

    config: Any

    @property
    def target(self) -> str:
        """What `direction` is taken on: z_t, q_sample, x0 or through."""
        return str(self.config.target)

    @property
    def normalised(self) -> bool:
        """Whether steps are scaled by rho_t, as those of influence guidance are."""
        return False

    def active(self, step: int, steps: int) -> bool:
        """Whether step 0..steps-1 (0 is the noisiest) is guided."""
        start, end = self.config.window
        return self.config.strength > 0 and start * steps <= step + 1e-9 < end * steps

    @abstractmethod
    def check(self, class_labels: Tensor, shape: tuple[int, ...]) -> None:
        """Raises, before any work, if latents of this shape and these classes cannot be guided."""

    def __call__(
        self,
        x: Tensor,
        t: int | Tensor,
        class_labels: Tensor,
        *,
        alpha_bar: float | None = None,
        output_rms: Tensor | float = 1.0,
        memory: Memory | None = None,
    ) -> Tensor:
        """Corrected latents.

        Args:
            x: z_t, or x0_hat, as `target` says; (B, ...).
            t: timestep.
            class_labels: (B,).
            alpha_bar: of t, from 0 to 1; needed for the `q_sample` target and for steps scaled by
                rho_t.
            output_rms: root mean square of the predicted noise, a number or (B,).
            memory: finished latents and their labels, for terms that look at them.

        Raises:
            ValueError: latents, labels, memory or a number that do not fit.
        """
        if alpha_bar is not None and not 0 <= alpha_bar <= 1:
            raise ValueError(f"alpha_bar: {alpha_bar} is not accepted; expected 0 to 1")
        check_rms(output_rms, len(x))
        if memory is not None:
            check_memory(memory, tuple(x.shape[1:]))
        move = self.direction(x, t, class_labels, alpha_bar=alpha_bar, memory=memory)
        return x - self.step(move, alpha_bar=alpha_bar, output_rms=output_rms)

    @abstractmethod
    def direction(
        self,
        x: Tensor,
        t: int | Tensor,
        class_labels: Tensor,
        *,
        alpha_bar: float | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """What improves the latents when it is subtracted from them, unscaled; like `x`."""

    def step(
        self, move: Tensor, *, alpha_bar: float | None = None, output_rms: Tensor | float = 1.0
    ) -> Tensor:
        """Scales a direction to the step that is subtracted from the latents."""
        if not self.normalised:
            return self.config.strength * move
        if alpha_bar is None:
            raise ValueError("alpha_bar is needed by steps of guidance that are scaled by rho_t")
        shape = (-1,) + (1,) * (move.ndim - 1)
        rms = move.flatten(1).square().mean(1).sqrt().clamp_min(1e-12).view(shape)
        output = torch.as_tensor(output_rms, dtype=move.dtype, device=move.device)
        rho = RHO * output.expand(len(move)).view(shape) * (1 - alpha_bar) ** 0.5 / rms
        return self.config.strength * rho * move


def as_usual(body: Callable[P, R]) -> Callable[P, R]:
    """Arithmetic of a term as it is by default, where `torch.inference_mode` or autocast are on.

    The former would forbid its gradients, the latter take its precision.
    """

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False):
            return outside_autocast(body)(*args, **kwargs)

    return run


def settings_of(config: Any, default: Any) -> Any:
    """The settings that a term is given, or its default ones, of the same class."""
    if not isinstance(config, type(default) | None):
        seen, accepted = type(config).__name__, type(default).__name__
        raise ValueError(f"config: {seen} is not accepted; expected {accepted}")
    return default if config is None else config


def rng(*key: object) -> torch.Generator:
    """A generator that depends on the key alone, whatever ran before or elsewhere."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def group_classes(class_labels: Tensor) -> tuple[list[int], Tensor]:
    """The classes that are there, in order, and the position among them of every label."""
    present, groups = class_labels.unique(return_inverse=True)
    return present.tolist(), groups


def check_latents(latents: Tensor, class_labels: Tensor, name: str) -> None:
    """Refuses latents and labels that do not belong together; values are looked at on the CPU."""
    if not isinstance(latents, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(latents).__name__}")
    if latents.ndim < 2 or len(latents) == 0 or not latents.is_floating_point():
        raise ValueError(
            f"{name} must be a floating tensor (B, ...) with B >= 1, got {latents.dtype} "
            f"{tuple(latents.shape)}"
        )
    check_labels(class_labels, len(latents))
    if latents.device.type == "cpu" and not all_finite(latents):
        raise ValueError(f"{name} contains NaN or infinity")


def all_finite(latents: Tensor) -> bool:
    """Whether no number is NaN or infinite: these survive in a sum, which may overflow itself."""
    return math.isfinite(latents.sum().item()) or bool(torch.isfinite(latents).all())


def check_labels(class_labels: Tensor, count: int) -> None:
    """Refuses what are no labels of so many latents or images."""
    if not isinstance(class_labels, Tensor):
        raise ValueError(f"class_labels must be a tensor, got {type(class_labels).__name__}")
    if class_labels.shape != (count,) or class_labels.dtype != torch.int64:
        raise ValueError(
            f"class_labels must be int64 of shape ({count},), got {class_labels.dtype} "
            f"{tuple(class_labels.shape)}"
        )


def check_rms(output_rms: Tensor | float, count: int) -> None:
    """Refuses what is neither a number nor one for each of so many latents."""
    number = isinstance(output_rms, Real) and math.isfinite(output_rms) and output_rms >= 0
    if number or (isinstance(output_rms, Tensor) and output_rms.shape in ((), (count,))):
        return
    seen = tuple(output_rms.shape) if isinstance(output_rms, Tensor) else repr(output_rms)
    raise ValueError(
        f"output_rms: {seen} is not accepted; expected a number >= 0, or a tensor ({count},)"
    )


def check_memory(memory: Memory, shape: tuple[int, ...]) -> None:
    """Refuses what are no finished latents of this shape with their labels; there may be none."""
    if not isinstance(memory, Sequence) or len(memory) != 2:
        raise ValueError(
            f"memory: {type(memory).__name__} is not accepted; expected a pair of latents and "
            "their labels"
        )
    latents, labels = memory
    if isinstance(latents, Tensor) and isinstance(labels, Tensor) and not len(latents):
        return
    check_latents(latents, labels, "memory")
    if latents.shape[1:] != shape:
        seen = tuple(latents.shape[1:])
        raise ValueError(f"memory: latents of {seen} are not accepted; expected {shape}")
