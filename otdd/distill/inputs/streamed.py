"""Rows of a Hugging Face data set that are streamed: read once, resized, and kept at that size.

The pixels of a split lie in one mapped file in the cache of `datasets`, under the hash that this
library gives to the files behind them, so that they are read again when those have changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from otdd.distill.inputs import pictures
from otdd.distill.inputs.listing import THREADS, Source
from otdd.distill.inputs.problems import DataError

CHUNK = 64  # rows decoded at once
VERSION = 1  # of the files that are kept
REMOTE = re.compile(r"(zip://[^:]*::)?hf://datasets/([^@]+)@[^:]*")


@dataclass(frozen=True)
class Kept:
    """Images of one split as they were kept.

    Attributes:
        pixels: uint8, of all images one after the other; mapped.
        starts: where each row begins, and the end.
        channels: of every row; 0 where there is no image.
        problems: row -> what is wrong with its image.
        where: what messages call the split.
        split: its name.
        resolution: side of the images.
        numbers: rows of the images.
    """

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    starts: Sequence[int]
    channels: Sequence[int]
    problems: dict[int, str]
    where: str
    split: str
    resolution: int
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"{self.where}, {self.key(index)}"

    def key(self, index: int) -> str:
        return f"{self.split}[{self.numbers[index]}]"

    def decode(self, index: int, resolution: int | None) -> Tensor | str:
        row = self.numbers[index]
        if row in self.problems:
            return self.problems[row]
        content = np.array(self.pixels[self.starts[row] : self.starts[row + 1]])
        return torch.from_numpy(content).view(-1, self.resolution, self.resolution)

    def header(self, index: int) -> tuple[int, int, int] | str:
        row = self.numbers[index]
        return self.problems.get(row) or (self.channels[row], self.resolution, self.resolution)

    def select(self, indices: Sequence[int]) -> Kept:
        return replace(self, numbers=[self.numbers[k] for k in indices])

    def digest(self, start: int, stop: int) -> str:
        """Of the pixels that are kept."""
        digest = hashlib.sha256()
        for row in self.numbers[start:stop]:
            content = self.pixels[self.starts[row] : self.starts[row + 1]].tobytes()
            digest.update(hashlib.sha256(content or self.problems[row].encode()).digest())
        return digest.hexdigest()


class Read(NamedTuple):
    """Images of a split, their labels as given, and what its owner should know."""

    source: Source
    labels: list[Any]
    notes: list[str]


@dataclass(frozen=True)
class Streamed:
    """Splits of a data set that are read row by row.

    Attributes:
        tables: name -> `datasets.IterableDataset`.
        where: what messages call the data.
        name: OWNER/NAME on the Hub, or None for a local folder.
        roots: folders in which files of images may be.
        cache: folder for what is kept.
        resolution: side of the images.
        limit: most rows of a split, or None.
    """

    tables: dict[str, Any]
    where: str
    name: str | None
    roots: tuple[Path, ...]
    cache: Path
    resolution: int
    limit: int | None

    def hidden(self, split: str, label: str) -> bool:
        """Whether the labels of a split are withheld; its first row tells."""
        first = self._next(iter(self._rows(split, [label], 1)), split, 0)
        return bool(first) and first[0][label] == -1

    def read(self, split: str, image: str, label: str) -> Read:
        """The images of a split, read unless they are kept already, and their labels.

        Raises:
            DataError: they cannot be read to the end, or not be kept.
        """
        from PIL import __version__ as pillow

        about = [VERSION, pillow, split, image, label, self.resolution, self.limit]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        files = [self.cache / f"{key}.{kind}" for kind in ("pixels", "json")]
        index, notes = _index(*files), []
        if index is None:
            index = self._keep(split, image, label, files)
            count, size = len(index["labels"]), math.ceil(index["bytes"] / 2**20)
            notes = [f"{count} rows of {split} are kept in {self.cache}, {size} MiB"]
        channels = index["channels"]
        starts = np.cumsum([0, *channels], dtype=np.int64) * self.resolution**2
        pixels = np.memmap(files[0], np.uint8, "r") if starts[-1] else np.empty(0, np.uint8)
        problems = {int(row): text for row, text in index["problems"].items()}
        numbers = range(len(channels))
        about_rows = starts.tolist(), channels, problems
        source = Kept(pixels, *about_rows, self.where, split, self.resolution, numbers)
        return Read(source, labelled(index["labels"], self.where), notes)

    def _keep(self, split: str, image: str, label: str, files: Sequence[Path]) -> dict[str, Any]:
        """One pass over a split; returns what is known of its images."""
        rows = undecoded(self._rows(split, [image, label], self.limit), image, self.where)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with _aside(files) as (pixels, listed):
                self._write(rows, split, image, label, pixels, listed)
                index = dict(json.loads(listed.read_text(encoding="utf-8")))
        except OSError as error:
            why = error.strerror or error
            raise DataError(f"{self.where}: cannot keep images in {self.cache} ({why})") from None
        return index

    def _rows(self, split: str, columns: list[str], limit: int | None) -> Any:
        rows = self.tables[split].select_columns(columns)
        return rows if limit is None else rows.take(limit)

    def _write(
        self, rows: Any, split: str, image: str, label: str, pixels: Path, listed: Path
    ) -> None:
        """Pixels as they come, then the labels and what is wrong."""
        labels: list[Any] = []
        channels: list[int] = []
        problems: dict[int, str] = {}

        def one(row: dict[str, Any]) -> Tensor | str:
            found = self._content(row[image])
            return found if isinstance(found, str) else pictures.decode(found, self.resolution)

        with (
            open(pixels, "wb") as file,
            ThreadPoolExecutor(THREADS) as pool,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # Pillow's, of large pictures; see `read_all`
            for chunk in self._chunks(rows, split):
                for row, made in zip(chunk, pool.map(one, chunk), strict=True):
                    if isinstance(made, str):
                        problems[len(labels)] = made
                    else:
                        file.write(made.contiguous().numpy().data)
                    channels.append(0 if isinstance(made, str) else len(made))
                    labels.append(row[label])
        index: dict[str, Any] = {"labels": labels, "channels": channels, "problems": problems}
        index["bytes"] = sum(channels) * self.resolution**2
        listed.write_text(json.dumps(index), encoding="utf-8")

    def _chunks(self, rows: Any, split: str) -> Iterator[list[dict[str, Any]]]:
        from datasets.utils import tqdm

        bar = tqdm(rows, desc=split, unit=" images", disable=self.name is None or None)
        coming, done = iter(bar), 0
        while chunk := self._next(coming, split, done):
            yield chunk
            done += len(chunk)

    def _next(self, coming: Iterator[dict[str, Any]], split: str, done: int) -> list[Any]:
        try:
            return list(islice(coming, CHUNK))
        except Exception as error:  # of the network, of pyarrow, of the library
            problem = " ".join(str(error).split()) or type(error).__name__
            text = f"{self.where}: reading {split} stopped after {done} rows: {problem}"
            raise DataError(text) from None

    def _content(self, value: Any) -> bytes | Path | str:
        """The bytes of an image, its file, or what is wrong with it."""
        found = content(value, self.roots)
        if self.name is None or not isinstance(found, Refused):
            return found
        url = value["path"]
        match = REMOTE.fullmatch(url)
        if not match or match[2] != self.name or ".." in url.split("/"):
            return found
        import fsspec

        try:
            with fsspec.open(url, "rb") as file:
                return bytes(file.read())
        except Exception as error:  # not of the image, which must not be taken for a bad one
            raise DataError(f"{self.where}: {url} cannot be read ({error})") from None


def _index(pixels: Path, listed: Path) -> dict[str, Any] | None:
    """What is known of kept images, or None if they are not there whole."""
    try:
        found = json.loads(listed.read_text(encoding="utf-8"))
        whole = pixels.stat().st_size == found["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(found) if whole else None


@contextlib.contextmanager
def _aside(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Names to write under; those that are wanted are given in order at the end."""
    mine = [file.with_name(f"{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}") for file in files]
    try:
        yield mine
        for name, file in zip(mine, files, strict=True):
            os.replace(name, file)
    finally:
        for name in mine:
            name.unlink(missing_ok=True)


class Refused(str):
    """Why a file that a table names is not opened."""


def content(value: Any, roots: Sequence[Path]) -> bytes | Path | str:
    """The bytes of an image or its file, if it is in one of these folders; or what is wrong."""
    if not value or (value["bytes"] is None and not value["path"]):
        return "no image"
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    path = Path(value["path"])
    real = Path(os.path.realpath(path))
    # A table made by someone else may name any file of this machine.
    if not any(real.is_relative_to(root) for root in roots):
        return Refused(f"names the file {value['path']}, outside of the data set")
    return path


def undecoded(rows: Any, image: str, where: str) -> Any:
    """The rows with the column of the images as bytes and paths."""
    import datasets

    try:
        return rows.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # those of pyarrow are among them
        problem = " ".join(str(error).split())
        raise DataError(f"{where}: column {image} holds no images ({problem})") from None


def labelled(values: list[Any], where: str) -> list[Any]:
    """The labels of all rows.

    Raises:
        DataError: naming every row that has none.
    """
    empty = [f"row {k}: no label" for k, value in enumerate(values) if value is None]
    if empty:
        raise DataError(f"{where} cannot be used:", empty)
    return values
