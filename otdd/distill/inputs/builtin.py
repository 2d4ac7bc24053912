"""Data that comes with scikit-learn and scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otdd.distill.inputs.listing import Arrays, Listing, Part
from otdd.distill.inputs.problems import DataError

# PNG only: decoded to the same bytes by every version of every decoder.
TEXTURES = ("brick", "chelsea", "coffee", "coins", "grass", "gravel", "ihc", "motorcycle_left")
SIDES = {"digits": 8, "textures": 32}


def digits() -> Listing:
    """Handwritten digits, 8x8: 1297 to train and 500 to test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.RandomState(0).permutation(len(raw.target))
    pixels = np.rint(raw.images[order] * (255 / 16)).astype(np.uint8)[:, None]
    images, labels = torch.from_numpy(pixels), torch.from_numpy(raw.target[order]).long()
    train, test = slice(1297), slice(1297, None)
    return _listing("digits", list(map(str, range(10))), images, labels, train, test)


def textures() -> Listing:
    """Patches of eight pictures, 32x32: of their left to train and of their right to test."""
    try:
        import skimage.data
        from PIL import Image
    except ImportError as error:
        raise DataError(f"data 'textures' needs scikit-image: {error}") from error
    folder = Path(skimage.data.__file__).parent
    missing = [f"{name}.png" for name in TEXTURES if not (folder / f"{name}.png").is_file()]
    if missing:
        raise DataError(f"this scikit-image does not bundle, in {folder}:", missing)
    train, test = [], []
    for name in TEXTURES:
        with Image.open(folder / f"{name}.png") as file:
            picture = torch.from_numpy(np.array(file.convert("L")))
        border = int(picture.shape[1] * 0.6)  # no pixel in both
        train.append(_patches(picture[:, :border], stride=8, count=400))
        test.append(_patches(picture[:, border:], stride=16, count=60))
    counts = torch.tensor([len(patches) for patches in (*train, *test)])
    labels = torch.arange(len(TEXTURES)).repeat(2).repeat_interleave(counts)
    border = sum(map(len, train))
    parts = slice(border), slice(border, None)
    return _listing("textures", list(TEXTURES), torch.cat([*train, *test]), labels, *parts)


def _listing(
    name: str, classes: list[str], images: Tensor, labels: Tensor, train: slice, test: slice
) -> Listing:
    first, second = (Part(Arrays(images[part], name), labels[part]) for part in (train, test))
    return Listing(f"data {name!r}", name, classes, first, second)


def _patches(picture: Tensor, stride: int, count: int) -> Tensor:
    side = SIDES["textures"]
    tiles = picture.unfold(0, side, stride).unfold(1, side, stride)
    tiles = tiles.reshape(-1, 1, side, side)
    keep = torch.linspace(0, len(tiles) - 1, min(count, len(tiles))).round().long()
    return tiles[keep].contiguous()
