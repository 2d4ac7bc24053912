"""What `--data` names: PLACE, or PLACE,key=value,... with settings of its kind of input.

A text that is a file or folder as it stands has no settings, whatever commas are in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from otdd.distill.inputs.problems import DataError, warn
from otdd.distill.inputs.table import TABLES

if TYPE_CHECKING:
    from otdd.distill.inputs.listing import Listing

BUILTIN = ("digits", "textures")
HUB = "hf:"
OPTIONS = {
    "folder": (),
    "npz": (),
    "table": ("image_column", "label_column", "split_column", "root"),
    "hub": (
        *("config", "revision", "split", "test", "image_column", "label_column"),
        *("streaming", "limit"),
    ),
}
PATH_OPTIONS = ("root",)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)  # OWNER/NAME
ACCEPTED = (
    "'digits', 'textures', an image folder, a table (.csv, .tsv, .parquet), an .npz file, or hf: "
    "and a Hugging Face data set"
)


@dataclass(frozen=True)
class Spec:
    """Kind of input (a key of `OPTIONS`), place and settings."""

    kind: str
    place: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Takes a text apart; what it names need not be there."""
        hub = text.startswith(HUB)
        place, options = text.removeprefix(HUB), {}
        while not Path(place).exists() and (found := re.fullmatch(r"(.+),([a-z_]+)=(.*)", place)):
            place = found[1]
            options[found[2]] = found[3]
        if hub:
            return cls("hub", place, options)
        suffix = Path(place).suffix.lower()
        kind = "table" if suffix in TABLES else "npz" if suffix == ".npz" else "folder"
        return cls("folder" if Path(place).is_dir() else kind, place, options)

    def __str__(self) -> str:
        settings = [f"{key}={value}" for key, value in reversed(self.options.items())]
        return HUB * (self.kind == "hub") + ",".join([self.place, *settings])


def open_listing(text: str | os.PathLike[str], resolution: int | None = None) -> Listing:
    """Lists the images that a text names; none is decoded unless they are streamed.

    Args:
        text: as `--data` takes it.
        resolution: side of the images, which are kept at it when they are streamed.

    Raises:
        DataError: there are none, or what names them is not understood.

    Warns:
        DataWarning: a data set of otdd has the name of a folder that is there.
    """
    text = os.fspath(text)
    if text in BUILTIN:
        from otdd.distill.inputs import builtin

        if Path(text).is_dir():
            warn(f"data {text!r}", f"these images come with otdd; './{text}' is the folder here")
        return builtin.digits() if text == "digits" else builtin.textures()
    spec = Spec.parse(text)
    known = OPTIONS[spec.kind]
    for key, value in spec.options.items():
        if key not in known or not value:
            accepted = ", ".join(f"{name}=..." for name in known) or "none"
            raise DataError(f"data {text!r}: {key}={value} is not accepted; here: {accepted}")
    if spec.kind == "hub":
        from otdd.distill.inputs.hub import list_hub

        return list_hub(spec.place, spec.options, resolution)
    path = Path(spec.place)
    if spec.kind == "folder":
        from otdd.distill.inputs.folder import list_folder

        if not path.is_dir():
            raise DataError(f"data {str(path)!r} is no folder; accepted: {ACCEPTED}")
        return list_folder(path)
    if not path.is_file():
        raise DataError(f"data {str(path)!r} is no file; accepted: {ACCEPTED}")
    if spec.kind == "table":
        from otdd.distill.inputs.table import list_table

        return list_table(path, spec.options)
    from otdd.distill.inputs.npz import list_arrays

    return list_arrays(path)


def absolute(text: str) -> str:
    """The same place, found from any folder."""
    if text in BUILTIN:  # as `open_listing` has it, a folder of that name or not
        return text
    spec = Spec.parse(text)
    if not Path(spec.place).expanduser().exists():
        return text
    return str(_with_paths(spec, lambda path: str(Path(path).expanduser().resolve())))


def published(text: str) -> str:
    """As others may read it: of files and folders only their names."""
    spec = Spec.parse(text)
    if spec.kind == "hub" and HUB_NAME.fullmatch(spec.place):
        return text
    return str(_with_paths(spec, lambda path: PureWindowsPath(path).name or path))


def _with_paths(spec: Spec, change: Callable[[str], str]) -> Spec:
    options = {k: change(v) if k in PATH_OPTIONS else v for k, v in spec.options.items()}
    return replace(spec, place=change(spec.place), options=options)
