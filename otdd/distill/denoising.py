"""The denoising loop: predict x0_hat, correct it (or z_t), rebuild the output, `scheduler.step`.

Every way of sampling goes through `denoise`: the stages, `OTDiTPipeline`, and other models by
`Denoiser`. It calls the denoiser once per step, with gradients only at steps of a term that carries
its correction through it. A step that nothing corrects hands the scheduler what was predicted.

With z_t = sqrt(abar) x0 + sqrt(1 - abar) noise, the scheduler's own latents are scale * z_t: 1 for
DDIM, DDPM and DPM++, sqrt(1 + sigma^2) for Euler, where abar = 1 / (1 + sigma^2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otdd.distill.terms import Guidance, Memory, check_latents, check_memory

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(z_t (B, ...), t) to the prediction (B, ...) and the variances learned beside it, or None."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# How schedulers of diffusers state their noise: alpha_bar by timestep, or sigma by step.
DDPM = ("DDPMScheduler", "DDPMParallelScheduler")
BY_TIMESTEP = ("DDIMScheduler", "DDIMParallelScheduler", *DDPM)
BY_SIGMA = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
SCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
NO_SAMPLE = (
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)  # whose `step` has no such prediction


@dataclass(frozen=True)
class Level:
    """Noise at one step: alpha_bar, and how much larger than z_t the scheduler's latents are."""

    alpha_bar: float
    scale: float = 1.0


@dataclass(frozen=True)
class Guides:
    """The terms that correct a batch, and what they are told about it.

    Attributes:
        terms: each acts within its own window; their corrections add up.
        class_labels: (B,), as the terms know the classes.
        memory: finished latents and their labels.

    Raises:
        ValueError: terms that are no sequence of `Guidance` objects.
    """

    terms: Sequence[Guidance]
    class_labels: Tensor
    memory: Memory | None = None

    def __post_init__(self) -> None:
        seen = self.terms if isinstance(self.terms, Sequence) else [self.terms]
        wrong = [type(term).__name__ for term in seen if not isinstance(term, Guidance)]
        if wrong or seen is not self.terms:
            found = wrong[0] if wrong else f"{type(self.terms).__name__}, which is no list,"
            raise ValueError(f"guidance: {found} is not accepted; expected Guidance objects")


@torch.inference_mode(False)  # where gradients can be had, for terms that take some
@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: Any,
    x: Tensor,
    guides: Guides | None = None,
    *,
    clamp: bool = False,
    advance: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Runs the schedule and returns the finished latents, (B, ...).

    Args:
        predict: the denoiser, as `Denoiser.predict` with labels and scale filled in.
        scheduler: of diffusers, with its timesteps set anew by `set_timesteps`; for guidance one of
            the families DDIM, DDPM, DPM++ (UniPC, DEIS) and Euler. Where DDIM clips x0_hat, guided
            steps go on with the noise that belongs to the clipped one.
        x: unit Gaussian noise, (B, ...).
        guides: terms of the update.
        clamp: keep x0_hat in [-1, 1], for latents that are pixels.
        advance: (output, t, x) to the next x; by default `scheduler.step` without a generator.
        on_step: called with (step, t, x) after each step; returns the x to go on with.

    Raises:
        ValueError: the terms, the scheduler or what `predict` returns do not fit.
    """
    terms = _checked(guides, x)
    check_scheduler(scheduler)
    steps = len(scheduler.timesteps)
    levels = noise_levels(scheduler) if terms or clamp else [Level(1.0)] * (steps + 1)
    advance = advance or stepper(scheduler)
    variances = keeps_variances(scheduler)
    x = x * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        active = [term for term in terms if term.active(step, steps)]
        z = scheduler.scale_model_input(x, t)
        move = None
        if active or clamp:
            corrector = _Corrector(levels[step], _prediction_type(scheduler), t)
            limit = 1.0 if clamp else _limit(scheduler)
            corrector.predict(predict, z, limit, grad=any(a.target == "through" for a in active))
            if active and guides is not None:
                move = corrector.correct(active, guides)
            output, rest = corrector.output(always=clamp)
        else:
            output, rest = _predicted(predict, z, t)
        if variances and rest is not None:
            output = torch.cat([output, rest], 1)
        x = advance(output, t, x)
        if move is not None:
            x = x - (levels[step + 1].scale * move).to(x.dtype)
        if on_step is not None:
            x = on_step(step, t, x)
            if not isinstance(x, Tensor):
                raise ValueError(f"on_step: it returned {type(x).__name__}; expected latents")
    return x


def _checked(guides: Guides | None, x: Tensor) -> Sequence[Guidance]:
    """The terms, which take latents of this shape and these classes."""
    if guides is None:
        return ()
    if not isinstance(guides, Guides):
        raise ValueError(f"guides: {type(guides).__name__} is not accepted; expected Guides")
    if guides.terms:
        check_latents(x, guides.class_labels, "x")
        if guides.memory is not None:
            check_memory(guides.memory, tuple(x.shape[1:]))
    for term in guides.terms:
        if term.config.strength > 0:  # else it is off and needs nothing
            term.check(guides.class_labels, tuple(x.shape[1:]))
    return guides.terms


def check_scheduler(scheduler: Any) -> None:
    """Refuses one that `denoise` cannot use, or that goes on from an earlier sampling.

    Raises:
        ValueError: its first noise or its prediction type is not known, or it has made steps.
    """
    if not hasattr(scheduler, "init_noise_sigma"):
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} does not say how large the first noise is; "
            "accepted: schedulers of diffusers with init_noise_sigma, so none of flow matching"
        )
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    if names & {*NO_SAMPLE} and scheduler.config.get("prediction_type") == "sample":
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} has no prediction_type 'sample'; accepted: "
            "epsilon, v_prediction"
        )
    steps = getattr(scheduler, "step_index", None), getattr(scheduler, "counter", None)
    if steps[0] is not None or steps[1]:  # PNDM has the latter alone
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} has made steps; call set_timesteps before each "
            "sampling"
        )


def _predicted(predict: Predict, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """What `predict` returns; a tensor of two images would pass for a pair."""
    made = predict(z, t)
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(
            f"predict: it returned {type(made).__name__}; expected a pair of the prediction and "
            "the variances learned beside it, or None"
        )
    if made[0].shape != z.shape:
        seen, wanted = tuple(made[0].shape), tuple(z.shape)
        raise ValueError(f"predict: it returned a prediction of {seen}; expected {wanted}")
    return made


class _Corrector:
    """One guided step: what was predicted, and what the terms make of it."""

    def __init__(self, level: Level, prediction_type: str, t: Tensor) -> None:
        self.level, self.kind, self.t = level, prediction_type, t

    def predict(self, predict: Predict, z: Tensor, limit: float | None, *, grad: bool) -> None:
        """The only call of the denoiser; it keeps a graph only if a term needs it."""
        with torch.set_grad_enabled(grad):
            self.z = z.detach().requires_grad_(grad)
            self.prediction, rest = _predicted(predict, self.z, self.t)
            self.free = _x0_of(
                self.z.float(), self.prediction.float(), self.level.alpha_bar, self.kind
            )
        self.rest = rest.detach() if rest is not None else None
        x0 = self.free.detach()
        noise = _noise_of(z.float(), x0, self.level.alpha_bar)
        self.output_rms = noise.flatten(1).square().mean(1).sqrt()
        self.x0 = x0 if limit is None else x0.clamp(-limit, limit)
        self.corrected = False

    def correct(self, terms: Sequence[Guidance], guides: Guides) -> Tensor | None:
        """Corrects x0_hat; returns the sum of the steps that z_t is to take, if any.

        All terms are taken at the same point, so their order does not matter.
        """
        alpha_bar, x0, z = self.level.alpha_bar, self.x0, self.z.detach().float()
        carried = sum(term.target == "through" for term in terms)
        on_x0: list[Tensor] = []
        on_z: list[Tensor] = []
        for term in terms:
            at = z if term.target in ("z_t", "q_sample") else x0
            move = term.direction(
                at, self.t, guides.class_labels, alpha_bar=alpha_bar, memory=guides.memory
            )
            if term.target == "through":
                carried -= 1
                move = torch.autograd.grad(self.free, self.z, move, retain_graph=carried > 0)[0]
                move = move.float()
            move = term.step(move, alpha_bar=alpha_bar, output_rms=self.output_rms)
            (on_x0 if term.target == "x0" else on_z).append(move)
        if on_x0:
            self.x0, self.corrected = x0 - sum(on_x0[1:], on_x0[0]), True
        return sum(on_z[1:], on_z[0]) if on_z else None

    def output(self, *, always: bool) -> tuple[Tensor, Tensor | None]:
        """What the scheduler is given: rebuilt from x0_hat if that was corrected."""
        if not (always or self.corrected):
            return self.prediction.detach(), self.rest
        z = self.z.detach()
        rebuilt = _output_of(z.float(), self.x0, self.level.alpha_bar, self.kind)
        return rebuilt.to(z.dtype), self.rest


def stepper(
    scheduler: Any, generator: torch.Generator | list[torch.Generator] | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`scheduler.step` as (output, t, x) to the next x, with its noise from `generator`."""
    known = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if known else {}
    return lambda output, t, x: scheduler.step(output, t, x, **extra).prev_sample


def noise_levels(scheduler: Any) -> list[Level]:
    """Noise of every step and, last, after them.

    Raises:
        ValueError: guidance does not know how the scheduler measures its noise.
    """
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    if scheduler.config.get("use_flow_sigmas", False) or not names & {
        *BY_TIMESTEP, *BY_SIGMA, *SCALED
    }:  # fmt: skip
        accepted = ", ".join([*BY_TIMESTEP, *BY_SIGMA, *SCALED])
        raise ValueError(
            f"scheduler: guidance cannot use {type(scheduler).__name__}; accepted: {accepted}, "
            "without flow sigmas"
        )
    kind = _prediction_type(scheduler)
    if names & {*BY_TIMESTEP}:
        known = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps.tolist()]
        if kind == "epsilon" and 0.0 in known:  # pure noise, whose x0_hat no noise tells
            raise ValueError(
                f"scheduler: rescale_betas_zero_snr with prediction_type {kind!r} starts from pure "
                "noise; accepted: v_prediction or sample with it"
            )
        return [Level(alpha_bar) for alpha_bar in known] + [Level(1.0)]
    sigmas = [float(s) for s in scheduler.sigmas]
    if len(sigmas) != len(scheduler.timesteps) + 1:
        raise ValueError(
            f"scheduler: {len(scheduler.timesteps)} timesteps beside {len(sigmas)} sigmas are not "
            "accepted; expected those that set_timesteps makes, all of them"
        )
    scaled = bool(names & {*SCALED})
    return [Level(1 / (1 + s * s), (1 + s * s) ** 0.5 if scaled else 1.0) for s in sigmas]


def keeps_variances(scheduler: Any) -> bool:
    """Whether the scheduler takes learned variances beside the prediction: DDPM alone does.

    Raises:
        ValueError: a DPM++ scheduler that would cut the latents to three channels.
    """
    learned = str(scheduler.config.get("variance_type", None)).startswith("learned")
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    if learned and names & {*BY_SIGMA}:
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} with variance_type "
            f"{scheduler.config.variance_type!r} keeps three channels of the latents only; make "
            "it by from_config(config, variance_type=None)"
        )
    return learned and bool(names & {*DDPM})


def _prediction_type(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        accepted = ", ".join(PREDICTIONS)
        raise ValueError(f"scheduler: prediction_type {kind!r}; accepted: {accepted}")
    return str(kind)


def _limit(scheduler: Any) -> float | None:
    """Where the scheduler itself will clip x0_hat; it does not where it takes thresholds."""
    config = scheduler.config
    clips = config.get("clip_sample", False) and not config.get("thresholding", False)
    return float(config.get("clip_sample_range", 1.0)) if clips else None


def _x0_of(z: Tensor, predicted: Tensor, alpha_bar: float, kind: str) -> Tensor:
    if kind == "sample":
        return predicted
    if kind == "v_prediction":
        return alpha_bar**0.5 * z - (1 - alpha_bar) ** 0.5 * predicted
    return (z - (1 - alpha_bar) ** 0.5 * predicted) / alpha_bar**0.5


def _noise_of(z: Tensor, x0: Tensor, alpha_bar: float) -> Tensor:
    return (z - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5


def _output_of(z: Tensor, x0: Tensor, alpha_bar: float, kind: str) -> Tensor:
    if kind == "sample":
        return x0
    noise = _noise_of(z, x0, alpha_bar)
    if kind == "v_prediction":
        return alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * x0
    return noise
