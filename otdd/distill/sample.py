"""Stage 1: sampling the images of a distilled set, with or without optimal-transport guidance.

The denoising loop is our own, over a transformer and a diffusers scheduler: predict x0_hat, correct
it (or z_t), rebuild the noise that belongs to it, `scheduler.step`. Classes are sampled in groups
fixed by the configuration; all randomness of an image comes from (seed, class name, index). So a
finished group is the same bytes whatever was interrupted and whoever made the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from otdd.distill.config import RunConfig, SampleConfig
from otdd.distill.data import ImageData
from otdd.distill.generator import Generator
from otdd.distill.guidance import OTGuidance, pick_reference, rng
from otdd.distill.store import Store

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Batch:
    """Images in flight: labels of the generator and of the data (B,), one random stream each."""

    labels: Tensor
    data_labels: Tensor
    streams: list[torch.Generator]


def sample(
    store: Store,
    data: ImageData,
    generator: Generator,
    config: RunConfig,
    *,
    set_name: str = "otg",
    progress: Progress | None = None,
) -> None:
    """Samples a set into the store; goes on after the last finished group of classes.

    Args:
        store: where `sets/<set_name>` is written.
        data: real images; the reference of the guidance.
        generator: knows every class of the data.
        config: `ipc`, `seed` and `sample` are used.
        set_name: `otg`, or `unguided` for the same sampling without guidance.
        progress: called as progress(set_name, denoising steps done, of how many).
    """
    if set_name not in ("otg", "unguided"):
        raise ValueError(f"set_name {set_name!r}; accepted: otg, unguided")
    if store.has_images(set_name):
        return
    generator.class_indices(data.classes)
    folder = f"sets/{set_name}/groups"
    size, guided = config.sample.batch_classes, set_name == "otg"
    groups = [range(k, min(k + size, data.num_classes)) for k in range(0, data.num_classes, size)]
    ticker = _Ticker(progress, set_name, len(groups), config, guided)
    for number, group in enumerate(groups):
        name = f"{folder}/{number:05d}.safetensors"
        if not store.has(name):
            guidance = _guidance(data, generator, config, group) if guided else None
            latents = _sample_group(data, generator, config, group, guidance, ticker.tick)
            store.write_tensors(name, {"latents": latents})
        ticker.finish(number)
    parts = [store.read_tensors(f"{folder}/{n:05d}.safetensors") for n in range(len(groups))]
    latents = torch.cat([part["latents"] for part in parts])
    labels = torch.arange(data.num_classes).repeat_interleave(config.ipc)
    images = generator.codec.decode(latents)
    store.write_images(set_name, images, labels, latents=latents)
    shutil.rmtree(store.path / folder, ignore_errors=True)


def denoise(
    generator: Generator,
    batch: Batch,
    config: SampleConfig,
    guidance: OTGuidance | None = None,
    *,
    memory: tuple[Tensor, Tensor] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Runs the whole schedule for one batch and returns its latents (B, c, h, w).

    Args:
        generator: denoiser and noise schedule.
        batch: what to sample; its streams give the first noise and that of the steps.
        config: scheduler, steps, classifier-free guidance.
        guidance: with its reference set; None samples freely.
        memory: finished latents and their data labels, for the guidance.
        on_step: called after each step.
    """
    scheduler = generator.scheduler(config.scheduler, config.steps)
    device = next(generator.transformer.parameters()).device
    noise = [torch.randn(generator.latent_shape, generator=s) for s in batch.streams]
    x = torch.stack(noise).to(device)
    for step, t in enumerate(scheduler.timesteps.tolist()):
        alpha_bar = float(scheduler.alphas_cumprod[t])
        active = guidance if guidance is not None and guidance.active(step, config.steps) else None
        x0, rest, move = _predict(generator, batch, config, active, x, t, alpha_bar, memory)
        on_x0 = active is not None and active.config.target == "x0"
        if on_x0:
            x0 = x0 - move
        output = _noise_of(x, x0, alpha_bar)
        if rest is not None and config.scheduler == "ddpm":
            output = torch.cat([output, rest], 1)
        x = scheduler.step(output, t, x, generator=batch.streams).prev_sample
        if move is not None and not on_x0:
            x = x - move
        if on_step is not None:
            on_step()
    return x


def _predict(
    generator: Generator,
    batch: Batch,
    config: SampleConfig,
    guidance: OTGuidance | None,
    x: Tensor,
    t: int,
    alpha_bar: float,
    memory: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x0_hat, the variance channels if any, and the step of the guidance to subtract."""
    target = guidance.config.target if guidance is not None else None
    with torch.set_grad_enabled(target == "through"):
        z = x.detach().requires_grad_(target == "through")
        calls = zip(
            z.split(config.batch_images), batch.labels.split(config.batch_images), strict=True
        )
        parts = [generator.predict(part, t, c, config.guidance_scale) for part, c in calls]
        free_x0 = _x0_of(z, torch.cat([p for p, _ in parts]), alpha_bar, generator.prediction_type)
    rest = None if parts[0][1] is None else torch.cat([r.detach() for _, r in parts])
    x0 = free_x0.detach()
    output_rms = _noise_of(x, x0, alpha_bar).flatten(1).square().mean(1).sqrt()
    if generator.codec.bounded:
        x0 = x0.clamp(-1, 1)
    if guidance is None:
        return x0, rest, None
    on = x0 if target in ("x0", "through") else x
    move = guidance.direction(on, t, batch.data_labels, alpha_bar=alpha_bar, memory=memory)
    if target == "through":
        move = torch.autograd.grad((free_x0 * move).sum(), z)[0]
    return x0, rest, guidance.step(move, alpha_bar=alpha_bar, output_rms=output_rms)


def _x0_of(x: Tensor, predicted: Tensor, alpha_bar: float, prediction_type: str) -> Tensor:
    if prediction_type == "sample":
        return predicted
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * predicted
    return (x - (1 - alpha_bar) ** 0.5 * predicted) / alpha_bar**0.5


def _noise_of(x: Tensor, x0: Tensor, alpha_bar: float) -> Tensor:
    return (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5


def _sample_group(
    data: ImageData,
    generator: Generator,
    config: RunConfig,
    group: range,
    guidance: OTGuidance | None,
    on_step: Callable[[], None],
) -> Tensor:
    """Latents of a group of classes, class-major (len(group) * ipc, c, h, w)."""
    settings, ipc = config.sample, config.ipc

    def batch(indices: range, start: int = 0) -> Batch:
        names = [data.classes[k] for k in group]
        known = torch.tensor(generator.class_indices(names)).repeat_interleave(len(indices))
        key = (config.seed, "image") if start == 0 else (config.seed, "start", start)
        streams = [rng(*key, name, n) for name in names for n in indices]
        own = torch.tensor(group).repeat_interleave(len(indices))
        device = next(generator.transformer.parameters()).device
        return Batch(known.to(device), own.to(device), streams)

    if guidance is None:
        return denoise(generator, batch(range(ipc)), settings, on_step=on_step).cpu()
    if settings.order == "joint":
        return _best_start(generator, batch, config, guidance, on_step)
    done: list[Tensor] = []
    for n in range(ipc):
        now, memory = batch(range(n, n + 1)), None
        if done:
            memory = torch.cat(done), now.data_labels.repeat(len(done))
        done.append(denoise(generator, now, settings, guidance, memory=memory, on_step=on_step))
    return torch.stack(done, 1).flatten(0, 1).cpu()


def _best_start(
    generator: Generator,
    batch: Callable[[range, int], Batch],
    config: RunConfig,
    guidance: OTGuidance,
    on_step: Callable[[], None],
) -> Tensor:
    """Of `starts` joint samplings, for each class the one of least transport cost."""
    best, least = None, None
    for start in range(config.sample.starts):
        now = batch(range(config.ipc), start)
        latents = denoise(generator, now, config.sample, guidance, on_step=on_step)
        cost = guidance.transport_cost(latents, now.data_labels)
        if best is None:
            best, least = latents, cost
            continue
        better = cost < least  # by class, in the order of the labels
        keep = better.repeat_interleave(config.ipc).view(-1, *[1] * (latents.ndim - 1))
        best, least = torch.where(keep, latents, best), torch.where(better, cost, least)
    return best.cpu()


def _guidance(data: ImageData, generator: Generator, config: RunConfig, group: range) -> OTGuidance:
    """Guidance with the real latents of the group; only the images it will use are encoded."""
    labels = data.train.labels
    own = ((labels >= group.start) & (labels < group.stop)).nonzero()[:, 0]
    size = config.sample.guidance.reference_size
    keep = own[pick_reference(labels[own], size, config.seed)]
    device = next(generator.transformer.parameters()).device
    guidance = OTGuidance(config.sample.guidance, seed=config.seed)
    latents = generator.codec.encode(data.train.images[keep])
    guidance.set_reference(latents.to(device), labels[keep].to(device))
    return guidance


class _Ticker:
    """Counts denoising steps over all groups for the progress callback."""

    def __init__(
        self, progress: Progress | None, name: str, groups: int, config: RunConfig, guided: bool
    ) -> None:
        sequential = config.sample.order == "sequential"
        passes = (config.ipc if sequential else config.sample.starts) if guided else 1
        self.per_group = passes * config.sample.steps
        self.total, self.done = groups * self.per_group, 0
        self.progress, self.name = progress, name

    def tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.name, self.done, self.total)

    def finish(self, number: int) -> None:
        if self.done < (number + 1) * self.per_group:  # a group found in the store
            self.done = (number + 1) * self.per_group - 1
            self.tick()
