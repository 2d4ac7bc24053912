"""Real images to distil, of any input, checked before any work.

Everything is held as uint8 tensors in memory. All images are read first, so that every offending
file or class is named in one `DataError` and nothing has been done yet.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from otdd.distill.inputs.builtin import SIDES
from otdd.distill.inputs.check import Skipped, check
from otdd.distill.inputs.listing import read_all
from otdd.distill.inputs.pictures import size_problems
from otdd.distill.inputs.problems import DataError, DataWarning
from otdd.distill.inputs.spec import BUILTIN, open_listing

__all__ = [
    "BUILTIN",
    "DataError",
    "DataWarning",
    "ImageData",
    "LabeledImages",
    "check_ipc",
    "load_data",
]


@dataclass(frozen=True, repr=False)
class LabeledImages:
    """Images uint8 (N, C, H, W) with labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        """Without the pixels: `LabeledImages(3200 of 1x32x32)`."""
        return f"LabeledImages({len(self)} of {'x'.join(map(str, self.images.shape[1:]))})"

    def of_class(self, label: int) -> Tensor:
        """Images of one class, in file order."""
        return self.images[self.labels == label]


@dataclass(frozen=True)
class Facts:
    """Mean and deviation of the training images in [0, 1], per channel; a hash of everything."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str


@dataclass(frozen=True)
class ImageData:
    """A data set: `classes[k]` names label k; `facts` are gathered here unless they are known.

    `skipped` has the images that were left out because they cannot be read, and why.
    """

    name: str
    classes: list[str]
    train: LabeledImages
    test: LabeledImages
    facts: Facts | None = field(default=None, repr=False)
    skipped: Skipped = ()
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        parts = [(part.labels, [part.images]) for part in (self.train, self.test)]
        facts = self.facts or gather_facts(self.classes, self.image_shape, parts)
        for name in ("mean", "std", "fingerprint"):
            object.__setattr__(self, name, getattr(facts, name))

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def gather_facts(
    classes: list[str],
    image_shape: tuple[int, int, int],
    parts: Iterable[tuple[Tensor, Iterable[Tensor]]],
) -> Facts:
    """Facts of a data set in one pass over its images.

    Args:
        classes: names, by label.
        image_shape: (C, H, W).
        parts: labels (N,), and images uint8 (n, C, H, W) in any number of batches, of the training
            part and of the test part.
    """
    digest = hashlib.sha256(repr((classes, image_shape)).encode())
    counts = torch.zeros(image_shape[0], 256, dtype=torch.float64)  # exact
    for number, (labels, batches) in enumerate(parts):
        digest.update(labels.numpy().tobytes())
        for images in batches:
            digest.update(images.contiguous().numpy().data.cast("B"))
            if number == 0:
                counts += _histogram(images)
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
    rounded = [tuple(round(v, 6) for v in values.tolist()) for values in (mean, std)]
    return Facts(rounded[0], rounded[1], digest.hexdigest())


def load_data(
    spec: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    ipc: int | None = None,
    skip_bad_images: bool = False,
) -> ImageData:
    """Loads a data set.

    Args:
        spec: `digits`, `textures`; a folder: either `train/<class>/*` with `val/` or `test/`
            beside it, or `<class>/*`, split here with `seed`; a table of paths and labels (`.csv`,
            `.tsv`, `.parquet`); arrays (`.npz`); or `hf:FOLDER`, `hf:OWNER/NAME`, a Hugging Face
            data set. Settings of an input follow it (`photos.csv,label_column=breed`); they and
            the rules of each are in the modules of `otdd.distill.inputs`.
        resolution: side of the square images; needed when a folder holds several sizes.
        val_fraction: part of each class kept for testing where the data has no split.
        seed: seed of that split.
        ipc: images per class that will be asked for; a class with fewer is an error.
        skip_bad_images: leave out images that cannot be read, as if they were not there; they are
            in `skipped`, and told as a `DataWarning`.

    Raises:
        DataError: what cannot be used, with every offending file or class.
    """
    check_settings(spec, resolution, val_fraction)
    listing, split = open_listing(spec, resolution), (val_fraction, seed)
    read = [read_all(part.images, resolution) for part in listing.parts]
    bad = [{k: why for k, why in enumerate(part) if isinstance(why, str)} for part in read]
    images = [[image for image in part if isinstance(image, Tensor)] for part in read]
    everything = [image for part in images for image in part]
    sizes = size_problems({tuple(image.shape[1:]) for image in everything}, resolution)
    left, skipped = check(listing, bad, sizes, skip=skip_bad_images, ipc=ipc, split=split)
    channels = max(len(image) for image in everything)  # colour in any makes all of them colour
    train, test = (
        LabeledImages(
            torch.stack([images[number][k].expand(channels, -1, -1) for k in chosen]),
            left.parts[number].labels[chosen],
        )
        for number, chosen in left.divide(*split)
    )
    data = ImageData(listing.name, list(listing.classes), train, test, skipped=skipped)
    if ipc is not None:
        check_ipc(data, ipc)
    return data


def check_settings(
    spec: str | os.PathLike[str], resolution: int | None, val_fraction: float
) -> None:
    """Raises `DataError` for a resolution or a fraction that no data can have."""
    if resolution is not None and resolution < 1:
        raise DataError(f"resolution must be a positive integer, got {resolution}")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if spec in SIDES and resolution not in (None, SIDES[str(spec)]):
        side = SIDES[str(spec)]
        raise DataError(
            f"resolution={resolution} does not fit the built-in data {spec!r}, whose images are "
            f"{side}x{side}"
        )


def check_ipc(data: ImageData, ipc: int) -> None:
    """Raises `DataError` naming every class with fewer than `ipc` training images."""
    if ipc < 1:
        raise DataError(f"ipc must be at least 1, got {ipc}")
    counts = torch.bincount(data.train.labels, minlength=data.num_classes).tolist()
    short = [
        f"{name}: {n} training images"
        for name, n in zip(data.classes, counts, strict=True)
        if n < ipc
    ]
    if short:
        raise DataError(f"ipc={ipc} asks for more images per class than there are in", short)


def _histogram(images: Tensor) -> Tensor:
    return torch.stack(
        [torch.bincount(c.reshape(-1), minlength=256) for c in images.transpose(0, 1)]
    ).double()
