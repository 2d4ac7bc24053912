"""Arrays of a `.npz` file, read without pickle.

| training part | test part, or else | labels |
|---|---|---|
| `images`, `labels` | `test_images`, `test_labels` | `classes`: names by label, optional |
| `train_images`, `train_labels` (MedMNIST) | the same, or `val_images`, `val_labels` | |
| `x_train`, `y_train` (Keras) | `x_test`, `y_test` | |

Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3: uint8, or floats in [0, 1],
which are rounded to 256 levels. Labels are integers or texts, (N,) or (N, 1). Without `classes` the
names are the labels, in the order of the numbers or of the texts.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otdd.distill.inputs.labels import name_labels
from otdd.distill.inputs.listing import Arrays, Listing, Part
from otdd.distill.inputs.problems import DataError

TRAIN = (("images", "labels"), ("train_images", "train_labels"), ("x_train", "y_train"))
TEST = (("test_images", "test_labels"), ("x_test", "y_test"), ("val_images", "val_labels"))
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def list_arrays(file: Path) -> Listing:
    """Reads the arrays of a file, after all headers have been checked.

    Raises:
        DataError: what cannot be used, before anything is allocated.
    """
    where = f"data {file}"
    try:
        with zipfile.ZipFile(file) as archive:
            keys = _check_headers(archive, where)
        pairs = _pairs(keys, where)
        wanted = [key for pair in pairs for key in pair] + ["classes"] * ("classes" in keys)
        with np.load(file, allow_pickle=False) as loaded:
            arrays = {key: loaded[f"{key}.npy"] for key in wanted}
    except DataError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{where} cannot be read ({error}); expected an .npz file") from None
    classes = _classes(arrays.get("classes"), where)
    labels = [_labels(arrays[name], name, where) for _, name in pairs]
    images = [_images(arrays[name], name, where) for name, _ in pairs]
    for (image, label), pixels, values in zip(pairs, images, labels, strict=True):
        if len(pixels) != len(values):
            raise DataError(f"{where}: {len(pixels)} {image}, but {len(values)} {label}")
    named = name_labels(labels, classes)
    parts = [
        Part(Arrays(pixels, f"{file}: {name}"), numbers)
        for (name, _), pixels, numbers in zip(pairs, images, named.labels, strict=True)
    ]
    return Listing(
        where=where,
        name=file.stem,
        classes=named.classes,
        train=parts[0],
        test=parts[1] if len(parts) > 1 else None,
        test_name=pairs[-1][0],
        problems=named.problems,
        notes=named.notes,
    )


def _check_headers(archive: zipfile.ZipFile, where: str) -> list[str]:
    """Names of the arrays, whose headers promise what is there and fits into memory."""
    keys, total, problems = [], 0, []
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        key = info.filename.removesuffix(".npy")
        keys.append(key)
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            if version not in HEADERS:
                problems.append(f"{key}: version {version} of the format is not read")
                continue
            shape, _, dtype = HEADERS[version](file)
            start = file.tell()
        size = dtype.itemsize
        for side in shape:
            size *= side  # of Python: a product of NumPy could wrap around
        if dtype.hasobject:
            problems.append(f"{key}: an array of objects needs pickle, which is never read")
        elif start + size != info.file_size:
            promised = f"its header says {size} bytes ({shape}, {dtype})"
            problems.append(f"{key}: {promised}, the file has {info.file_size - start}")
        total += size
    if total > memory() // 2:
        room = f"{memory() / 2**30:.1f} GiB of memory"
        problems.append(f"{total / 2**30:.1f} GiB of arrays are too much for {room}; save files")
    if problems:
        raise DataError(f"{where} cannot be used:", problems)
    return keys


def memory() -> int:
    """Bytes of memory of this machine, or 32 GiB where that is unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**35


def _pairs(keys: list[str], where: str) -> list[tuple[str, str]]:
    """Keys of images and labels, of the training part and of the test part if there is one."""
    found = [pair for pair in TRAIN if pair[0] in keys]
    if len(found) != 1:
        accepted = " or ".join(" and ".join(pair) for pair in found or TRAIN)
        raise DataError(f"{where}: one of {accepted} is needed; there are {', '.join(keys)}")
    tests = [pair for pair in TEST if pair[0] in keys]
    pairs = [found[0], *tests[:1]]
    missing = [label for _, label in pairs if label not in keys]
    if missing:
        raise DataError(f"{where}: {', '.join(missing)} missing; there are {', '.join(keys)}")
    return pairs


def _classes(names: np.ndarray | None, where: str) -> list[str] | None:
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(f"{where}: classes must be a list of texts, got {_about(names)}")
    return [n.decode() if isinstance(n, bytes) else n for n in names.tolist()]


def _labels(values: np.ndarray, name: str, where: str) -> list[Any]:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iuUS":
        raise DataError(
            f"{where}: {name} must be integers or texts of shape (N,) or (N, 1), "
            f"got {_about(values)}"
        )
    return [v.decode() if isinstance(v, bytes) else v for v in values.tolist()]


def _images(values: np.ndarray, name: str, where: str) -> Tensor:
    """Images as uint8 (N, C, H, W)."""
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4:
        first, last = values.shape[1] in (1, 3), values.shape[3] in (1, 3)
        if first and last:
            raise DataError(
                f"{where}: {name} of {values.shape} could be (N, C, H, W) or (N, H, W, C); "
                "give images with other sides than 1 or 3"
            )
        values = values.transpose(0, 3, 1, 2) if last else values
    if values.ndim != 4 or values.shape[1] not in (1, 3) or 0 in values.shape:
        raise DataError(
            f"{where}: {name} must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, "
            f"got {_about(values)}"
        )
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):
            raise DataError(
                f"{where}: {name} are floats from {low:g} to {high:g}; accepted: [0, 1], or uint8"
            )
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise DataError(f"{where}: {name} must be uint8 or floats in [0, 1], got {_about(values)}")
    return torch.from_numpy(np.ascontiguousarray(values))


def _about(values: np.ndarray) -> str:
    return f"{values.dtype} of shape {values.shape}"
