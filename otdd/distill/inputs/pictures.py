"""One image file to pixels, or to a text that says what is wrong with it.

What is accepted: PNG, JPEG, BMP, PPM/PGM, TIFF, WebP and GIF of one frame (of a JPEG with several
pictures, as some cameras write, the first). EXIF orientation is applied. CMYK and palettes become
RGB without colour management; transparency is dropped, as torchvision's ImageFolder does; 16-bit
grey keeps its upper 8 bits. Refused: several frames or pages, 32-bit modes, and more pixels than
Pillow takes for a decompression bomb.
"""

from __future__ import annotations

import io
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# Of these alone: Pillow would run Ghostscript for a PostScript file that is called .png.
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"),
)
GREY = ("1", "L", "LA")
ORIENTATION = 0x0112  # tag of EXIF


def decode(source: Path | bytes, resolution: int | None) -> Tensor | str:
    """One image as uint8 (C, H, W), C = 1 for grey; a text that says what is wrong otherwise."""
    from PIL import Image

    if problem := _absent(source):
        return problem
    try:
        with _handle(source) as handle, Image.open(handle, formats=FORMATS) as file:
            if problem := _unfit(file):
                return problem
            file.load()
            turned = _upright(file)
            if file.mode.startswith("I;16"):  # PIL would clip 16 bits, not scale them
                image = Image.fromarray((np.array(turned) >> 8).astype(np.uint8))
            else:
                image = turned.convert("L" if file.mode in GREY else "RGB")
            return pixels(image, resolution)
    except Exception as error:
        return _unreadable(error)


def header(source: Path | bytes) -> tuple[int, int, int] | str:
    """Channels, height and width of an image that is not decoded, or what is wrong with it."""
    from PIL import Image

    if problem := _absent(source):
        return problem
    try:
        with _handle(source) as handle, Image.open(handle, formats=FORMATS) as file:
            if problem := _unfit(file):
                return problem
            grey = file.mode in GREY or file.mode.startswith("I;16")
            sides = file.height, file.width
            if _orientation(file) >= 5 and file.format != "TIFF":  # Pillow turns these itself
                sides = sides[::-1]
            return 1 if grey else 3, *sides
    except Exception as error:
        return _unreadable(error)


def pixels(image: Image.Image, resolution: int | None) -> Tensor:
    """A grey or RGB picture as uint8 (C, H, W): its shorter side resized, then its centre cut."""
    from PIL import Image

    if resolution is not None and image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        size = [max(resolution, round(side * scale)) for side in image.size]
        left, top = ((side - resolution) // 2 for side in size)
        image = image.resize(size, Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + resolution, top + resolution))
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def size_problems(sizes: Set[tuple[int, ...]], resolution: int | None) -> list[str]:
    """What is wrong with images of these heights and widths if they are not resized."""
    if resolution is not None or (len(sizes) <= 1 and all(h == w for h, w in sizes)):
        return []
    some = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:4]) + ", ..." * (len(sizes) > 4)
    what = f"of {len(sizes)} sizes" if len(sizes) > 1 else "that are not square"
    return [f"images {what} ({some}): give --resolution (resolution=), e.g. 32"]


def _handle(source: Path | bytes) -> BinaryIO:
    # Not by its name: Pillow would map a plain TIFF in the shape that it has once it is turned.
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _absent(source: Path | bytes) -> str | None:
    if isinstance(source, bytes):
        return None if source else "empty (0 bytes)"
    if source.is_symlink() and not source.exists():
        return "link to a file that does not exist"
    if not source.exists():
        return "no such file"
    if not source.is_file():  # opening a pipe would wait for ever
        return "not a file"
    return None if source.stat().st_size else "empty (0 bytes)"


def _unfit(file: Image.Image) -> str | None:
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":
        return f"{frames} frames or pages: save one of them as an image"
    if file.mode in ("I", "F"):
        return f"image of mode {file.mode}: save it as PNG or TIFF of 8 or 16 bits a channel"
    return None


def _unreadable(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"unreadable image (none of {', '.join(FORMATS)})"
    return f"unreadable image ({type(error).__name__}: {error})"


def _orientation(file: Image.Image) -> int:
    try:
        return int(file.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not spoil the picture
        return 1


def _upright(file: Image.Image) -> Image.Image:
    from PIL import Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    wanted = turns.get(_orientation(file))
    return file if wanted is None else file.transpose(wanted)
