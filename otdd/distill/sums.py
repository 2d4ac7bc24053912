"""SHA256SUMS: the hash of every file of a folder, in the format that `sha256sum -c` reads.

A hash is noted before its file gets its name, so no finished file is without one. A process that
is killed in between leaves two hashes of a name, and the file may have either.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SUMS = "SHA256SUMS"
PART = ".sums-"  # lists of processes that do not hold the lock of the folder
# Files without a hash, of earlier versions, that get one.
ADOPTED = (".safetensors", ".json", ".png", ".csv", ".parquet")
SHOWN = 5  # files that an error names
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class StoreError(RuntimeError):
    """The output folder cannot be used, or cannot be written."""


class InUseError(StoreError):
    """Another process works on the output."""


class WriteError(StoreError):
    """The output cannot be written: the disk is full, or does not allow it."""


# What no space and no right would help with.
_NO_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}


def unwritable(error: OSError) -> type[StoreError]:
    """The kind of `StoreError` that says that an output cannot be, or cannot be written now."""
    return StoreError if error.errno in _NO_PATH else WriteError


class Sums:
    """The hashes of a folder.

    Args:
        folder: whose files they are of.
        hidden: beginnings of names that do not count, as of locks and unfinished files.
    """

    def __init__(self, folder: Path, hidden: tuple[str, ...]) -> None:
        self.folder, self._hidden = folder, (*hidden, PART)
        self._list: Path | None = None

    def keep(self, part: str | None = None) -> None:
        """Note what is written from now on, in the list or in one `part` beside it."""
        self._list = self.folder / (SUMS if part is None else f"{PART}{part}")

    def note(self, digests: Mapping[str, str]) -> None:
        """Name -> hash, on the disk when this returns; nothing unless a list is kept."""
        if self._list is None:
            return
        # The empty line ends what a full disk may have cut short before.
        data = b"\n" + _lines(digests)
        handle = os.open(self._list, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(handle, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)

    def known(self) -> dict[str, list[str]]:
        """Hashes noted of every name, the latest last; lines that were cut short are left out."""
        found: dict[str, list[str]] = {}
        for path in [*sorted(self.folder.glob(PART + "*")), self.folder / SUMS]:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise StoreError(f"{path} cannot be read ({error}); delete it") from None
            for parts in map(_LINE.fullmatch, lines):
                if parts is not None:
                    found.setdefault(parts[2], []).append(parts[1])
        return found

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Refuse files that are not what was written.

        Files without a hash, as folders of earlier versions have them, are not refused.

        Args:
            names: those to look at, all that are there by default.

        Raises:
            StoreError: naming the files that were damaged or changed.
        """
        known = self.known()
        looked_at = self._files() if names is None else [n for n in names if self._has(n)]
        wrong = [n for n in looked_at if n in known and self._digest(n) not in known[n]]
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" * (len(wrong) > SHOWN)
            raise StoreError(
                f"{self.folder}: damaged or changed since written, by {SUMS}: "
                f"{', '.join(wrong[:SHOWN])}{more}; delete what is named, and the command that "
                "made it makes it again"
            )

    def tidied(self) -> bytes | None:
        """The list with every file that is there once; None if it is so, or if none is kept."""
        if self._list is None or self._list.name != SUMS or not self.folder.is_dir():
            return None
        known, last = self.known(), {}
        for name in sorted(self._files()):
            if name not in known and (not name.endswith(ADOPTED) or name.startswith("report/")):
                continue  # notes of a person, and pages that are made again
            digests = set(known.get(name, []))
            last[name] = digests.pop() if len(digests) == 1 else self._digest(name)
        data, path = _lines(last), self.folder / SUMS
        return None if path.exists() and path.read_bytes() == data else data

    def end_parts(self) -> None:
        """Remove the lists of other processes, which a tidied one has taken over."""
        for part in self.folder.glob(PART + "*"):
            part.unlink(missing_ok=True)

    def end_part(self) -> None:
        """Remove the list that this process keeps beside that of another, when all is well."""
        if self._list is not None and self._list.name.startswith(PART):
            self._list.unlink(missing_ok=True)

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _files(self) -> Iterator[str]:
        """Names of all files, but for folders in this one that have a list of their own."""
        for where, folders, names in os.walk(self.folder):
            path = Path(where)
            if path != self.folder and SUMS in names:
                folders.clear()
                continue
            folders[:] = sorted(n for n in folders if not n.startswith(self._hidden))
            for name in sorted(names):
                if name != SUMS and not name.startswith(self._hidden):
                    yield (path / name).relative_to(self.folder).as_posix()

    def _digest(self, name: str) -> str:
        try:
            with open(self.folder / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StoreError(f"{self.folder / name} cannot be read ({error})") from None


def tensor_digest(tensors: Mapping[str, Tensor], meta: Any) -> str:
    """SHA-256 of what a file of tensors holds, for files that lie in no folder of ours."""
    import torch

    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(plain.numpy().data.cast("B") if plain.numel() else b"")
    return digest.hexdigest()


def _lines(digests: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
