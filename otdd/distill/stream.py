"""Training images read when they are asked for, in the order in which `load_data` holds them.

Of a million images memory holds their paths alone, some 0.6 KiB each at most. The headers of all
files are looked at first, so that what is wrong is told, with every name, before any work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from otdd.distill.data import check_settings
from otdd.distill.inputs.check import Skipped, check
from otdd.distill.inputs.listing import THREADS, Source, read_all
from otdd.distill.inputs.pictures import size_problems
from otdd.distill.inputs.problems import DataError
from otdd.distill.inputs.spec import BUILTIN, open_listing

_AT_ONCE = 4096  # images that wait for a thread, each a kilobyte or two


class Known(NamedTuple):
    """What was found out about images before: (C, H, W), and those that were left out."""

    image_shape: tuple[int, int, int]
    skipped: Skipped = ()


@dataclass(frozen=True)
class Stream:
    """Training images of a data set.

    Attributes:
        name: of the data set.
        classes: names, by label.
        labels: int64, (N,).
        image_shape: (C, H, W).
        source: the images.
        resolution: side that images are resized to, or None.
        where: what messages call the data.
        test: the test part, but for built-in data.
        skipped: images that were left out, and why.
    """

    name: str
    classes: list[str]
    labels: Tensor
    image_shape: tuple[int, int, int]
    source: Source
    resolution: int | None = None
    where: str = "data"
    test: Stream | None = None
    skipped: Skipped = ()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1, uint8 (n, C, H, W).

        Raises:
            DataError: naming every file that cannot be decoded.
        """
        return self._decode(range(start, stop))

    def take(self, indices: Tensor) -> Tensor:
        """Images at these indices (n,), in their order."""
        return self._decode(indices.tolist())

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))

    def _decode(self, indices: Sequence[int]) -> Tensor:
        read = read_all(self.source.select(indices), self.resolution)
        wrong = [
            f"{self.source.name(k)}: {r}"
            for k, r in zip(indices, read, strict=True)
            if isinstance(r, str)
        ]
        if wrong:
            raise DataError(f"{self.where} cannot be used:", wrong)
        images = [image for image in read if isinstance(image, Tensor)]
        return torch.stack([image.expand(self.image_shape) for image in images])

    def digest(self, start: int, stop: int) -> str:
        """SHA-256 that changes with images start..stop-1; see `Source.digest`."""
        return self.source.digest(start, stop)


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
    skip_bad_images: bool = False,
    decode_all: bool = False,
    known: Known | None = None,
) -> Stream:
    """The training images of `load_data` with the same arguments, one range at a time.

    Args:
        spec: as for `load_data`, as the next four.
        resolution: side of the images.
        val_fraction: part kept for testing where the data has no split.
        seed: of that split.
        skip_bad_images: leave out what cannot be read; every image is decoded once to find it.
        decode_all: decode every image once, to find those of which only the header is sound.
        known: of images that were looked at before; else every header is read.

    Raises:
        DataError: what cannot be used, with every file whose header says so.
    """
    check_settings(spec, resolution, val_fraction)
    listing, split = open_listing(spec, resolution), (val_fraction, seed)
    if known is None:
        whole = skip_bad_images or decode_all
        seen = [_look(part.images, resolution, whole=whole) for part in listing.parts]
        bad = [{k: h for k, h in enumerate(part) if isinstance(h, str)} for part in seen]
        headers = [h for part in seen for h in part if not isinstance(h, str)]
        sizes = {(height, width) for _, height, width in headers}
        side = (resolution, resolution) if resolution is not None else next(iter(sizes), (0, 0))
        problems = size_problems(sizes, resolution)
        left, skipped = check(listing, bad, problems, skip=skip_bad_images, split=split)
        shape = (max(c for c, _, _ in headers), *side)  # colour in any makes all of them colour
    else:
        gone = dict(known.skipped)
        bad = [_named(part.images, gone) if gone else {} for part in listing.parts]
        left, skipped = check(listing, bad, skip=True, split=split)
        shape = known.image_shape

    def stream(number: int, chosen: list[int], test: Stream | None = None) -> Stream:
        part = left.parts[number]
        source, labels = part.images.select(chosen), part.labels[chosen]
        about = left.name, left.classes, labels, shape
        return Stream(*about, source, resolution, left.where, test, skipped)

    train, test = left.divide(*split)
    return stream(*train, None if spec in BUILTIN else stream(*test))


def _named(source: Source, reasons: Mapping[str, str]) -> dict[int, str]:
    """Numbers of the images whose keys have a reason."""
    keys = ((k, source.key(k)) for k in range(len(source)))
    return {k: reasons[key] for k, key in keys if key in reasons}


def _look(
    source: Source, resolution: int | None, *, whole: bool
) -> list[tuple[int, int, int] | str]:
    """Channels, height and width of every image, or what is wrong with it."""

    def one(index: int) -> tuple[int, int, int] | str:
        header = source.header(index)
        if whole and not isinstance(header, str):
            made = source.decode(index, resolution)
            return made if isinstance(made, str) else header
        return header

    count = len(source)
    parts = (range(k, min(k + _AT_ONCE, count)) for k in range(0, count, _AT_ONCE))
    with ThreadPoolExecutor(THREADS) as pool:
        return [seen for part in parts for seen in pool.map(one, part)]
