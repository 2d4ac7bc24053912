"""Stage 1: sampling the images of a distilled set, with or without optimal-transport guidance.

The loop is `otdd.distill.denoising`. Classes are sampled in groups fixed by the
configuration; all randomness of an image comes from (seed, class name, index). So a finished group
is the same bytes whatever was interrupted and whoever made the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otdd.distill.config import RunConfig, SampleConfig
from otdd.distill.data import ImageData
from otdd.distill.denoising import Guides, denoise, stepper
from otdd.distill.generator import Generator, GeneratorError
from otdd.distill.latents import Latents
from otdd.distill.relabel import Teacher
from otdd.distill.store import Store
from otdd.distill.terms import Guidance, Memory, all_finite, rng
from otdd.distill.update import Update, Updates, surrogate_for
from otdd.distill.workers import Workers

Progress = Callable[[str, int, int], None]
BATCH = "batch_images.json"


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
    latents: Latents | None = None,
    teachers: Sequence[Teacher] = (),
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> None:
    """Samples a set into the store; goes on with the groups of classes that are missing there.

    Args:
        store: where `sets/<set_name>` is written.
        data: real images; the reference of the guidance.
        generator: knows every class of the data.
        config: `ipc`, `seed` and `sample` are used.
        set_name: `otg`, or `unguided` for the same sampling without guidance.
        latents: of the real images, if they are encoded already.
        teachers: that compare several starts; without any, their latents are compared.
        workers: processes that make the missing groups together; the first writes the set.
        progress: called as progress(set_name, denoising steps done, of how many).
    """
    if set_name not in ("otg", "unguided"):
        raise ValueError(f"set_name {set_name!r}; accepted: otg, unguided")
    workers = workers or Workers()
    if workers.share(store.has_images(set_name)):
        return
    generator.class_indices(data.classes)
    size, guided = config.sample.batch_classes, set_name == "otg"
    groups = [range(k, min(k + size, data.num_classes)) for k in range(0, data.num_classes, size)]
    names = [f"sets/{set_name}/groups/{n:05d}.safetensors" for n in range(len(groups))]
    missing = workers.share([n for n, name in enumerate(names) if not store.has(name)])
    if missing and config.sample.batch_images == "auto":
        config = _with_batch(store, generator, config, min(size, data.num_classes), workers)
    mine = workers.part(missing)
    updates = None
    if guided:
        surrogate = surrogate_for(store, data, config, generator.device, workers, progress)
        updates = Updates(data, generator, config, latents, surrogate, teachers)
    seen = [n for n in range(len(groups)) if n in mine or n not in missing]
    ticker = _Ticker(progress, set_name, len(seen), config, guided)
    for position, number in enumerate(seen):
        if number in mine:
            update = updates.of(groups[number]) if updates is not None else None
            made = _sample_group(data, generator, config, groups[number], update, ticker.tick)
            store.write_tensors(names[number], {"latents": made})
        ticker.finish(position)
    workers.wait()
    if workers.first:
        _gather(store, generator, config, set_name, names)


def _with_batch(
    store: Store, generator: Generator, config: RunConfig, classes: int, workers: Workers
) -> RunConfig:
    """The settings with the number of images that the first process finds, once for the folder.

    Bytes of an image depend on how many are computed together, so those of a run keep to one.
    """
    if workers.first and not store.has(BATCH):
        from otdd.distill.capacity import find_batch

        settings = config.sample
        terms = settings.guidance, settings.influence, settings.diversity
        grad = any(term.strength > 0 and term.target == "through" for term in terms)
        joint = settings.order == "joint" or "unguided" in config.sets
        most = classes * (config.ipc if joint else 1)
        found = find_batch(generator, settings, most, grad=grad and "otg" in config.sets)
        store.write_json(BATCH, {"batch_images": found})
    workers.wait()
    found = store.read_json(BATCH)["batch_images"]
    return replace(config, sample=replace(config.sample, batch_images=found, memory=None))


def _gather(
    store: Store, generator: Generator, config: RunConfig, set_name: str, names: Sequence[str]
) -> None:
    """Writes the set from the files of its groups."""
    made = torch.cat([store.read_tensors(name)["latents"] for name in names])
    labels = torch.arange(len(made) // config.ipc).repeat_interleave(config.ipc)
    store.write_images(set_name, generator.codec.decode(made), labels, latents=made)
    store.remove(f"sets/{set_name}/groups")


def run_batch(
    generator: Generator,
    batch: Batch,
    config: SampleConfig,
    terms: Sequence[Guidance] = (),
    *,
    memory: Memory | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Runs the whole schedule for one batch and returns its latents (B, c, h, w).

    Args:
        generator: denoiser and noise schedule.
        batch: what to sample; its streams give the first noise and that of the steps.
        config: scheduler, steps, classifier-free guidance.
        terms: of the guided update, with their references set.
        memory: finished latents and their data labels, for the terms.
        on_step: called after each step.

    Raises:
        GeneratorError: NaN or infinite latents; on the CPU at the step that predicts them.
    """
    size = config.batch_images
    if size == "auto":
        raise ValueError("batch_images: 'auto' is found by `sample`; give a number here")
    scheduler = generator.scheduler(config.scheduler, config.steps)
    denoiser = generator.denoiser
    noise = [torch.randn(generator.latent_shape, generator=s) for s in batch.streams]

    def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        made = denoiser.predict(z, t, batch.labels, config.guidance_scale, batch=size)
        if z.device.type == "cpu":  # elsewhere every step would wait for the device
            _require_finite(made[0], config)
        return made

    def stepped(step: int, t: Tensor, x: Tensor) -> Tensor:
        if on_step is not None:
            on_step()
        return x

    latents = denoise(
        predict,
        scheduler,
        torch.stack(noise).to(generator.device),
        Guides(terms, batch.data_labels, memory),
        clamp=generator.codec.bounded,
        advance=stepper(scheduler, batch.streams),
        on_step=stepped,
    )
    _require_finite(latents, config)
    return latents


def _require_finite(latents: Tensor, config: SampleConfig) -> None:
    if not all_finite(latents):
        raise GeneratorError(
            f"generator: NaN or infinity in what it predicts, in sample.precision "
            f"{config.precision}; expected finite numbers: float32 has a wider range than float16, "
            "and weaker guidance (sample.guidance.strength) goes less far from the model's latents"
        )


def _sample_group(
    data: ImageData,
    generator: Generator,
    config: RunConfig,
    group: range,
    update: Update | None,
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
        return Batch(known.to(generator.device), own.to(generator.device), streams)

    if update is None:
        return run_batch(generator, batch(range(ipc)), settings, on_step=on_step).cpu()
    if settings.order == "joint":
        return _best_start(generator, batch, config, update, on_step)
    done: list[Tensor] = []
    for n in range(ipc):
        now, memory = batch(range(n, n + 1)), None
        if done:
            memory = torch.cat(done), now.data_labels.repeat(len(done))
        done.append(
            run_batch(generator, now, settings, update.terms, memory=memory, on_step=on_step)
        )
    return torch.stack(done, 1).flatten(0, 1).cpu()


def _best_start(
    generator: Generator,
    batch: Callable[[range, int], Batch],
    config: RunConfig,
    update: Update,
    on_step: Callable[[], None],
) -> Tensor:
    """Of `starts` joint samplings, for each class the one of least transport cost."""
    best: Tensor | None = None
    least: Tensor | None = None
    for start in range(config.sample.starts):
        now = batch(range(config.ipc), start)
        latents = run_batch(generator, now, config.sample, update.terms, on_step=on_step)
        if update.judge is None:
            return latents.cpu()
        cost = update.judge(latents, now.data_labels)
        if best is None or least is None:
            best, least = latents, cost
            continue
        better = cost < least  # by class, in the order of the labels
        keep = better.repeat_interleave(config.ipc).view(-1, *[1] * (latents.ndim - 1))
        best, least = torch.where(keep, latents, best), torch.where(better, cost, least)
    assert best is not None  # there is at least one start
    return best.cpu()


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
