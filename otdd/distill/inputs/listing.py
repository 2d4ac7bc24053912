"""What every kind of input gives: images that can be read one by one, with their labels."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from otdd.distill.inputs import pictures

THREADS = min(8, os.cpu_count() or 1)


class Source(Protocol):
    """Images by number; nothing is read before it is asked for."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls an image: its path, or its row."""

    def key(self, index: int) -> str:
        """The same within the data set, for files that others may read."""

    def decode(self, index: int, resolution: int | None) -> Tensor | str:
        """Uint8 (C, H, W), or a text that says what is wrong."""

    def header(self, index: int) -> tuple[int, int, int] | str:
        """Channels, height and width, or a text that says what is wrong."""

    def select(self, indices: Sequence[int]) -> Source:
        """Some of the images, in the order given."""

    def digest(self, start: int, stop: int) -> str:
        """SHA-256 that changes with images start..stop-1, found without decoding them."""


@dataclass(frozen=True)
class Files:
    """Image files under a folder; told apart by name and size."""

    paths: Sequence[Path]
    root: Path

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def key(self, index: int) -> str:
        return Path(os.path.relpath(self.paths[index], self.root)).as_posix()

    def decode(self, index: int, resolution: int | None) -> Tensor | str:
        return pictures.decode(self.paths[index], resolution)

    def header(self, index: int) -> tuple[int, int, int] | str:
        return pictures.header(self.paths[index])

    def select(self, indices: Sequence[int]) -> Files:
        return replace(self, paths=[self.paths[k] for k in indices])

    def digest(self, start: int, stop: int) -> str:
        names = [
            [os.path.relpath(path, self.root), path.stat().st_size]
            for path in self.paths[start:stop]
        ]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()


@dataclass(frozen=True)
class Arrays:
    """Images uint8 (N, C, H, W) in memory, C = 1 or 3; `part` is what messages call them."""

    images: Tensor
    part: str

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.part}[{index}]"

    key = name

    def decode(self, index: int, resolution: int | None) -> Tensor | str:
        image = self.images[index]
        if resolution is None or tuple(image.shape[1:]) == (resolution, resolution):
            return image
        from PIL import Image

        array = image.permute(1, 2, 0).contiguous().numpy()
        picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        return pictures.pixels(picture, resolution)

    def header(self, index: int) -> tuple[int, int, int] | str:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def select(self, indices: Sequence[int]) -> Arrays:
        return replace(self, images=self.images[torch.as_tensor(list(indices))])

    def digest(self, start: int, stop: int) -> str:
        return pixel_digest(self.images[start:stop])


@dataclass(frozen=True)
class Part:
    """Images of the training or of the test part, with labels int64 (N,)."""

    images: Source
    labels: Tensor


@dataclass(frozen=True)
class Listing:
    """A data set before any of its images is decoded.

    Attributes:
        where: what messages call it.
        name: of the data set.
        classes: names, by label.
        train: training part, or everything if there is no `test`.
        test: test part, or None for one that is split off with a seed.
        test_name: what the input calls the test part.
        problems: what makes it unusable, apart from the images themselves.
        notes: what its owner should know.
    """

    where: str
    name: str
    classes: list[str]
    train: Part
    test: Part | None = None
    test_name: str = "test"
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def parts(self) -> list[Part]:
        """The parts that the input has."""
        return [self.train] if self.test is None else [self.train, self.test]

    def without(self, bad: Sequence[Mapping[int, str]]) -> Listing:
        """The same without some images of its parts, by their numbers."""
        kept = []
        for part, out in zip(self.parts, bad, strict=True):
            stay = [k for k in range(len(part.labels)) if k not in out]
            kept.append(Part(part.images.select(stay), part.labels[stay]) if out else part)
        return replace(self, train=kept[0], test=kept[1] if len(kept) > 1 else None)

    def divide(self, val_fraction: float, seed: int) -> list[tuple[int, list[int]]]:
        """For training and test: number of the part, and which of its images; split if need be."""
        if self.test is not None:
            return [(k, list(range(len(part.labels)))) for k, part in enumerate(self.parts)]
        train, test = [], []
        for label, name in enumerate(self.classes):
            own = (self.train.labels == label).nonzero()[:, 0].tolist()
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(key[:8], "little")).permutation(len(own))
            held = min(max(1, round(val_fraction * len(own))), len(own) - 1)
            test += [own[i] for i in order[:held]]
            train += [own[i] for i in order[held:]]
        return [(0, sorted(train)), (0, sorted(test))]

    def class_problems(self) -> list[str]:
        """Classes that cannot be used for their number of images."""
        size = len(self.classes)
        if size < 2:
            only = f"one class ({self.classes[0]})" if size else "no classes"
            return [] if self.problems and not size else [f"{only}: at least two are needed"]
        train, *rest = (torch.bincount(p.labels, minlength=size).tolist() for p in self.parts)
        problems = []
        for k, name in enumerate(self.classes):
            counts = [train[k], *(test[k] for test in rest)]
            if not any(counts):
                problems.append(f"class {name!r}: no image")
            elif not all(counts):
                only, other = ("train", self.test_name)[:: 1 if counts[0] else -1]
                problems.append(f"class {name!r} is in {only} only: no image in {other}")
            elif counts == [1]:
                problems.append(f"class {name!r}: one image cannot be split into train and test")
        return problems


def read_all(source: Source, resolution: int | None) -> list[Tensor | str]:
    """Every image of a source decoded, or what is wrong with it."""
    # Pillow warns of pictures from 89 million pixels; larger than twice that are errors.
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(lambda k: source.decode(k, resolution), range(len(source))))


def pixel_digest(images: Tensor) -> str:
    """SHA-256 over uint8 images (n, C, H, W)."""
    return hashlib.sha256(images.contiguous().numpy().data.cast("B")).hexdigest()
