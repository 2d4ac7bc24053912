"""Training images read when they are asked for, in the order in which `load_data` holds them.

Memory does not grow with the data: a million images are a list of paths. The headers of all files
are looked at first, so that what is wrong is told, with every name, before any work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from otdd.distill.data import BUILTIN, check_folder, load_data
from otdd.distill.folders import GREY, THREADS, DataError, FolderFiles, decode, size_problems


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
    """

    name: str
    classes: list[str]
    labels: Tensor
    image_shape: tuple[int, int, int]
    resolution: int | None = None
    files: Sequence[Path] = ()
    images: Tensor | None = None
    root: Path = field(default_factory=Path)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1, uint8 (n, C, H, W).

        Raises:
            DataError: naming every file that cannot be decoded.
        """
        if self.images is not None:
            return self.images[start:stop]
        paths = self.files[start:stop]
        with ThreadPoolExecutor(THREADS) as pool:
            read = list(pool.map(lambda path: decode(path, self.resolution), paths))
        wrong = [f"{p}: {r}" for p, r in zip(paths, read, strict=True) if isinstance(r, str)]
        if wrong:
            raise DataError(f"data folder {self.root} cannot be used:", wrong)
        return torch.stack([image.expand(self.image_shape) for image in read])

    def digest(self, start: int, stop: int) -> str:
        """SHA-256 over names and sizes of files, or over the images themselves."""
        if self.images is not None:
            return pixel_digest(self.images[start:stop])
        names = [
            [os.path.relpath(path, self.root), path.stat().st_size]
            for path in self.files[start:stop]
        ]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def open_stream(
    spec: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Stream:
    """The training images of `load_data` with the same arguments, one range at a time.

    Raises:
        DataError: what cannot be used, with every file whose header says so.
    """
    if spec in BUILTIN:
        data = load_data(spec, resolution=resolution)
        shape = data.image_shape
        return Stream(data.name, data.classes, data.train.labels, shape, images=data.train.images)
    root = check_folder(spec)
    listed = FolderFiles.of(root)
    parts = [listed.train, listed.test or {}]  # colour in any file makes all of them colour
    everything = [path for part in parts for paths in part.values() for path in paths]
    channels, size, problems = _headers(everything, resolution)
    if listed.problems or problems:
        raise DataError(f"data folder {root} cannot be used:", listed.problems + problems)
    train, _ = listed.split(val_fraction, seed)
    files = [path for name in listed.classes for path in train[name]]
    counts = torch.tensor([len(train[name]) for name in listed.classes])
    return Stream(
        root.resolve().name,
        listed.classes,
        torch.arange(len(counts)).repeat_interleave(counts),
        (channels, *size),
        resolution,
        files,
        root=root,
    )


def pixel_digest(images: Tensor) -> str:
    """SHA-256 over uint8 images (n, C, H, W)."""
    return hashlib.sha256(memoryview(images.contiguous().numpy()).cast("B")).hexdigest()


def _headers(
    paths: Sequence[Path], resolution: int | None
) -> tuple[int, tuple[int, int], list[str]]:
    """Channels and size of the images, and what is wrong with them."""
    with ThreadPoolExecutor(THREADS) as pool:
        seen = list(pool.map(_header, paths))
    problems = [f"{p}: {h}" for p, h in zip(paths, seen, strict=True) if isinstance(h, str)]
    headers = [h for h in seen if not isinstance(h, str)]
    sizes = {(height, width) for _, height, width in headers}
    problems += size_problems(sizes, resolution)
    channels = max((c for c, _, _ in headers), default=1)
    side = (resolution, resolution) if resolution is not None else next(iter(sizes), (0, 0))
    return channels, side, problems


def _header(path: Path) -> tuple[int, int, int] | str:
    from PIL import Image

    if not path.exists():
        return "link to a file that does not exist"
    try:
        with Image.open(path) as file:
            grey = file.mode in GREY or file.mode.startswith("I;16")
            return 1 if grey else 3, file.height, file.width
    except Exception as error:
        return f"unreadable image ({type(error).__name__}: {error})"
