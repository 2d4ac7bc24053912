"""Formats of an exported set that need nothing beyond NumPy, PyTorch and Pillow.

Each function writes what is its own into the new folder; `otdd.json` is written beside it. The
names of classes are content of files and never part of a path.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otdd.distill.artefact import DistilledSet
from otdd.distill.pictures import png
from otdd.distill.store import Store

SHARD_IMAGES, SHARD_BYTES = 10_000, 256 * 2**20


def imagefolder(target: Store, loaded: DistilledSet, manifest: dict[str, Any]) -> None:
    """`00000/00000.png` by class, as every ImageFolder; written for all folders of pictures."""


def npz(target: Store, loaded: DistilledSet, manifest: dict[str, Any]) -> None:
    """`data.npz`: arrays that `numpy.load` reads without pickle.

    images uint8 (N, C, H, W), labels int64 (N,), classes (K,) of text, mean and std float64 (C,)
    of the real images in [0, 1], and soft_labels float32 (N, K), mean logits, where there are any.
    """
    arrays: dict[str, Any] = {
        "images": loaded.images.numpy(),
        "labels": loaded.labels.numpy(),
        "classes": np.array(loaded.classes, dtype=np.str_),
        "mean": np.array(loaded.mean),
        "std": np.array(loaded.std),
    }
    if loaded.soft_labels is not None:
        arrays["soft_labels"] = loaded.soft_labels.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    target.write_bytes("data.npz", buffer.getvalue())


def ddranking(target: Store, loaded: DistilledSet, manifest: dict[str, Any]) -> None:
    """Tensors for the evaluators of DD-Ranking.

    `images.pt` float32 (N, C, H, W), normalised with the mean and deviation of the real images, as
    its own loaders do; `labels.pt` float32 (N, K), mean logits (its losses take the softmax), where
    there are soft labels; `hard_labels.pt` int64 (N,).
    """
    tensors = {"images": loaded.normalise(loaded.images), "hard_labels": loaded.labels}
    if loaded.soft_labels is not None:
        tensors["labels"] = loaded.soft_labels
    for name, tensor in tensors.items():
        buffer = io.BytesIO()
        torch.save(tensor.clone(), buffer)
        target.write_bytes(f"{name}.pt", buffer.getvalue())


def webdataset(target: Store, loaded: DistilledSet, manifest: dict[str, Any]) -> None:
    """`train-000000.tar` and so on: `.png`, `.cls` and `.json`, and `.logits.npy` of an image."""
    number, pending = 0, _Tar()
    for (label, index, data), logits in zip(pictures(loaded), _rows(loaded), strict=True):
        if pending.full:
            target.write_bytes(f"train-{number:06d}.tar", pending.close())
            number, pending = number + 1, _Tar()
        key = f"{label:05d}_{index:05d}"
        about = {"label": label, "class": loaded.classes[label], "set": loaded.name}
        pending.add(f"{key}.cls", str(label).encode())
        pending.add(f"{key}.json", json.dumps(about, ensure_ascii=False).encode())
        if logits is not None:
            buffer = io.BytesIO()
            np.save(buffer, logits.numpy())
            pending.add(f"{key}.logits.npy", buffer.getvalue())
        pending.add(f"{key}.png", data)
        pending.images += 1
    target.write_bytes(f"train-{number:06d}.tar", pending.close())


def pictures(loaded: DistilledSet) -> Iterator[tuple[int, int, bytes]]:
    """Label, number within the class, and PNG of every image."""
    seen: dict[int, int] = {}
    for image, label in zip(loaded.images, loaded.labels.tolist(), strict=True):
        seen[label] = seen.get(label, -1) + 1
        yield label, seen[label], png(image)


def _rows(loaded: DistilledSet) -> Iterator[Tensor | None]:
    soft = loaded.soft_labels
    yield from (soft if soft is not None else [None] * len(loaded))


class _Tar:
    """A tar file in memory; the same members give the same bytes."""

    def __init__(self) -> None:
        self._buffer, self.images = io.BytesIO(), 0
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT)

    @property
    def full(self) -> bool:
        return self.images >= SHARD_IMAGES or self._buffer.tell() >= SHARD_BYTES

    def add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()
