"""What steps cost in time and memory: measured on the steps themselves, at the sizes of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from otdd.distill import relabel, students
from otdd.distill.augment import Batch, augmentation
from otdd.distill.config import RelabelConfig, RunConfig, TrainConfig
from otdd.distill.data import ImageData
from otdd.distill.evaluate import LABELS
from otdd.distill.match import make_loss, reproducible, train_student
from otdd.distill.prepare import Prepared
from otdd.distill.relabel import Plan
from otdd.distill.store import Store
from otdd.distill.training import Step, Training
from otdd.distill.words import sized
from otdd.distill.workers import local_device

if TYPE_CHECKING:
    from otdd.distill.codec import Codec
    from otdd.distill.stream import Stream
    from otdd.distill.surrogate_config import SurrogateConfig

BUDGET = 1.0  # seconds that the steps of one kind are timed for
LEAST = 3  # steps timed at least, after one that is not


class _EnoughError(Exception):
    """Ends a stage that is only timed."""


class Watch:
    """Times the intervals between calls, the first left out, and says when that is enough."""

    def __init__(self, budget: float | None = None) -> None:
        self._budget = BUDGET if budget is None else budget
        self._times = [time.perf_counter()]

    def tick(self) -> None:
        if torch.cuda.is_initialized():  # what was launched is not yet done
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())

    @property
    def enough(self) -> bool:
        long = self._times[-1] - self._times[0] >= self._budget
        return len(self._times) > LEAST + 1 and long

    @property
    def step(self) -> float:
        """Seconds of a step, a mean."""
        timed = self._times[1:] if len(self._times) > 2 else self._times
        return (timed[-1] - timed[0]) / (len(timed) - 1) if len(timed) > 1 else 0.0


@dataclass(frozen=True)
class Cost:
    """`count` steps of `step` seconds, as measured."""

    count: int
    step: float

    def __str__(self) -> str:
        return f"{duration(self.count * self.step)} (one step timed at {_fine(self.step)})"


def _fine(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 90 else f"about {minutes / 60:.1f} h"


def lines(made: str, cost: Cost | None) -> str:
    """What `--dry-run` prints for a command that is one task."""
    time_ = "not timed: too few steps" if cost is None else str(cost)
    memory = f"about {sized(peak_memory())} at the peak of the timed steps"
    return f"{made}\ntime     {time_}\nmemory   {memory}\nnothing was written (--dry-run)\n"


def peak_memory() -> int:
    """Most bytes that this process has held: of the GPU if it is in use, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(start: Callable[[Callable[[str, int, int], None]], object], name: str) -> float | None:
    """Seconds of a step of a stage that reports each one; None if it ended before.

    Args:
        start: does the work, with a progress; it is broken off once enough steps were timed.
        name: of the task whose progress counts.
    """
    watch: Watch | None = None

    def progress(text: str, done: int, total: int, note: str = "") -> None:
        nonlocal watch
        if text != name:
            return
        if watch is None:
            watch = Watch()
            return
        watch.tick()
        if watch.enough:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        start(progress)
    return watch.step if watch is not None and watch.step > 0 else None


def denoising(config: RunConfig, made: Prepared, name: str, steps: int) -> Cost | None:
    """Of the denoising steps of a set, with its guidance, in groups of the run's size."""
    from otdd.distill.sample import sample

    generator = made.generator
    assert generator is not None  # sets that are sampled have one
    generator.to(local_device(config.sample.device), getattr(torch, config.sample.precision))
    if config.sample.compile:
        generator.transformer.compile()  # in the first step, which is not timed
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "run") as store:

        def start(progress: Callable[[str, int, int], None]) -> None:
            sample(
                store,
                made.data,
                generator,
                config,
                set_name=name,
                latents=made.latents,
                progress=progress,
            )

        step = timed(start, name)
    return None if step is None else Cost(steps, step)


def fitting(train: Callable[..., object], steps: int) -> Cost | None:
    """Of the steps of `otdd fit`, which is `train(out, progress=progress)`."""
    with tempfile.TemporaryDirectory() as folder:
        step = timed(lambda progress: train(Path(folder) / "generator", progress=progress), "fit")
    return None if step is None else Cost(steps, step)


def surrogate(data: ImageData, config: SurrogateConfig, device: Literal["cpu", "cuda"]) -> Cost:
    """Of the steps of `otdd fit-surrogate`."""
    drawn = augmentation(RelabelConfig(), data.name, data.image_shape[1:])
    batch = min(config.batch, len(data.train))
    plan = Plan(drawn, len(data.train), batch, data.image_shape[1:], config.epochs, config.seed)
    settings = TrainConfig(losses=("ce",), batch=batch, ema=0.0, device=device)
    images, labels = data.train.images, data.train.labels
    step = _steps_of(data, config.arch, "ce", images, labels, plan, settings)
    return Cost(plan.total, step)


def encoding(data: Stream, codec: Codec, batch: int) -> Cost:
    """Of the batches of `otdd encode`: reading, and the codec."""
    watch = Watch()
    for first in range(0, len(data), batch):
        codec.encode(data.read(first, min(first + batch, len(data))))
        watch.tick()
        if watch.enough:
            break
    return Cost(-(-len(data) // batch), watch.step)


def training(config: RunConfig, made: Prepared, arch: str, loss: str, steps: int) -> Cost:
    """Of the steps of students of one kind, on real images in place of distilled ones."""
    plan = Plan.of(config, made.data, config.ipc * made.data.num_classes)
    images, labels = _some(made, config.ipc * made.data.num_classes)
    return Cost(steps, _steps_of(made.data, arch, loss, images, labels, plan, config.train))


def teaching(config: RunConfig, made: Prepared, arch: str) -> Cost:
    """Of the steps of a teacher that is trained here."""
    plan = relabel.teacher_plan(made.data, config, config.seed)
    images, labels = _some(made, len(made.data.train))
    settings = dataclasses.replace(relabel.TEACHER, device=config.train.device)
    return Cost(plan.total, _steps_of(made.data, arch, "ce", images, labels, plan, settings))


def labelling(config: RunConfig, made: Prepared, arch: str) -> float:
    """Seconds in which a teacher labels one batch."""
    plan = Plan.of(config, made.data, config.ipc * made.data.num_classes)
    images, _ = _some(made, config.ipc * made.data.num_classes)
    device = torch.device(local_device(config.train.device, "train.device"))
    network, watch = students.make_network(arch, made.data, config.seed).to(device).eval(), Watch()
    with torch.no_grad(), reproducible(made.data.image_shape):
        for batch in _batches(plan):
            network(batch.apply(images, device)).cpu()
            watch.tick()
            if watch.enough:
                break
    return watch.step


def _steps_of(
    data: ImageData,
    arch: str,
    loss: str,
    images: Tensor,
    labels: Tensor,
    plan: Plan,
    settings: TrainConfig,
) -> float:
    watch = Watch()

    def steps() -> Iterator[Step]:
        for batch in _batches(plan):
            shape = len(batch.index), data.num_classes
            yield Step(batch, None if LABELS[loss] == "hard" else torch.randn(shape))
            watch.tick()
            if watch.enough:
                return

    device = local_device(settings.device, "train.device")
    with reproducible(data.image_shape):
        network: nn.Module = students.make_network(arch, data, 0).to(device)
        objective = make_loss(loss, settings)
        training = Training(network, objective, settings, 1 << 20, arch=arch)
        train_student(training, images, labels, steps())
    return watch.step


def _batches(plan: Plan) -> Iterator[Batch]:
    for epoch in count():
        yield from plan.epoch(epoch)


def _some(made: Prepared, number: int) -> tuple[Tensor, Tensor]:
    """Images, evenly over the real ones, as many as a set has."""
    train = made.data.train
    index = torch.arange(number) % len(train)
    return train.images[index], train.labels[index]
