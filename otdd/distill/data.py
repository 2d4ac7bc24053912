"""Real images to distil: two bundled data sets and any ImageFolder, checked before any work.

Everything is held as uint8 tensors in memory. A folder is read completely first, so that every
offending file or class is named in one `DataError` and nothing has been done yet.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otdd.distill.folders import (
    THREADS,
    DataError,
    FolderFiles,
    decode,
    size_problems,
    without_warnings,
)

__all__ = ["BUILTIN", "DataError", "ImageData", "LabeledImages", "check_ipc", "load_data"]

BUILTIN = ("digits", "textures")
# PNG only: decoded to the same bytes by every version of every decoder.
TEXTURES = ("brick", "chelsea", "coffee", "coins", "grass", "gravel", "ihc", "motorcycle_left")
TEXTURE_SIZE = 32


@dataclass(frozen=True)
class LabeledImages:
    """Images uint8 (N, C, H, W) with labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

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
    """A data set: `classes[k]` names label k; `facts` are gathered here unless they are known."""

    name: str
    classes: list[str]
    train: LabeledImages
    test: LabeledImages
    facts: Facts | None = field(default=None, repr=False)
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
) -> ImageData:
    """Loads a data set.

    Args:
        spec: `digits`, `textures`, or a folder: either `train/<class>/*` with `val/` or `test/`
            beside it, or `<class>/*`, split here with `seed`.
        resolution: side of the square images; needed when a folder holds several sizes.
        val_fraction: part of each class kept for testing where the folder has no split.
        seed: seed of that split.
        ipc: images per class that will be asked for; a class with fewer is an error.

    Raises:
        DataError: what cannot be used, with every offending file or class.
    """
    if resolution is not None and resolution < 1:
        raise DataError(f"resolution must be a positive integer, got {resolution}")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if spec in BUILTIN:
        if resolution not in (None, 8 if spec == "digits" else TEXTURE_SIZE):
            raise DataError(f"resolution={resolution} does not fit the built-in data {spec!r}")
        data = _digits() if spec == "digits" else _textures()
    else:
        data = _folder(Path(spec), resolution, val_fraction, seed, ipc)
    if ipc is not None:
        check_ipc(data, ipc)
    return data


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


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.RandomState(0).permutation(len(raw.target))
    pixels = np.rint(raw.images[order] * (255 / 16)).astype(np.uint8)[:, None]
    images, labels = torch.from_numpy(pixels), torch.from_numpy(raw.target[order]).long()
    train, test = (LabeledImages(images[s], labels[s]) for s in (slice(1297), slice(1297, None)))
    return ImageData("digits", [str(k) for k in range(10)], train, test)


def _textures() -> ImageData:
    try:
        import skimage.data
        from PIL import Image
    except ImportError as error:
        raise DataError(f"data 'textures' needs scikit-image: {error}") from error
    folder = Path(skimage.data.__file__).parent
    missing = [f"{name}.png" for name in TEXTURES if not (folder / f"{name}.png").is_file()]
    if missing:
        raise DataError(f"this scikit-image does not bundle, in {folder}:", missing)
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for name in TEXTURES:
        with Image.open(folder / f"{name}.png") as file:
            picture = torch.from_numpy(np.array(file.convert("L")))
        border = int(picture.shape[1] * 0.6)  # left: train, right: test, no pixel in both
        parts["train"].append(_patches(picture[:, :border], stride=8, count=400))
        parts["test"].append(_patches(picture[:, border:], stride=16, count=60))
    train, test = (_stack(parts[part]) for part in ("train", "test"))
    return ImageData("textures", list(TEXTURES), train, test)


def _patches(picture: Tensor, stride: int, count: int) -> Tensor:
    tiles = picture.unfold(0, TEXTURE_SIZE, stride).unfold(1, TEXTURE_SIZE, stride)
    tiles = tiles.reshape(-1, 1, TEXTURE_SIZE, TEXTURE_SIZE)
    keep = torch.linspace(0, len(tiles) - 1, min(count, len(tiles))).round().long()
    return tiles[keep].contiguous()


def _stack(per_class: Sequence[Tensor]) -> LabeledImages:
    counts = torch.tensor([len(images) for images in per_class])
    return LabeledImages(
        torch.cat(list(per_class)), torch.arange(len(counts)).repeat_interleave(counts)
    )


def _folder(
    root: Path, resolution: int | None, val_fraction: float, seed: int, ipc: int | None
) -> ImageData:
    files = FolderFiles.of(check_folder(root))
    images, unreadable = _read(files.train, files.test or {}, resolution)
    parts = files.split(val_fraction, seed)
    if files.problems or unreadable:
        left = {name: sum(p in images for p in paths) for name, paths in parts[0].items()}
        short = [
            f"class {name!r}: {n} readable training images, fewer than ipc={ipc}"
            for name, n in left.items()
            if ipc is not None and n < ipc
        ]
        raise DataError(f"data folder {root} cannot be used:", files.problems + unreadable + short)
    train, test = (
        _stack([torch.stack([images[path] for path in part[name]]) for name in files.classes])
        for part in parts
    )
    return ImageData(root.resolve().name, files.classes, train, test)


def check_folder(spec: str | os.PathLike[str]) -> Path:
    """The folder of a data set that is not built in."""
    root = Path(spec)
    if not root.is_dir():
        accepted = ", ".join(repr(name) for name in BUILTIN)
        raise DataError(f"data {str(root)!r} is no folder; accepted: {accepted} or an image folder")
    return root


def _read(
    train: dict[str, list[Path]], test: dict[str, list[Path]], resolution: int | None
) -> tuple[dict[Path, Tensor], list[str]]:
    """Decodes every file; returns the images that could be read and what is wrong with the rest."""
    paths = [p for files in (train, test) for per_class in files.values() for p in per_class]
    with without_warnings(), ThreadPoolExecutor(THREADS) as pool:
        read = dict(zip(paths, pool.map(lambda p: decode(p, resolution), paths), strict=True))
    problems = [f"{path}: {image}" for path, image in read.items() if isinstance(image, str)]
    images = {path: image for path, image in read.items() if isinstance(image, Tensor)}
    if any(image.shape[0] == 3 for image in images.values()):
        images = {path: image.expand(3, -1, -1) for path, image in images.items()}
    sizes = {tuple(image.shape[1:]) for image in images.values()}
    return images, problems + size_problems(sizes, resolution)
