"""Image folders: their files by class, in the order in which they become data, and decoding."""

from __future__ import annotations

import contextlib
import hashlib
import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from otdd.distill.config import printable

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# Of PIL's formats those that are pictures alone: others, whatever a file is called, run programs.
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
THREADS = min(8, os.cpu_count() or 1)
GREY = ("1", "L", "LA")


class DataError(ValueError):
    """Data that cannot be distilled; `problems` names every offending file or class."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        # Names of files may hold line ends and the control codes of terminals.
        message, *self.problems = map(printable, [message, *problems])
        super().__init__("\n  ".join([message, *self.problems]))


def open_image(path: Path) -> Image.Image:
    """An image file, its pixels not decoded yet.

    Raises:
        ValueError, OSError: it is no regular file (a pipe would never end), no image, or claims to
            be larger than any picture.
    """
    from PIL import Image

    if not path.is_file():
        raise ValueError("no regular file" if path.exists() else "link to nothing")
    return Image.open(path, formats=FORMATS)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """What PIL thinks of images that it reads is not for the terminal; around threads, not in them.

    Pictures of up to 179 million pixels are read; larger ones are errors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class FolderFiles:
    """Image files of a folder by class, in the order in which they become a data set."""

    classes: list[str]
    train: dict[str, list[Path]]
    test: dict[str, list[Path]] | None
    problems: list[str]

    @classmethod
    def of(cls, root: Path) -> FolderFiles:
        """Lists a folder; nothing is opened."""
        train_root = root / "train" if (root / "train").is_dir() else root
        test_root = next((root / n for n in ("val", "test") if (root / n).is_dir()), None)
        if train_root is root:
            test_root = None
        train = _class_files(train_root)
        test = _class_files(test_root) if test_root else None
        problems, parts = [], [(train_root, train)]
        if test_root is not None and test is not None:
            problems = _class_mismatch(train, test, test_root.name)
            parts.append((test_root, test))
        for part, files in parts:
            problems += [f"{part / name}: no image" for name, paths in files.items() if not paths]
        if test is None:
            problems += [
                f"{train_root / name}: one image cannot be split into train and test"
                for name, paths in train.items()
                if len(paths) == 1
            ]
        return cls(sorted(train), train, test, problems)

    def split(
        self, val_fraction: float, seed: int
    ) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        """Training and test files, split here if the folder is not."""
        if self.test is not None:
            return self.train, self.test
        return _split(self.train, val_fraction, seed)


def _class_files(root: Path) -> dict[str, list[Path]]:
    """Class name -> sorted image files; hidden names are skipped, links are followed."""
    found = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != "."):
        seen, files = set(), []
        for where, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(where)
            folders[:] = [] if real in seen else sorted(n for n in folders if n[0] != ".")
            if real not in seen:
                files += [Path(where, n) for n in names if n[0] != "."]
            seen.add(real)
        images = sorted(p for p in files if p.suffix.lower() in EXTENSIONS)
        name = unicodedata.normalize("NFC", folder.name)
        if name in found:
            raise DataError(f"{root} has two classes that are both written {name!r} (in Unicode)")
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            raise DataError(f"{root}: the class name {name!r} holds control codes or no text")
        found[name] = images
    if not found:
        raise DataError(f"{root} is empty: expected one folder of images per class, found none")
    if len(found) == 1:
        raise DataError(f"{root} has one class ({next(iter(found))}): at least two are needed")
    return found


def _class_mismatch(
    train: dict[str, list[Path]], test: dict[str, list[Path]], test_name: str
) -> list[str]:
    return [
        f"class {name!r} is in {'train' if name in train else test_name}/ only"
        for name in sorted(set(train) ^ set(test))
    ]


def size_problems(sizes: Set[tuple[int, ...]], resolution: int | None) -> list[str]:
    """What is wrong with images of these heights and widths if they are not resized."""
    if resolution is not None or (len(sizes) <= 1 and all(h == w for h, w in sizes)):
        return []
    some = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:4]) + ", ..." * (len(sizes) > 4)
    return [f"images of {len(sizes)} sizes ({some}): give --resolution (resolution=), e.g. 32"]


def decode(path: Path, resolution: int | None) -> Tensor | str:
    """One image as uint8 (C, H, W), C = 1 for grey; a text that says what is wrong otherwise."""
    from PIL import Image

    if not path.exists():
        return "link to a file that does not exist"
    try:
        with open_image(path) as file:
            if file.mode.startswith("I;16"):  # PIL would clip 16 bits, not scale them
                image = Image.fromarray((np.array(file) >> 8).astype(np.uint8))
            elif file.mode in ("I", "F"):
                return f"image of mode {file.mode}: save it with 8 or 16 bits a channel"
            else:
                image = file.convert("L" if file.mode in GREY else "RGB")
    except Exception as error:
        return f"unreadable image ({type(error).__name__}: {error})"
    if resolution is not None and image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        size = [max(resolution, round(side * scale)) for side in image.size]
        left, top = ((side - resolution) // 2 for side in size)
        image = image.resize(size, Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def _split(
    files: dict[str, list[Path]], val_fraction: float, seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, test = {}, {}
    for name, paths in files.items():
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        order = np.random.default_rng(int.from_bytes(key[:8], "little")).permutation(len(paths))
        held = min(max(1, round(val_fraction * len(paths))), len(paths) - 1)
        test[name] = [paths[i] for i in sorted(order[:held])]
        train[name] = [paths[i] for i in sorted(order[held:])]
    return train, test
