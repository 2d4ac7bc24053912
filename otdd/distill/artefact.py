"""A distilled set as a data set of PyTorch: what `otdd.load` returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from otdd.distill.config import require
from otdd.distill.replay import Labelled, Labels, LabelShards, Replay, whole
from otdd.distill.setfiles import SetFiles
from otdd.distill.workers import local_device

__all__ = ["DistilledSet", "Labelled", "load"]


class DistilledSet(Dataset[tuple[Any, int]]):
    """Images of a distilled set with their classes; an item is (image in [0, 1], label).

    Attributes:
        name: of the set, such as `otg`.
        classes: names, by label.
        images: uint8, (N, C, H, W), class-major.
        labels: int64, (N,).
        mean: of the real training images in [0, 1], per channel.
        std: their deviation, per channel.
        files: where everything is.
    """

    def __init__(
        self,
        files: SetFiles,
        transform: Callable[[Tensor], Any] | None = None,
        *,
        verify: bool = True,
    ) -> None:
        self.files, self.name, self.transform = files, files.name, transform
        self._verify = verify
        if verify:
            files.store.sums.verify(files.content())
        self.classes: list[str] = list(files.data["classes"])
        self.mean: tuple[float, ...] = tuple(files.data["mean"])
        self.std: tuple[float, ...] = tuple(files.data["std"])
        self.images, self.labels = files.read()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Image (C, H, W) in [0, 1], or what `transform` makes of it, and its label."""
        image = self.images[index].float() / 255
        label = int(self.labels[index])
        return (image if self.transform is None else self.transform(image)), label

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        about = f"{len(self)} images of {shape}, {len(self.classes)} classes"
        return f"<DistilledSet {self.name!r} of {self.files.data['name']}: {about}>"

    @property
    def has_soft_labels(self) -> bool:
        """Whether teachers labelled the set and their labels are stored."""
        return bool(self.files.labels)

    @cached_property
    def soft_labels(self) -> Tensor | None:
        """Mean logits, float32 (N, K), or None where none are stored.

        The mean is over teachers and over all epochs. Views of an image that CutMix or Mixup mixed
        are left out where it has others. Softmax gives probabilities.
        """
        return self._shards.mean() if self.has_soft_labels else None

    @property
    def epochs(self) -> int:
        """Epochs that `replay` has, with labels of their own."""
        return self.files.epochs if self.files.live else self._shards.epochs

    def normalise(self, images: Tensor) -> Tensor:
        """Images uint8 or in [0, 1], (..., C, H, W), to mean 0 and deviation 1 of the real ones."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        require(x.is_floating_point(), "images", x.dtype, "uint8, or floats in [0, 1]")
        mean, std = (torch.tensor(v).to(x).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def replay(
        self,
        *,
        start: int = 0,
        stop: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> DataLoader[Labelled]:
        """The augmented batches that the teachers labelled, with their logits, in order.

        They are those that otdd's own students train on, to the bit, with any number of workers.
        Where the run stores no labels (`relabel.store_labels` off), its teachers, who are in the
        folder, label the batches as they come: the same bits on the same machine.

        Args:
            start: first epoch.
            stop: epoch after the last; by default all that were labelled.
            workers: processes that make the batches.
            pin_memory: as for a `DataLoader`.
            device: where teachers label; the batches are on the CPU. Without `workers` only.

        Returns:
            A loader of `Labelled` batches.

        Raises:
            StoreError: the set has no soft labels, or not all of them, and no teachers.
            ConfigError: epochs that there are not, or a device that is not there or has no use.
        """
        require(isinstance(workers, int) and workers >= 0, "workers", workers, "an integer >= 0")
        require(device in ("cpu", "cuda"), "device", device, "cpu or cuda")
        ok = device == "cpu" or (self.files.live and workers == 0)
        require(ok, "device", device, "cpu, unless teachers in the folder label without workers")
        epochs = self.epochs
        stop = epochs if stop is None else stop
        ok = isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= epochs
        require(ok, "start, stop", (start, stop), f"epochs of 0 to {epochs}, start < stop")
        soft = self._live(local_device(device, "device")) if self.files.live else self._shards
        steps = range(start * soft.steps_per_epoch, stop * soft.steps_per_epoch)
        return DataLoader(
            Replay(self.images, self.labels, len(self.classes), soft),
            batch_sampler=BatchSampler(steps, 1, drop_last=False),
            collate_fn=whole,
            num_workers=workers,
            pin_memory=pin_memory,
        )

    @cached_property
    def _shards(self) -> LabelShards:
        if self._verify:
            self.files.store.sums.verify(self.files.labels)
        return LabelShards(self.files, len(self))

    def _live(self, device: str) -> Labels:
        from otdd.distill.live import LiveLabels

        return LiveLabels(self.files, self.images, device, verify=self._verify)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_shards"}


def load(
    path: str | os.PathLike[str],
    *,
    set: str | None = None,
    transform: Callable[[Tensor], Any] | None = None,
    verify: bool = True,
) -> DistilledSet:
    """Read a distilled set.

    Args:
        path: folder of a run, or made by `otdd export` to `hf` or `imagefolder`.
        set: name of the set; by default `otg`, or the one of an exported folder.
        transform: applied to the images (C, H, W) in [0, 1] that items have.
        verify: compare every file that is read with its hash in `SHA256SUMS`, if the folder has
            that: images now, soft labels when they are first asked for.

    Raises:
        StoreError: no such folder, none of otdd's, the set is not in it (says which are), or files
            are damaged (names them).
    """
    return DistilledSet(SetFiles.find(path, set, verify=verify), transform, verify=verify)
