"""The store: one distilled data set and everything measured on it, as a folder.

A file appears in the store only when it is complete: it is written aside, flushed to the disk and
renamed. So a run that was stopped anywhere goes on from the files it finds, and what is there was
made by the settings in `otdd.json`, or the folder is refused. So it is when a file is not what was
written: `SHA256SUMS` has the hash of each.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otdd.distill import locks
from otdd.distill.pictures import picture_names, png
from otdd.distill.sums import (
    SUMS,
    InUseError,
    StoreError,
    Sums,
    WriteError,
    tensor_digest,
    unwritable,
)

if TYPE_CHECKING:
    import torch

__all__ = ["FORMAT", "LOCK", "MANIFEST", "TEMP", "Store", "StoreError", "png"]

MANIFEST = "otdd.json"
LOCK = ".otdd.lock"
TEMP = ".tmp-"
FORMAT = 1

_HIDDEN = (LOCK, TEMP)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_ACCESS = {errno.EROFS, errno.EACCES, errno.EPERM}


class Store:
    """Files of one run, by names relative to its folder.

    Args:
        path: the folder. `Store.open` checks it and makes it; the plain constructor only points.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self.sums = Sums(self.path, _HIDDEN)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], identity: Mapping[str, Any], *, lock: bool = False
    ) -> Store:
        """Open the folder of this run, or make it.

        Args:
            path: output folder.
            identity: what the results depend on; plain JSON values, of which the first is one
                that all folders of this kind have.
            lock: refuse while another process holds the lock; it ends with its holder.

        Raises:
            StoreError: the folder holds another run (the differing fields are named) or other
                files, is in use, holds files that are not what was written (all are named), or
                cannot be written.
        """
        store = cls(path)
        plain = store.check(identity)
        with store._writing(MANIFEST):
            store.path.mkdir(parents=True, exist_ok=True)
        try:
            if lock:
                store.lock()
                store._sweep()
            store.sums.verify()
            was = store.sums.known().get(MANIFEST, [])
            store.sums.keep()
            store._write_manifest(plain, was)
            store.tidy()
        except BaseException:
            store.close()
            raise
        return store

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse a folder that this run cannot use, touching nothing.

        Args:
            identity: as for `open`, or any part of it.

        Returns:
            `identity` as plain JSON values.
        """
        self.require_folder()
        plain: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        if self.has(MANIFEST):
            self.sums.verify([MANIFEST])
            self._compare(plain)
        elif self._foreign_files() and MANIFEST not in self.sums.known():
            raise StoreError(
                f"{self.path} is not empty and no otdd output (it holds "
                f"{self._foreign_files()[0]!r}); choose another --out"
            )
        return plain

    def require_folder(self) -> None:
        """Refuse a path that is, or lies in, what is no folder, touching nothing."""
        with self._writing(MANIFEST):
            there = next((p for p in (self.path, *self.path.parents) if p.exists()), self.path)
            if there.exists() and not there.is_dir():
                raise StoreError(f"{there} is a file; --out needs a folder")

    @property
    def identity(self) -> dict[str, Any]:
        """What the results in this folder depend on."""
        return dict(self.read_json(MANIFEST)["identity"])

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name is there, hence complete."""
        return (self.path / name).exists()

    def probe(self, target: str) -> None:
        """Refuse a folder in which this file cannot be written, before any work."""
        name = _temp_name(target)
        self.require_folder()
        with self._writing(name):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                _write_flushed(self.path / name, b"otdd")
            finally:
                (self.path / name).unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, keys in the order given."""
        self.write_bytes(name, _json(value))

    def read_json(self, name: str) -> Any:
        """Read a JSON file."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(name, error) from None

    def write_sealed(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Any) -> None:
        """Write a safetensors file that carries the hash of its content, for `read_sealed`."""
        sealed = {"meta": meta, "content_sha256": tensor_digest(tensors, meta)}
        self.write_tensors(name, tensors, sealed)

    def read_sealed(self, name: str) -> tuple[dict[str, torch.Tensor], Any]:
        """Tensors and JSON value of a file, checked by its hash if it carries one."""
        tensors, meta = self.read_tensors(name), self.read_meta(name)
        if not isinstance(meta, dict) or "content_sha256" not in meta:
            return tensors, meta
        if meta["content_sha256"] != tensor_digest(tensors, meta.get("meta")):
            raise self._damaged(name, ValueError("its content has another hash than it carries"))
        return tensors, meta["meta"]

    def write_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], meta: Any = None
    ) -> None:
        """Write a safetensors file; `meta` is any JSON value, read back by `read_meta`."""
        from safetensors.torch import save

        # One key only: the order of several is not fixed, and the bytes of a file must be.
        header = {"otdd": json.dumps(meta, sort_keys=True)} if meta is not None else None
        data = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        self.write_bytes(name, save(data, metadata=header))

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a safetensors file."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load((self.path / name).read_bytes())
        except (OSError, SafetensorError, ValueError) as error:
            raise self._damaged(name, error) from None

    def read_meta(self, name: str) -> Any:
        """The JSON value stored beside the tensors of a file, or None."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / name, framework="np") as file:
                header = file.metadata() or {}
            return json.loads(header["otdd"]) if "otdd" in header else None
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise self._damaged(name, error) from None

    def write_images(
        self, set_name: str, images: torch.Tensor, labels: torch.Tensor, **extra: torch.Tensor
    ) -> None:
        """Write a distilled set: PNG files for the eye and for ImageFolder, tensors for otdd.

        Args:
            set_name: name of the set.
            images: uint8, (K*IPC, C, H, W), class-major.
            labels: int64, (K*IPC,).
            **extra: further tensors of the set, such as `latents`.
        """
        folder = f"sets/{set_name}"
        self._write_pngs(f"{folder}/images", images, labels)
        tensors = {"images": images, "labels": labels, **extra}
        self.write_tensors(f"{folder}/images.safetensors", tensors)

    def read_images(self, set_name: str) -> dict[str, torch.Tensor]:
        """Tensors of a distilled set: `images`, `labels` and what was stored with them."""
        return self.read_tensors(f"sets/{set_name}/images.safetensors")

    def restore_pictures(self, set_name: str) -> None:
        """Write the PNG files of a finished set again if one of them is missing."""
        tensors = self.read_images(set_name)
        folder = f"sets/{set_name}/images"
        if not all(self.has(f"{folder}/{name}") for name in picture_names(tensors["labels"])):
            self._write_pngs(folder, tensors["images"], tensors["labels"])

    def has_images(self, set_name: str) -> bool:
        """Whether the images of a set are finished."""
        return self.has(f"sets/{set_name}/images.safetensors")

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file aside, flush it to the disk, and give it its name."""
        target = self.path / name
        with self._writing(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            temp = target.parent / _temp_name(target.name)
            try:
                _write_flushed(temp, data)
                if name != SUMS:
                    self.sums.note({name: hashlib.sha256(data).hexdigest()})
                os.replace(temp, target)
                _flush_folder(target.parent)
            finally:
                temp.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file or folder, if it is there."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def sweep(self, *names: str) -> None:
        """Remove what interrupted writes of these files left; only under a lock of them."""
        for name in names:
            for path in self.path.glob(_temp_start(name) + "*"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Put the list of hashes in order, and give the lock back."""
        with contextlib.suppress(StoreError, OSError):  # as after a kill, notes need no order
            self.tidy()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self.sums.end_part()
        self.close()

    def tidy(self) -> None:
        """Put the list of hashes in order: every file that is there, once."""
        data = self.sums.tidied()
        if data is not None:
            self.write_bytes(SUMS, data)
            self.sums.end_parts()

    def _write_manifest(self, plain: Mapping[str, Any], was: Sequence[str]) -> None:
        """Add an identity to the manifest; one that was lost comes back as it was, or not at all.

        Args:
            plain: the identity.
            was: hashes of the manifest that was there.
        """
        known = self.identity if self.has(MANIFEST) else {}
        if {**known, **plain} == known:
            return
        made = _json({"format": FORMAT, "identity": {**known, **plain}})
        if was and not self.has(MANIFEST) and hashlib.sha256(made).hexdigest() not in was:
            raise StoreError(
                f"{self.path / MANIFEST} is missing, and was not of this run; put it back or "
                "choose another --out"
            )
        self.write_bytes(MANIFEST, made)

    def _write_pngs(self, name: str, images: torch.Tensor, labels: torch.Tensor) -> None:
        target, digests = self.path / name, {}
        with self._writing(name):
            temp = target.parent / _temp_name()
            try:
                for image, picture in zip(images, picture_names(labels), strict=True):
                    data = png(image)
                    (temp / picture).parent.mkdir(parents=True, exist_ok=True)
                    _write_flushed(temp / picture, data)
                    digests[f"{name}/{picture}"] = hashlib.sha256(data).hexdigest()
                self.sums.note(digests)
                # The tensors, written next, are what marks the set as finished: pictures that
                # are already here come from a process that had no time for them.
                shutil.rmtree(target, ignore_errors=True)
                with contextlib.suppress(FileExistsError):
                    os.rename(temp, target)
                _flush_folder(target.parent)
            except OSError as error:
                # Another process finished the same pictures first.
                if error.errno != errno.ENOTEMPTY:
                    raise
            finally:
                shutil.rmtree(temp, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = self.path / name
            if error.errno in _NO_SPACE:
                raise WriteError(
                    f"no space left while writing {where}; everything finished before is kept: "
                    "free some space and start the same command again"
                ) from error
            if error.errno in _NO_ACCESS:
                raise WriteError(
                    f"cannot write {where} ({error.strerror}); everything finished before is kept"
                ) from error
            said = f"cannot write {where}: {error.strerror or error}"
            raise unwritable(error)(said) from error

    def _damaged(self, name: str, error: Exception) -> StoreError:
        path = self.path / name
        if isinstance(error, FileNotFoundError):
            return StoreError(f"{path} is missing")
        return StoreError(f"{path} cannot be read ({error}); delete it and start again")

    def _foreign_files(self) -> list[str]:
        names = os.listdir(self.path) if self.path.is_dir() else []
        found = sorted(n for n in names if not n.startswith(_HIDDEN))
        begun = found == [SUMS] and not (self.path / SUMS).read_bytes().strip()
        return [] if begun else found

    def _compare(self, identity: Mapping[str, Any]) -> None:
        manifest = self.read_json(MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise StoreError(f"{self.path / MANIFEST} was not written by this version of otdd")
        old, kind = manifest["identity"], next(iter(identity), None)
        if kind is not None and kind not in old:
            raise StoreError(
                f"{self.path} is of another otdd command (no {kind} in its {MANIFEST}); choose "
                "another --out"
            )
        keys = [k for k in identity if k in old and old[k] != identity[k]]
        if keys:
            what = "; ".join(f"{k}: {old[k]!r} there, {identity[k]!r} here" for k in keys)
            raise StoreError(f"{self.path} holds another run ({what}); choose another --out")

    def lock(self) -> None:
        """Take the lock of the folder.

        Raises:
            StoreError: another process holds it, which is told.
        """
        try:
            with self._writing(LOCK):
                self._lock = locks.acquire(self.path / LOCK)
        except locks.Held as holder:
            raise InUseError(
                f"{self.path} is in use by another otdd process ({holder}); wait for it"
            ) from None

    def _sweep(self) -> None:
        """Remove what interrupted processes left; only with the lock held."""
        if self._lock is None:
            return
        for path in list(self.path.rglob(TEMP + "*")):
            self.remove(str(path.relative_to(self.path)))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _temp_name(name: str = "") -> str:
    return f"{_temp_start(name)}{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _temp_start(name: str) -> str:
    """How unfinished files of a name begin; long names are not repeated whole."""
    return f"{TEMP}{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}-"


def _write_flushed(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot flush folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
