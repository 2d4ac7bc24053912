"""Images as PNG files: how they are encoded, and what they are called."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def png(image: Tensor) -> bytes:
    """One image, uint8 (C, H, W) with 1 or 3 channels, as a PNG file."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def picture_names(labels: Tensor) -> Iterator[str]:
    """Names of the PNG files of a set, by label and number within the class."""
    seen: dict[int, int] = {}
    for label in labels.tolist():
        seen[label] = seen.get(label, -1) + 1
        yield f"{label:05d}/{seen[label]:05d}.png"
