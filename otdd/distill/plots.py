"""Pictures of distilled sets."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from otdd.distill.config import TITLES

CELL = 48
GAP = 4
MAX_CLASSES = 20
MAX_IMAGES = 10
SIZES = (14, 13, 12, 11, 10, 9)  # of letters, in pixels


def grid(
    sets: Mapping[str, tuple[Tensor, Tensor]], classes: Sequence[str], *, scale: int = 1
) -> bytes:
    """PNG with the images of every set: a block of rows per set, a column per class.

    Args:
        sets: name -> (images uint8 (N, C, H, W), labels (N,)).
        classes: class names; at most 20 classes and 10 images of each are shown.
        scale: pixels of the page to a side of one; 2 for print.
    """
    columns = list(range(min(len(classes), MAX_CLASSES)))
    side = max(CELL, *(max(images.shape[-2:]) for images, _ in sets.values()))
    side, gap, edge = min(side, 128) * scale, GAP * scale, 12 * scale
    rows = {
        name: min(MAX_IMAGES, max(int((labels == k).sum()) for k in columns))
        for name, (_, labels) in sets.items()
    }
    left, top, head = 175 * scale, 46 * scale, 8 * scale
    width = left + len(columns) * (side + gap) + edge
    height = top + sum(n * (side + gap) + 2 * head for n in rows.values()) + head
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    for column in columns:
        text, font = _fit(shown_name(classes[column], column), side, scale)
        x = left + column * (side + gap) + side / 2
        pen.text((x, top - 20 * scale), text, fill="#222222", font=font, anchor="mm")
    y = top
    for name, (images, labels) in sets.items():
        pen.line([(edge, y), (width - edge, y)], fill="#cccccc", width=scale)
        middle = y + head + rows[name] * (side + gap) / 2
        title, font = _fit(TITLES.get(name, name), left - 2 * edge, scale)
        pen.text((edge, middle), title, fill="#222222", font=font, anchor="lm")
        for column in columns:
            for row, image in enumerate(images[labels == column][: rows[name]]):
                corner = (left + column * (side + gap), y + head + row * (side + gap))
                page.paste(_picture(image, side), corner)
        y += rows[name] * (side + gap) + 2 * head
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()


def shown_name(name: str, label: int) -> str:
    """The name of a class on one line, or its number where the font lacks a letter of it."""
    flat = " ".join(name.split())
    drawn = flat.isprintable() and all(ord(c) in _letters() for c in flat)
    return flat if drawn else f"class {label}"


def _font() -> str:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font has no accents."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(_font()).get_charmap())


def _picture(image: Tensor, side: int) -> Image.Image:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
    small = max(picture.size) < side
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return picture.resize((side, side), how)


def _fit(text: str, width: float, scale: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A text and its font, so small that it fits; cut where the smallest is too large."""
    for size in SIZES:
        font = ImageFont.truetype(_font(), size * scale)
        if font.getlength(text) <= width:
            return text, font
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…", font


def strip(images: Tensor, side: int = 96) -> bytes:
    """PNG with images uint8 (N, C, H, W) one under the other, transparent between them.

    Small ones are enlarged a whole number of times, large ones reduced to `side`.
    """
    longest = max(images.shape[-2:])
    side = longest * max(1, CELL // longest) if longest < side else side
    page = Image.new("RGBA", (side, len(images) * (side + GAP) - GAP))
    for number, image in enumerate(images):
        page.paste(_picture(image, side), (0, number * (side + GAP)))
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()
