"""Pictures of distilled sets."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 48
GAP = 4
MAX_CLASSES = 20
MAX_IMAGES = 10
TITLES = {
    "otg": "OT-guided",
    "unguided": "unguided",
    "random": "random real",
    "kmeans": "k-means centroids",
    "kmeans-real": "k-means, nearest real",
}


def grid(sets: Mapping[str, tuple[Tensor, Tensor]], classes: Sequence[str]) -> bytes:
    """PNG with the images of every set: a block of rows per set, a column per class.

    Args:
        sets: name -> (images uint8 (N, C, H, W), labels (N,)).
        classes: class names; at most 20 classes and 10 images of each are shown.
    """
    columns = list(range(min(len(classes), MAX_CLASSES)))
    side = max(CELL, *(max(images.shape[-2:]) for images, _ in sets.values()))
    side = min(side, 128)
    rows = {
        name: min(MAX_IMAGES, max(int((labels == k).sum()) for k in columns))
        for name, (_, labels) in sets.items()
    }
    font = ImageFont.load_default(size=15)
    left, top, head = 175, 46, 8
    width = left + len(columns) * (side + GAP) + 12
    height = top + sum(n * (side + GAP) + 2 * head for n in rows.values()) + 8
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    for column in columns:
        text = _fit(classes[column], font, side)
        x = left + column * (side + GAP) + side / 2
        pen.text((x, top - 20), text, fill="#222222", font=font, anchor="mm")
    y = top
    for name, (images, labels) in sets.items():
        pen.line([(12, y), (width - 12, y)], fill="#cccccc")
        middle = y + head + rows[name] * (side + GAP) / 2
        title = _fit(TITLES.get(name, name), font, left - 24)
        pen.text((12, middle), title, fill="#222222", font=font, anchor="lm")
        for column in columns:
            for row, image in enumerate(images[labels == column][: rows[name]]):
                corner = (left + column * (side + GAP), y + head + row * (side + GAP))
                page.paste(_picture(image, side), corner)
        y += rows[name] * (side + GAP) + 2 * head
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()


def _picture(image: Tensor, side: int) -> Image.Image:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
    small = max(picture.size) < side
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return picture.resize((side, side), how)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
