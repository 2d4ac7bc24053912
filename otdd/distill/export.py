"""Export: one finished set in the formats of others, as a new folder that is there whole or not."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from otdd import __version__
from otdd.distill.artefact import DistilledSet, load
from otdd.distill.config import require
from otdd.distill.inputs.spec import published
from otdd.distill.setfiles import CONFIG, EXPORTED, LAYOUTS
from otdd.distill.store import LOCK, MANIFEST, TEMP, Store, StoreError
from otdd.distill.sums import unwritable

METRICS = "metrics.json"
# Format -> its module, which has a function of this name, and where class folders are, if any.
FORMATS = {
    "hf": ("hf", "images"),
    "imagefolder": ("formats", "root"),
    "npz": ("formats", None),
    "webdataset": ("formats", None),
    "ddranking": ("formats", None),
}
_PATHS = ("generator", "latents", "surrogate", "sample.influence.surrogate")


def export(
    folder: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    set: str | None = None,
    license: str | None = None,
) -> DistilledSet:
    """Write one set into a new folder.

    Args:
        folder: of a run, or made by an earlier export to `hf` or `imagefolder`.
        to: `hf` (a Hugging Face data set that explains itself), `imagefolder` (of torchvision),
            `npz` (NumPy arrays), `webdataset` (tar files) or `ddranking` (tensors of DD-Ranking).
        out: the new folder; an empty one is accepted.
        set: name of the set; by default `otg`, or the one of an exported folder.
        license: licence that the card of `hf` and `otdd.json` name, as the Hub spells it; by
            default that of an exported folder, or `unknown`.

    Returns:
        The set that was written.

    Raises:
        StoreError: the set cannot be read, or `out` not written; nothing is left of it then.
    """
    require(to in FORMATS, "to", to, f"one of {', '.join(FORMATS)}")
    plain = license is None or (license != "" and license.isprintable())
    require(plain, "license", license, "a licence such as cc-by-4.0")
    loaded = load(folder, set=set)
    module, layout = FORMATS[to]
    write = getattr(importlib.import_module(f"otdd.distill.{module}"), to)
    with new_folder(out) as target:
        manifest = _manifest(loaded, to, layout, license)
        manifest["labels"] = _write_labels(target, loaded) if layout else []
        if layout:
            _write_pictures(target, loaded, layout)
            target.write_json("classes.json", loaded.classes)
        write(target, loaded, manifest)
        target.write_json(MANIFEST, manifest)
    return loaded


@contextlib.contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Store]:
    """A folder written aside, which gets its name when the block ends without an error."""
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "not empty" if path.is_dir() else "a file"
        raise StoreError(f"{path} is {what}; --out needs a new or an empty folder")
    path = path.resolve()
    # One name for all processes: a second one is refused, and what a kill left is used again.
    store = Store(path.parent / f"{TEMP}{hashlib.sha256(path.name.encode()).hexdigest()[:16]}")
    mine = False
    try:
        store.path.mkdir(parents=True, exist_ok=True)
        store.lock()
        mine = True
        for name in os.listdir(store.path):
            if name != LOCK:
                store.remove(name)
        store.sums.keep()
        yield store
        store.tidy()
        store.remove(LOCK)
        os.replace(store.path, path)
    except (OSError, StoreError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or cause
        raise unwritable(cause)(f"cannot write {out} ({reason}); nothing is left of it") from error
    finally:
        if mine:
            shutil.rmtree(store.path, ignore_errors=True)
        store.close()


def without_paths(value: Any, key: str = "") -> Any:
    """Settings as they may be published: of files and folders only their names."""
    if isinstance(value, Mapping):
        return {k: without_paths(v, k) for k, v in value.items() if k != "out"}
    if isinstance(value, list):
        return [without_paths(v, key) for v in value]
    if isinstance(value, str) and key == "data":
        return published(value)
    if isinstance(value, str) and key in _PATHS:
        return _base(value)
    if isinstance(value, str) and "=" in value and key in ("teachers", "relabel.teachers", "name"):
        arch, file = value.split("=", 1)
        return f"{arch}={_base(file)}"
    return value


def _base(path: str) -> str:
    return PureWindowsPath(path).name or path  # knows both kinds of slashes


def _manifest(
    loaded: DistilledSet, to: str, layout: str | None, license: str | None
) -> dict[str, Any]:
    store, old = loaded.files.store, loaded.files.manifest
    if not loaded.files.exported:
        metrics = store.read_json(METRICS) if store.has(METRICS) else {}
        old = {
            "config": store.read_json(CONFIG),
            "identity": old["identity"],
            "versions": metrics.get("versions", {}),
            "timings": metrics.get("timings", {}),
        }
    kept = {k: old.get(k, {}) for k in ("config", "identity", "versions", "timings")}
    counts = torch.bincount(loaded.labels, minlength=len(loaded.classes)).tolist()
    return {
        "format": EXPORTED if layout else f"otdd-{to}-1",
        "set": loaded.name,
        "license": license or old.get("license", "unknown"),
        "data": {k: v for k, v in loaded.files.data.items() if k != "skipped"},  # names of files
        "counts": counts,
        "layout": layout,
        "epochs": loaded.files.epochs,
        **without_paths(kept),
        "exported_with": __version__,
    }


def _write_labels(target: Store, loaded: DistilledSet) -> list[str]:
    """Copies soft labels and augmentation, one shard in memory at a time; returns the files."""
    if not loaded.has_soft_labels:
        return []
    loaded.epochs  # noqa: B018 - refuses labels that are not complete
    shards, names = loaded.files.labels, []
    for number, shard in enumerate(shards):
        name = f"labels-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "labels"
        meta = loaded.files.store.read_meta(shard)
        meta["teachers"] = [[without_paths(n, "name"), digest] for n, digest in meta["teachers"]]
        names.append(f"{name}.safetensors")
        target.write_tensors(names[-1], loaded.files.store.read_tensors(shard), meta)
    return names


def _write_pictures(target: Store, loaded: DistilledSet, layout: str) -> None:
    from otdd.distill.formats import pictures

    for label, index, data in pictures(loaded):
        target.write_bytes(f"{LAYOUTS[layout]}{label:05d}/{index:05d}.png", data)
