"""Training images read when they are asked for, in the order in which `load_data` holds them.

Memory does not grow with the data: a million images are a list of paths. The headers of all files
are looked at first, so that what is wrong is told, with every name, before any work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from otdd.distill.data import BUILTIN, check_folder, load_data
from otdd.distill.folders import (
    GREY,
    THREADS,
    DataError,
    FolderFiles,
    decode,
    open_image,
    size_problems,
    without_warnings,
)


@dataclass(frozen=True)
class Stream:
    """Training images of a data set.

    Attributes:
        name: of the data set.
        classes: names, by label.
        labels: int64, (N,).
        image_shape: (C, H, W).
        resolution: side that images are resized to, or None.
        files: of the images, in order; empty if `images` holds them.
        images: uint8 (N, C, H, W) of a built-in data set.
        root: folder of the files.
        test: the test part of a folder.
    """

    name: str
    classes: list[str]
    labels: Tensor
    image_shape: tuple[int, int, int]
    resolution: int | None = None
    files: Sequence[Path] = ()
    images: Tensor | None = None
    root: Path = field(default_factory=Path)
    test: Stream | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1, uint8 (n, C, H, W).

        Raises:
            DataError: naming every file that cannot be decoded.
        """
        if self.images is not None:
            return self.images[start:stop]
        return self._decode(self.files[start:stop])

    def take(self, indices: Tensor) -> Tensor:
        """Images at these indices (n,), in their order."""
        if self.images is not None:
            return self.images[indices]
        return self._decode([self.files[k] for k in indices.tolist()])

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))

    def _decode(self, paths: Sequence[Path]) -> Tensor:
        with without_warnings(), ThreadPoolExecutor(THREADS) as pool:
            read = list(pool.map(lambda path: decode(path, self.resolution), paths))
        wrong = [f"{p}: {r}" for p, r in zip(paths, read, strict=True) if isinstance(r, str)]
        if wrong:
            raise DataError(f"data folder {self.root} cannot be used:", wrong)
        images = [image for image in read if isinstance(image, Tensor)]
        return torch.stack([image.expand(self.image_shape) for image in images])

    def digest(self, start: int, stop: int) -> str:
        """SHA-256 over names and sizes of files, or over the images themselves."""
        if self.images is not None:
            return pixel_digest(self.images[start:stop])
        names = [
            [os.path.relpath(path, self.root), path.stat().st_size]
            for path in self.files[start:stop]
        ]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()


class StreamedImages:
    """Images of a stream in place of a tensor (N, C, H, W): read whenever they are indexed."""

    dtype = torch.uint8

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.shape = torch.Size((len(stream), *stream.image_shape))

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, key: slice | Tensor) -> Tensor:
        """Images of a range without steps, at indices (n,), or under a mask (N,)."""
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            return self.stream.read(start, stop)
        return self.stream.take(key.nonzero()[:, 0] if key.dtype == torch.bool else key)


def open_stream(
    spec: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    image_shape: tuple[int, int, int] | None = None,
) -> Stream:
    """The training images of `load_data` with the same arguments, one range at a time.

    Args:
        spec: as for `load_data`, as the next three.
        resolution: side of the images.
        val_fraction: part kept for testing where a folder has no split.
        seed: of that split.
        image_shape: (C, H, W) of images that were looked at before; else every header is read.

    Raises:
        DataError: what cannot be used, with every file whose header says so.
    """
    if spec in BUILTIN:
        data = load_data(spec, resolution=resolution)
        shape = data.image_shape
        return Stream(data.name, data.classes, data.train.labels, shape, images=data.train.images)
    root = check_folder(spec)
    listed = FolderFiles.of(root)
    problems = list(listed.problems)
    if image_shape is None:
        parts = [listed.train, listed.test or {}]  # colour in any file makes all of them colour
        everything = [path for part in parts for paths in part.values() for path in paths]
        channels, size, wrong = _headers(everything, resolution)
        image_shape, problems = (channels, *size), problems + wrong
    if problems:
        raise DataError(f"data folder {root} cannot be used:", problems)
    made: Stream | None = None
    for part in reversed(listed.split(val_fraction, seed)):
        files = [path for name in listed.classes for path in part[name]]
        counts = torch.tensor([len(part[name]) for name in listed.classes])
        labels = torch.arange(len(counts)).repeat_interleave(counts)
        name, classes = root.resolve().name, listed.classes
        made = Stream(name, classes, labels, image_shape, resolution, files, root=root, test=made)
    assert made is not None  # a split has two parts
    return made


def pixel_digest(images: Tensor) -> str:
    """SHA-256 over uint8 images (n, C, H, W)."""
    return hashlib.sha256(images.contiguous().numpy().data.cast("B")).hexdigest()


def _headers(
    paths: Sequence[Path], resolution: int | None
) -> tuple[int, tuple[int, int], list[str]]:
    """Channels and size of the images, and what is wrong with them."""
    with without_warnings(), ThreadPoolExecutor(THREADS) as pool:
        seen = list(pool.map(_header, paths))
    problems = [f"{p}: {h}" for p, h in zip(paths, seen, strict=True) if isinstance(h, str)]
    headers = [h for h in seen if not isinstance(h, str)]
    sizes = {(height, width) for _, height, width in headers}
    problems += size_problems(sizes, resolution)
    channels = max((c for c, _, _ in headers), default=1)
    side = (resolution, resolution) if resolution is not None else next(iter(sizes), (0, 0))
    return channels, side, problems


def _header(path: Path) -> tuple[int, int, int] | str:
    if not path.exists():
        return "link to a file that does not exist"
    try:
        with open_image(path) as file:
            grey = file.mode in GREY or file.mode.startswith("I;16")
            return 1 if grey else 3, file.height, file.width
    except Exception as error:
        return f"unreadable image ({type(error).__name__}: {error})"
