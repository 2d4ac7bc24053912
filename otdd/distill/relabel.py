"""Stage 2: teachers, and the soft labels they give to a set under replayable augmentation.

The label of an augmented image is the mean of the teachers' logits, kept in one of the formats of
`otdd.distill.labels` beside the augmentation, in shards of whole epochs. Nothing of the images is
stored again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from otdd.distill import students
from otdd.distill.augment import Augmentation, Batch, augmentation, stack, unstack
from otdd.distill.config import ConfigError, RunConfig, TrainConfig
from otdd.distill.data import ImageData
from otdd.distill.labels import FLOAT16, LabelFormat, check_format, compact
from otdd.distill.match import accuracy, make_loss, reproducible, train_student
from otdd.distill.store import Store
from otdd.distill.training import Step, Training, device_of
from otdd.distill.workers import local_device

Progress = Callable[[str, int, int], None]

SHARD_BYTES = 32 * 2**20
TEACHER = TrainConfig(losses=("ce",), batch=64, lr=3e-3)
TEACHER_STEPS, TEACHER_EPOCHS = 800, 10
# |T(IPC)|: up to this many images per class, so many teachers.
TEACHERS_BY_IPC = ((9, 1), (49, 2), (99, 4), (2**63, 8))
# Teachers trained here take turns in architecture, then in seed.
TRAINED_HERE = ("convnet", "resnetap-10")
MEASURED = "auto:measured"  # so many of the most are taken as `otdd.distill.choice` finds good


@dataclass(frozen=True)
class Teacher:
    """A frozen network.

    Attributes:
        name: as in `relabel.teachers`.
        network: images in [0, 1] to logits.
        digest: hash of its weights.
        accuracy: on the test images, in percent.
        file: where its weights are in the store; empty if they are not.
    """

    name: str
    network: nn.Module
    digest: str
    accuracy: float
    file: str = ""


def teacher_names(config: RunConfig) -> list[str]:
    """Names of the teachers of a run, `auto` resolved by the number of images per class.

    With `auto:measured` they are all that are to be tried.
    """
    names: list[str] = []
    for name in config.relabel.teachers:
        if name in ("auto", MEASURED):
            most = TEACHERS_BY_IPC[-1][1]
            by_table = next(n for limit, n in TEACHERS_BY_IPC if config.ipc <= limit)
            count = by_table if name == "auto" else most
            names += [TRAINED_HERE[i % len(TRAINED_HERE)] for i in range(count)]
        else:
            names.append(name)
    return names


def make_teachers(
    store: Store, data: ImageData, config: RunConfig, progress: Progress | None = None
) -> list[Teacher]:
    """Teachers of a run: loaded, or trained on the real training data and kept in the store.

    Where no labels are stored, those that were loaded are kept as well, for `otdd.load`.
    """
    teachers = []
    device = local_device(config.train.device, "train.device")
    network: students.Normalized
    names = teacher_names(config)
    for number, name in enumerate(names):
        arch, seed, file = architecture(name), config.seed, ""
        if name.startswith("timm:"):
            network = students.pretrained(name.removeprefix("timm:"), data)
        elif "=" in name:
            network = students.load_checkpoint(arch, name.partition("=")[2], data)
        else:
            seed += 1000 * names[:number].count(name)
            file = f"teachers/{arch}-{seed}.safetensors"
            network = _trained(store, data, config, arch, seed, file, progress)
        digest = digest_of(network)
        if not file and not config.relabel.store_labels:
            file = f"teachers/{digest[:16]}.safetensors"
            if not store.has(file):
                _keep(store, network, file, arch, data)
        network.to(device).eval().requires_grad_(False)
        right = round(accuracy(network, data.test), 2)
        teachers.append(Teacher(name, network, digest, right, file))
    return teachers


def architecture(name: str) -> str:
    """The architecture in a name of `relabel.teachers`, for `students.make_network`."""
    if name.startswith("timm:"):
        return name.removeprefix("timm:").partition(".")[0]  # what follows names the weights
    return name.partition("=")[0]


@torch.no_grad()
def soft_labels(teachers: Sequence[Teacher], images: Tensor) -> Tensor:
    """Mean of the teachers' logits, (B, K) float16, for augmented images (B, C, H, W).

    The images are on the device of the teachers; the logits come back to the CPU.

    Raises:
        ConfigError: logits that float16 does not hold.
    """
    seen = [teacher.network(images).float() for teacher in teachers]
    mean = (sum(seen) / len(seen)).half().cpu()
    if not bool(mean.isfinite().all()):
        pairs = zip(teachers, seen, strict=True)
        wrong = [t.name for t, logits in pairs if not bool(logits.half().isfinite().all())]
        raise ConfigError(
            f"relabel.teachers: {', '.join(wrong)} gives logits that are not finite in float16; "
            "expected some below 65504"
        )
    return mean


def see(teachers: Sequence[Teacher], images: Tensor, batch: int = 512) -> Tensor:
    """Mean of the teachers' logits, (N, K) float32, for images (N, C, H, W) uint8 as they are."""
    device = device_of(teachers[0].network)
    _, channels, height, width = images.shape
    with reproducible((channels, height, width)):
        parts = [soft_labels(teachers, x.to(device).float() / 255) for x in images.split(batch)]
    return torch.cat(parts).float()


def relabel(
    store: Store,
    data: ImageData,
    teachers: Sequence[Teacher],
    config: RunConfig,
    set_name: str,
    progress: Progress | None = None,
) -> None:
    """Label every augmented batch that students of a set will see, and keep the labels.

    Finished shards are left alone, so this continues where an interrupted call stopped.
    """
    images = store.read_images(set_name)["images"]
    plan = Plan.of(config, data, len(images))
    per_shard = plan.epochs_per_shard(len(data.classes))
    labels = plan.labels
    meta = {"teachers": [[t.name, t.digest] for t in teachers], "classes": list(data.classes)}
    meta |= labels.meta()
    device = device_of(teachers[0].network)
    if progress is not None:
        progress(f"relabel {set_name}", 0, plan.labelled)
    for first in range(0, plan.labelled, per_shard):
        last = min(first + per_shard, plan.labelled)
        name = shard_name(set_name, first // per_shard)
        if store.has(name):
            check_format(LabelFormat.read(store.read_meta(name)), labels, set_name)
        else:
            with reproducible(data.image_shape):
                batches = [b for epoch in range(first, last) for b in plan.epoch(epoch)]
                logits = [soft_labels(teachers, batch.apply(images, device)) for batch in batches]
            drawn = stack(batches) if labels.kind == "fp16" else compact(stack(batches))
            made = {**drawn, **labels.encode(torch.stack(logits))}
            store.write_tensors(name, made, {**meta, "epochs": [first, last]})
        if progress is not None:
            progress(f"relabel {set_name}", last, plan.labelled)


def relabelled(store: Store, data: ImageData, config: RunConfig, set_name: str) -> bool:
    """Whether all soft labels of a set are in the store."""
    if not store.has_images(set_name):
        return False
    plan = Plan.of(config, data, config.ipc * len(data.classes))
    shards = -(-plan.labelled // plan.epochs_per_shard(len(data.classes)))
    return all(store.has(shard_name(set_name, i)) for i in range(shards))


def stored_steps(
    store: Store, data: ImageData, config: RunConfig, set_name: str, first: int = 0
) -> Iterator[Step]:
    """Batches and soft labels of a set from epoch `first` on, one shard in memory at a time."""
    plan = Plan.of(config, data, config.ipc * len(data.classes))
    length, held, steps = plan.steps_per_epoch, -1, list[Step]()
    for epoch in range(first, plan.epochs):
        shard, row = divmod(epoch % plan.labelled, plan.epochs_per_shard(len(data.classes)))
        if shard != held:
            name = shard_name(set_name, shard)
            tensors = store.read_tensors(name)
            check_format(LabelFormat.read(store.read_meta(name)), plan.labels, set_name)
            decoded = plan.labels.decode(tensors, len(data.classes))
            pairs = zip(unstack(tensors), decoded, strict=True)
            held, steps = shard, [Step(batch, logits) for batch, logits in pairs]
        yield from steps[row * length : (row + 1) * length]


def live_steps(
    images: Tensor,
    data: ImageData,
    teachers: Sequence[Teacher],
    config: RunConfig,
    first: int = 0,
) -> Iterator[Step]:
    """The same steps as `stored_steps`, labelled as they are needed."""
    plan = Plan.of(config, data, len(images))
    for epoch in range(first, plan.epochs):
        for batch in plan.epoch(epoch % plan.labelled):
            yield live_step(batch, images, teachers, plan.labels)


def live_step(
    batch: Batch, images: Tensor, teachers: Sequence[Teacher], labels: LabelFormat
) -> Step:
    """A batch with the labels that its teachers give it, as a file of this format has them."""
    logits = soft_labels(teachers, batch.apply(images, device_of(teachers[0].network)))
    return Step(batch, labels.decode(labels.encode(logits), logits.shape[-1]))


def hard_steps(
    count: int,
    data: ImageData,
    config: RunConfig,
    seed: int,
    first: int = 0,
    *,
    plain: bool = False,
) -> Iterator[Step]:
    """Batches without soft labels, drawn anew for every seed; `plain` ones are not augmented."""
    plan = Plan.of(config, data, count, seed=seed)
    if plain:
        plan = dataclasses.replace(plan, augment=Augmentation())
    for epoch in range(first, plan.epochs):
        for batch in plan.epoch(epoch):
            yield Step(batch)


@dataclass(frozen=True)
class Plan:
    """The augmented batches that students of a set see, and the format of their soft labels.

    Of `epochs` the first `labelled` have soft labels; these come again and again.
    """

    augment: Augmentation
    count: int
    batch: int
    size: tuple[int, int]
    epochs: int
    seed: int
    labels: LabelFormat = FLOAT16
    label_epochs: int | None = None

    @classmethod
    def of(cls, config: RunConfig, data: ImageData, count: int, seed: int | None = None) -> Plan:
        """The plan for a set of `count` images; soft labels use the seed of the run."""
        size = (data.image_shape[1], data.image_shape[2])
        drawn = augmentation(config.relabel, data.name, size)
        batch = min(config.train.batch_for(len(data.classes)), count)
        seed = config.seed if seed is None else seed
        labels = LabelFormat.of(config.relabel, len(data.classes))
        cycle = config.relabel.label_epochs
        return cls(drawn, count, batch, size, config.train.epochs, seed, labels, cycle)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return -(-self.count // self.batch)

    @property
    def labelled(self) -> int:
        """Epochs that have soft labels of their own."""
        return min(self.epochs, self.label_epochs or self.epochs)

    @property
    def total(self) -> int:
        """Batches of all epochs."""
        return self.epochs * self.steps_per_epoch

    def epochs_per_shard(self, classes: int) -> int:
        """Epochs whose labels fit into one shard as float16, whatever the format."""
        row = 2 * classes + 4 * 6 + 2 * 8
        return max(1, SHARD_BYTES // (row * self.batch * self.steps_per_epoch))

    def epoch(self, epoch: int) -> list[Batch]:
        """Batches of one epoch."""
        return [self.batch_of(epoch, step) for step in range(self.steps_per_epoch)]

    def batch_of(self, epoch: int, step: int) -> Batch:
        """One batch of an epoch."""
        given = self.count, self.batch, self.size
        return self.augment.draw(*given, seed=self.seed, epoch=epoch, step=step)


def shard_name(set_name: str, number: int) -> str:
    """File of one shard of soft labels."""
    return f"sets/{set_name}/labels/{number:05d}.safetensors"


def teacher_plan(data: ImageData, config: RunConfig, seed: int) -> Plan:
    """The steps of a teacher over the real training images."""
    batch, size = min(TEACHER.batch, len(data.train)), (data.image_shape[1], data.image_shape[2])
    per_epoch = -(-len(data.train) // batch)
    epochs = config.relabel.teacher_epochs or max(TEACHER_EPOCHS, -(-TEACHER_STEPS // per_epoch))
    drawn = augmentation(config.relabel, data.name, size)
    return Plan(drawn, len(data.train), batch, size, epochs, seed)


def _trained(
    store: Store,
    data: ImageData,
    config: RunConfig,
    arch: str,
    seed: int,
    file: str,
    progress: Progress | None,
) -> students.Normalized:
    network = students.make_network(arch, data, seed)
    if store.has(file):
        network.load_state_dict(store.read_tensors(file))
        return network
    plan = teacher_plan(data, config, seed)
    epochs = plan.epochs

    def steps() -> Iterator[Step]:
        for epoch in range(epochs):
            if progress is not None:
                progress(f"teacher {arch}", epoch, epochs)
            for batch in plan.epoch(epoch):
                yield Step(batch)
        if progress is not None:
            progress(f"teacher {arch}", epochs, epochs)

    images = data.train.images
    network.to(local_device(config.train.device, "train.device"))
    with reproducible(data.image_shape):
        loss = make_loss("ce", TEACHER)
        training = Training(network, loss, TEACHER, plan.total, plan.steps_per_epoch, seed=seed)
        train_student(training, images, data.train.labels, steps())
    _keep(store, network, file, arch, data)
    return network


def _keep(store: Store, network: nn.Module, file: str, arch: str, data: ImageData) -> None:
    meta = {"arch": arch, "classes": list(data.classes)}
    store.write_tensors(file, network.state_dict(), meta)


def digest_of(network: nn.Module) -> str:
    """Hash of all weights, with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
