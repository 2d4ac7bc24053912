"""`OTDiTPipeline`: diffusers' `DiTPipeline` with guidance, for any number of classes.

Without guidance its images are those of `DiTPipeline` to the bit, with two repairs that only show
where the original fails: the null class is the one after the model's last class (not 1000), and
schedulers whose latents are not unit Gaussian at the start (Euler) are started and stepped as they
ask for. As in the original, `generator` gives the first noise; the noise of steps (DDPM, ancestral)
comes from torch's global generator.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from otdd.distill.codec import import_diffusers
from otdd.distill.denoiser import Denoiser
from otdd.distill.denoising import (
    Guides,
    check_scheduler,
    denoise,
    keeps_variances,
    noise_levels,
    stepper,
)
from otdd.distill.terms import Guidance, Memory, check_memory

import_diffusers()

# diffusers reads the annotations of __init__: real types, so no `annotations` of the future here.
from diffusers import ImagePipelineOutput  # noqa: E402
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # noqa: E402
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # noqa: E402
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline  # noqa: E402
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

OUTPUTS = ("pil", "np", "pt", "latent")


class OTDiTPipeline(DiTPipeline):
    """A class-conditional DiT sampled under guidance.

    Made as any pipeline of diffusers: `from_pretrained` (folder or hub id), `from_pipe`, or from
    its parts. Unlike `DiTPipeline` it keeps `id2label` when it is saved, as a folder of a
    `DiTPipeline`, which every reader of diffusers knows.
    """

    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__(transformer, vae, scheduler, id2label)
        if id2label is not None:
            self.register_to_config(id2label={str(k): v for k, v in id2label.items()})
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> "OTDiTPipeline":
        """The same model, autoencoder and scheduler as another pipeline, sharing their weights.

        Weights keep their types, which diffusers' own makes float32 in both pipelines.

        Args:
            pipeline: a `DiTPipeline`.
            kwargs: parts that take the place of its own, `id2label`, or a `torch_dtype`.

        Raises:
            ValueError: a pipeline of another kind.
        """
        if not isinstance(pipeline, DiTPipeline):
            seen = type(pipeline).__name__
            raise ValueError(f"pipeline: {seen} is not accepted; expected a DiTPipeline")
        names: dict[int, str] = {}
        for name, label in pipeline.labels.items():
            names[label] = f"{names[label]}, {name}" if label in names else name
        kept = pipeline.config.get("id2label") or names or None
        dtype = kwargs.pop("torch_dtype", None)
        made = cls(**{**pipeline.components, "id2label": kept, **kwargs})
        return made if dtype is None else made.to(dtype)

    def to_json_string(self) -> str:
        """The settings of `save_pretrained`, whose parts are those of a `DiTPipeline`."""
        settings = json.loads(super().to_json_string())
        settings["_class_name"] = DiTPipeline.__name__
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to end the sampling after that step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # two arguments more, given by name
        self,
        class_labels: Sequence[int] | Tensor,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        guidance: Guidance | Sequence[Guidance] | None = None,
        memory: Memory | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples one image for each label.

        Args:
            class_labels: (B,) classes of the model.
            guidance_scale: classifier-free guidance, in use above 1.
            generator: of the first noise; a list has one for each image.
            num_inference_steps: denoising steps.
            output_type: `pil`, `np`, `pt`, or `latent` for the latents themselves (B, c, h, w).
            return_dict: an `ImagePipelineOutput`, or a tuple of the images.
            guidance: terms of the update with their references set, which know classes by the
                same labels; their corrections add up.
            memory: finished latents (M, c, h, w), as `latent` gives them, and their labels (M,),
                for terms that look at what was made before: `sequential` sampling.
            callback_on_step_end: called as callback(pipe, step, t, {"latents": ...}) after every
                step; what it returns for "latents" is gone on with.
            callback_on_step_end_tensor_inputs: what the callback is given: `latents`.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if guidance is None:
            terms = []
        else:
            terms = list(guidance) if isinstance(guidance, Sequence) else [guidance]
        denoiser = Denoiser(self.transformer)
        scale = _scale(guidance_scale)
        labels = _labels(class_labels).to(self._execution_device)
        guides = Guides(terms, labels, memory)
        self._check(labels, denoiser, num_inference_steps, output_type, terms, memory)
        _check_generator(generator, len(labels))
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            seen = type(callback_on_step_end).__name__
            raise ValueError(f"callback_on_step_end: {seen} is not accepted; expected a function")
        _check_callback(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        config = self.transformer.config
        noise = randn_tensor(
            (len(labels), config.in_channels, config.sample_size, config.sample_size),
            generator=generator,
            device=self._execution_device,
            dtype=self.transformer.dtype,
        )
        self._interrupt = False
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            try:
                latents = denoise(
                    lambda z, t: denoiser.predict(z, t, labels, scale),
                    self.scheduler,
                    noise,
                    guides,
                    advance=_doubled(self.scheduler) if scale > 1 else None,
                    on_step=self._after_step(bar, callback_on_step_end),
                )
            except _Interrupted as stop:
                latents = stop.latents
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(
        self,
        labels: Tensor,
        denoiser: Denoiser,
        steps: int,
        output_type: str | None,
        terms: list[Guidance],
        memory: Memory | None,
    ) -> None:
        """Refuses what cannot be sampled; sets the timesteps of the scheduler."""
        denoiser.check(labels, 1.0)
        config = self.transformer.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        if memory is not None:
            check_memory(memory, shape)
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type {output_type!r}; accepted: {', '.join(OUTPUTS)}")
        if not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {steps!r}")
        self.scheduler.set_timesteps(steps)
        check_scheduler(self.scheduler)
        keeps_variances(self.scheduler)
        if terms:
            noise_levels(self.scheduler)
        for term in terms:
            if term.config.strength > 0:
                term.check(labels, shape)

    def _after_step(self, bar: Any, callback: Callable[..., Any] | None) -> Callable[..., Tensor]:
        def on_step(step: int, t: Tensor, x: Tensor) -> Tensor:
            if callback is not None:
                x = _latents_of(callback(self, step, t, {"latents": x}), x)
            bar.update()
            if self._interrupt:
                raise _Interrupted(x)
            return x

        return on_step

    def _decode(self, latents: Tensor, output_type: str | None) -> Any:
        samples = self.vae.decode(1 / self.vae.config.scaling_factor * latents).sample
        samples = (samples / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return samples
        pixels = samples.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(pixels) if output_type == "pil" else pixels


class _Interrupted(Exception):
    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


def _labels(class_labels: Sequence[int] | Tensor) -> Tensor:
    """Labels int64 (B,), of integers of any size."""
    try:
        labels = torch.as_tensor(class_labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"class_labels: {class_labels!r} is not accepted; expected integers, which "
            "get_label_ids has for names"
        ) from None
    kind = labels.dtype
    if not len(labels) or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise ValueError(f"class_labels: {labels.tolist()} is not accepted; expected integers")
    return labels.long()


def _scale(guidance_scale: Any) -> float:
    """The factor of classifier-free guidance; 1 where there is none."""
    if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: {guidance_scale!r} is not accepted; expected a number")
    return max(float(guidance_scale), 1.0)


def _check_generator(generator: Any, count: int) -> None:
    """One generator, or a list with one for each image."""
    given = generator if isinstance(generator, list) else [generator]
    if wrong := [g for g in given if not isinstance(g, torch.Generator | None)]:
        accepted = "a torch.Generator, such as torch.Generator().manual_seed(0), or a list of them"
        raise ValueError(f"generator: {wrong[0]!r} is not accepted; expected {accepted}")
    if len(given) not in (1, count):
        raise ValueError(f"generator: {len(given)} are not accepted; expected 1 or {count}")


def _latents_of(returned: Any, x: Tensor) -> Tensor:
    """The latents to go on with: those that a callback returns, if it does."""
    if not isinstance(returned, Mapping | None):
        seen = type(returned).__name__
        raise ValueError(f"callback_on_step_end: it returned {seen}; expected a dict or None")
    latents = x if returned is None else returned.get("latents", x)
    if not isinstance(latents, Tensor) or latents.shape != x.shape:
        of = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"callback_on_step_end: it returned latents of {of}; expected {tuple(x.shape)}"
        )
    return latents.to(x)


def _doubled(scheduler: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Steps as `DiTPipeline` does under classifier-free guidance, for the same draws of noise.

    It steps both halves of its doubled batch and goes on with the first.
    """
    step = stepper(scheduler)
    return lambda output, t, x: step(torch.cat([output] * 2), t, torch.cat([x] * 2))[: len(x)]


def _check_callback(wanted: Sequence[str], known: Sequence[str]) -> None:
    named = [wanted] if isinstance(wanted, str) else wanted
    wrong = [name for name in named if name not in known]
    if wrong:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: {wrong[0]!r} is not accepted; known: "
            f"{', '.join(known)}"
        )
