"""Where the files of a finished set are: in the folder of a run, or in an exported one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otdd.distill.store import FORMAT, MANIFEST, Store, StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from otdd.distill.data import ImageData

DATA = "data.json"
CONFIG = "config.json"
TEACHERS = "teachers.json"
EXPORTED = "otdd-set-1"  # the `format` of an exported folder
DEFAULT = "otg"
LAYOUTS = {"images": "images/", "root": ""}  # where the class folders of an export are
# What the identity of other folders of otdd has, and the command that makes them.
_OTHERS = {"latents": "otdd encode", "surrogate": "otdd fit-surrogate"}
_LABELS = re.compile(r"labels(-\d{5}-of-\d{5})?\.safetensors")


def describe(data: ImageData) -> dict[str, Any]:
    """What a set takes over from the data it was distilled from, as plain values."""
    skipped = [{"image": image, "problem": why} for image, why in data.skipped]
    return {
        "name": data.name,
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "sha256": data.fingerprint,
        **({"skipped": skipped} if skipped else {}),
    }


@dataclass(frozen=True)
class SetFiles:
    """One set of a folder.

    Attributes:
        store: the folder.
        name: of the set.
        data: as made by `describe`.
        labels: files of soft labels, in the order of their epochs.
        epochs: that the soft labels have when they are complete.
        manifest: content of `otdd.json`.
        exported: whether `otdd export` made the folder.
        live: whether the run stores no soft labels but the teachers who make them.
    """

    store: Store
    name: str
    data: dict[str, Any]
    labels: tuple[str, ...]
    epochs: int
    manifest: dict[str, Any]
    exported: bool
    live: bool = False

    @classmethod
    def find(
        cls, path: str | os.PathLike[str], name: str | None = None, *, verify: bool = True
    ) -> SetFiles:
        """Find a set.

        Args:
            path: folder of a run, or made by `otdd export`.
            name: of the set; by default `otg`, or the one of an exported folder.
            verify: compare the files that say what is there with their hashes.

        Raises:
            StoreError: no such folder, none of otdd's, or the set is not in it.
        """
        store = Store(path)
        if not store.path.exists():
            raise StoreError(f"{store.path}: no such folder")
        if not store.path.is_dir() or not store.has(MANIFEST):
            raise StoreError(f"{store.path} is no otdd folder: there is no {MANIFEST} in it")
        store = Store(store.path.absolute())  # labels are read later, wherever the process is then
        if verify:
            store.sums.verify([MANIFEST, DATA, CONFIG])
        manifest = store.read_json(MANIFEST)
        if not isinstance(manifest, dict):
            raise StoreError(f"{store.path / MANIFEST} was not written by otdd")
        if manifest.get("format") == EXPORTED:
            return _of_export(store, manifest, name)
        if other := re.fullmatch(r"otdd-([a-z]+)-1", str(manifest.get("format"))):
            raise StoreError(
                f"{store.path} is an export to {other[1]}; otdd reads the folders of runs and "
                "exports to hf and imagefolder"
            )
        if manifest.get("format") != FORMAT:
            raise StoreError(
                f"{store.path / MANIFEST} was not written by this version of otdd, or not by otdd"
            )
        return _of_run(store, manifest, name or DEFAULT)

    def content(self) -> list[str]:
        """Names of the files that `read` takes the images from."""
        if not self.exported:
            return [f"sets/{self.name}/images.safetensors"]
        return [name for _, name in _png_names(self.manifest)]

    def read(self) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, C, H, W) and labels int64 (N,), class-major."""
        if self.exported:
            return _read_pngs(self.store, self.manifest)
        tensors = self.store.read_images(self.name)
        images, labels = tensors["images"], tensors["labels"]
        expected = [len(labels), *self.data["image_shape"]]
        if list(images.shape) != expected or not bool((labels.diff() >= 0).all()):
            raise StoreError(
                f"{self.store.path}: set {self.name} has images of shape {list(images.shape)}, "
                f"expected {expected} in the order of the classes"
            )
        return images, labels


def require_run(store: Store, manifest: dict[str, Any]) -> None:
    """Refuse a folder that another command of otdd made.

    Raises:
        StoreError: it holds latents, or a surrogate.
    """
    identity = manifest.get("identity")
    for kind, command in _OTHERS.items():
        if isinstance(identity, dict) and kind in identity:
            raise StoreError(f"{store.path} is of `{command}`, no folder of a run")


def _of_run(store: Store, manifest: dict[str, Any], name: str) -> SetFiles:
    require_run(store, manifest)
    folder = store.path / "sets"
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    there = [n for n in there if store.has_images(n)]
    if name not in there:
        known = ", ".join(there) or "none yet; run `otdd sample` first"
        raise StoreError(f"{store.path} has no set {name!r}; there: {known}")
    if not store.has(DATA):
        raise StoreError(
            f"{store.path / DATA} is missing: a version of otdd before this one made the folder; "
            f"`otdd evaluate --out {store.path}` adds it"
        )
    labels: list[str] = []
    while store.has(file := f"sets/{name}/labels/{len(labels):05d}.safetensors"):
        labels.append(file)
    data = store.read_json(DATA)
    try:
        config = store.read_json(CONFIG)
        epochs = int(config["train"]["epochs"])
        epochs = min(epochs, int(config["relabel"].get("label_epochs") or epochs))
        live = not config["relabel"].get("store_labels", True)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise StoreError(f"{store.path / CONFIG} was not written by otdd") from None
    if not _described(data):
        raise StoreError(f"{store.path / DATA} was not written by otdd")
    live = live and not labels and store.has(TEACHERS)
    return SetFiles(store, name, data, tuple(labels), epochs, manifest, exported=False, live=live)


def _of_export(store: Store, manifest: dict[str, Any], name: str | None) -> SetFiles:
    if not _well_formed(manifest):
        raise StoreError(f"{store.path / MANIFEST} is damaged; export the set again")
    there, data, labels = manifest["set"], manifest["data"], manifest["labels"]
    if name not in (None, there):
        raise StoreError(f"{store.path} has no set {name!r}; there: {there}")
    epochs = manifest["epochs"]
    return SetFiles(store, there, data, tuple(labels), epochs, manifest, exported=True)


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether an `otdd.json`, perhaps of a stranger, is one that `otdd export` writes."""
    try:
        data, counts = manifest["data"], manifest["counts"]
        texts = [manifest["set"], *manifest["labels"]]
        return (
            _described(data)
            and data["image_shape"][0] in (1, 3)
            and manifest["layout"] in LAYOUTS
            and all(type(n) is int and n >= 0 for n in [*counts, manifest["epochs"]])
            and all(type(text) is str for text in texts)
            and all(_LABELS.fullmatch(file) for file in manifest["labels"])
            and len(counts) == len(data["classes"])
            and sum(counts) > 0
        )
    except (KeyError, TypeError):
        return False


def _described(data: Any) -> bool:
    """Whether this, perhaps of a stranger, is what `describe` makes."""
    try:
        shape, moments = data["image_shape"], [data["mean"], data["std"]]
        return (
            all(type(text) is str for text in [data["name"], *data["classes"]])
            and all(type(n) is int and n >= 0 for n in shape)
            and len(shape) == 3
            and all(type(v) is float for values in moments for v in values)
            and all(len(values) == shape[0] for values in moments)
        )
    except (KeyError, TypeError):
        return False


def _png_names(manifest: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Label and file of every image of an exported set."""
    for label, count in enumerate(manifest["counts"]):
        for index in range(count):
            yield label, f"{LAYOUTS[manifest['layout']]}{label:05d}/{index:05d}.png"


def _read_pngs(store: Store, manifest: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    import numpy as np
    import torch
    from PIL import Image

    channels, height, width = manifest["data"]["image_shape"]
    mode = "L" if channels == 1 else "RGB"
    images, labels = [], []
    for label, name in _png_names(manifest):
        path = store.path / name
        try:
            with Image.open(path, formats=("PNG",)) as file:
                if file.size != (width, height) or file.mode != mode:
                    raise StoreError(
                        f"{path} is {file.width}x{file.height}, {file.mode}; the set has "
                        f"images of {width}x{height}, {mode}"
                    )
                pixels = np.array(file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise StoreError(f"{path} cannot be read ({error}); export the set again") from None
        images.append(torch.from_numpy(pixels.reshape(height, width, channels)))
        labels.append(label)
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
