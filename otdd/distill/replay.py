"""Replay: the augmented batches that the teachers labelled, each with its soft labels.

A batch is read from the shards when it is asked for, so memory does not grow with their number,
and any process can make any batch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from otdd.distill.augment import shapes as stacked_shapes
from otdd.distill.augment import unstack
from otdd.distill.labels import LabelFormat
from otdd.distill.match import reproducible, undisturbed
from otdd.distill.setfiles import SetFiles
from otdd.distill.store import StoreError
from otdd.distill.training import Step


class IncompleteLabels(StoreError):
    """Soft labels of which the last epochs are still to be made."""


class Labelled(NamedTuple):
    """One batch as a student sees it.

    Attributes:
        images: float32 (B, C, H, W) in [0, 1], augmented.
        logits: float32 (B, K), mean logits of the teachers on these very images.
        targets: float32 (B, K), hard labels mixed as CutMix or Mixup mixed the images.
        labels: int64 (B,), classes of the images before that.
    """

    images: Tensor
    logits: Tensor
    targets: Tensor
    labels: Tensor


class Labels(Protocol):
    """The soft labels of a set, step by step: stored ones, or `live.LiveLabels`.

    Attributes:
        epochs: how many the labels have.
        steps_per_epoch: batches of one epoch.
    """

    epochs: int
    steps_per_epoch: int

    def __len__(self) -> int: ...

    def step(self, number: int) -> Step:
        """Augmentation and logits of a step, counted from the first of the first epoch."""


class LabelShards:
    """Soft labels of a set that are stored, step by step.

    Args:
        files: of the set.
        count: images of the set.

    Attributes:
        epochs: how many the labels have.
        steps_per_epoch: batches of one epoch.
        teachers: names and hashes of the teachers.

    Raises:
        StoreError: there are none, or not all of them.
    """

    def __init__(self, files: SetFiles, count: int) -> None:
        self._store, self._names, self._count = files.store, files.labels, count
        self._open: dict[str, Any] = {}
        where = f"{files.store.path}: set {files.name}"
        if not files.labels:
            hint = "run `otdd relabel` first, with --train.losses kl where no loss has them"
            if files.exported:
                hint = "it was exported without"
            raise StoreError(f"{where} has no soft labels; {hint}")
        self.epochs, counts = 0, list[int]()
        self.teachers: list[list[str]] = []
        for name in files.labels:
            first, last, classes, steps = self._head(name)
            if first != self.epochs or classes != files.data["classes"]:
                raise StoreError(f"{files.store.path / name} does not belong to this set")
            counts.append(steps)
            self.epochs = last
        if self.epochs != files.epochs:
            raise IncompleteLabels(
                f"{where} has soft labels of {self.epochs} epochs out of {files.epochs}; "
                "run `otdd relabel` to make the rest"
            )
        self._ends = list(accumulate(counts))
        self.steps_per_epoch = self._ends[-1] // self.epochs

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker opens the files itself

    def step(self, number: int) -> Step:
        """Augmentation and logits of a step, counted from the first of the first epoch."""
        shard = bisect_right(self._ends, number)
        name, row = self._names[shard], number - ([0, *self._ends])[shard]
        file = self._file(name)
        names = file.keys()
        tensors = {part: file.get_slice(part)[row : row + 1] for part in names}
        (batch,), (logits,) = unstack(tensors), self._decoded(name, tensors)
        self._check(batch.index)
        return Step(batch, logits)

    def _decoded(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        """Logits float32 (steps, B, K) of what a shard holds of some steps."""
        meta = self._store.read_meta(name)
        return LabelFormat.read(meta).decode(tensors, len(meta["classes"]))

    def _check(self, index: Tensor) -> None:
        if not 0 <= int(index.min()) <= int(index.max()) < self._count:
            raise StoreError(
                f"{self._store.path}: a step of the soft labels is of images that the set has not"
            )

    def mean(self) -> Tensor:
        """Mean logits of each image over its views, (N, K).

        Views that CutMix or Mixup mixed count only where an image has no others.
        """
        count = self._count
        parts = [torch.zeros(2, count, 1), torch.zeros(2, count, len(self._classes()))]
        seen, total = (part.double() for part in parts)
        for name in self._names:
            tensors = self._store.read_tensors(name)
            decoded = self._decoded(name, tensors).double()
            for batch, logits in zip(unstack(tensors), decoded, strict=True):
                index, mixed = batch.index, int(batch.mixed)
                self._check(index)
                seen[mixed].index_add_(0, index, torch.ones(len(index), 1).double())
                total[mixed].index_add_(0, index, logits)
        pick = (seen[0] == 0).long()
        if bool((seen.sum(0) == 0).any()):
            raise StoreError(f"{self._store.path}: some images have no soft label")
        chosen = torch.where(pick.bool(), total[1] / seen[1], total[0] / seen[0])
        return chosen.float()

    def _head(self, name: str) -> tuple[int, int, list[str], int]:
        """First epoch, the one after the last, classes, and number of steps of a shard."""
        file, meta = self._file(name), self._store.read_meta(name)
        try:
            names = file.keys()
            shapes = {part: file.get_slice(part).get_shape() for part in names}
            (first, last), classes = meta["epochs"], meta["classes"]
            self.teachers = meta["teachers"]
            steps, batch = shapes["index"]
            kept = LabelFormat.read(meta).shapes(len(classes))
            side = math.isqrt(shapes["patches"][-1]) if "patches" in shapes else 1
            expected = {
                **stacked_shapes(steps, batch, names, side),
                **{part: [steps, batch, *shape] for part, shape in kept.items()},
            }
            well = shapes == expected and steps > 0 and last > first and steps % (last - first) == 0
        except (KeyError, TypeError, ValueError, SafetensorError):
            well = False
        if not well:
            raise StoreError(f"{self._store.path / name} is damaged: no soft labels of otdd")
        return first, last, classes, steps

    def _classes(self) -> list[str]:
        return list(self._store.read_meta(self._names[0])["classes"])

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._store.path / name
            try:
                self._open = {name: safe_open(path, framework="pt")}  # one at a time
            except (OSError, SafetensorError) as error:
                raise StoreError(f"{path} cannot be read ({error}); it is damaged") from None
        return self._open[name]


class Replay(Dataset[Labelled]):
    """Steps of a set as a data set: item i is the whole batch of step i.

    A loader of one's own takes it with ``batch_size=None``, in any order.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, soft: Labels) -> None:
        self.images, self.labels, self.classes, self.soft = images, labels, classes, soft

    def __len__(self) -> int:
        return len(self.soft)

    def __getitem__(self, number: int) -> Labelled:
        """The batch of a step, counted from the last one where it is negative."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"step {number} is out of range; there are {len(self)}")
        with undisturbed():
            return self._batch(number % len(self))

    def _batch(self, number: int) -> Labelled:
        batch, logits = (step := self.soft.step(number)).batch, step.teacher
        assert logits is not None
        _, channels, height, width = self.images.shape
        with reproducible((channels, height, width)):
            images = batch.apply(self.images)
            targets = batch.targets(self.labels, self.classes, (height, width))
        return Labelled(images, logits, targets, self.labels[batch.index])

    def __getitems__(self, numbers: Sequence[int]) -> Labelled:
        """The batch of one step: what a loader asks a data set that makes whole batches."""
        if len(numbers) != 1:
            raise ValueError(
                f"batch_size: {len(numbers)} is not accepted; expected None, as an item is a batch"
            )
        return self[numbers[0]]


def whole(batch: Any) -> Any:
    """Collates nothing: the batch is whole already."""
    return batch
