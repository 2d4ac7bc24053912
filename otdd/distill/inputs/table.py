"""A table of paths and labels: CSV, TSV or Parquet.

Columns `path`, `file`, `filename`, `file_name` or `image`; `label` or `class`; and, if there is
one, `split`. Paths are relative to the folder of the table, or to `root=`, and none may lead out of
it: neither by `..` nor by being absolute. Links inside it are followed, as in image folders.
Images keep the order of the rows; classes that of their names, or of their numbers.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from otdd.distill.inputs.labels import name_labels
from otdd.distill.inputs.listing import Files, Listing, Part
from otdd.distill.inputs.problems import DataError

TABLES = (".csv", ".tsv", ".parquet")
IMAGE = ("path", "file", "filename", "file_name", "image")
LABEL = ("label", "class")
SPLIT = ("split",)
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}


Read = tuple[list[str], list[tuple[int, dict[Any, Any]]]]  # columns, and numbered rows


@dataclass(frozen=True)
class Row:
    """One image: its row in the table, and what is there."""

    number: int
    path: Any
    label: Any
    split: Any

    def problems(self) -> Iterator[str]:
        """What is wrong with the row itself."""
        if not isinstance(self.path, str) or not self.path or "\0" in self.path:
            yield f"row {self.number}: no path"
        if self.label in (None, ""):
            yield f"row {self.number}: no label"
        if str(self.split).strip().lower() not in SPLITS:
            known = ", ".join(SPLITS)
            yield f"row {self.number}: split {self.split!r} is not one of {known}"


def list_table(table: Path, options: Mapping[str, str]) -> Listing:
    """Lists the images of a table; none is opened.

    Args:
        table: the file.
        options: `image_column`, `label_column`, `split_column`; `root`, the folder of the paths.

    Raises:
        DataError: the table cannot be read, or has no such columns.
    """
    where = f"data table {table}"
    root = Path(options.get("root", table.parent)).expanduser()
    if not root.is_dir():
        raise DataError(f"{where}: root={root} is no folder")
    rows, problems = _rows(table, options, where)
    problems += [problem for row in rows for problem in row.problems()]
    rows = [row for row in rows if not any(row.problems())]
    paths = {row.number: _inside(root, row.path) for row in rows}
    problems += [
        f"row {row.number}: {row.path!r} leads out of {root}; root=FOLDER names another"
        for row in rows
        if paths[row.number] is None
    ]
    split, test_name, notes = _parts([row for row in rows if paths[row.number] is not None])
    problems += _twice(split, paths)
    named = name_labels([[row.label for row in part] for part in split])
    parts = [
        Part(Files([paths[row.number] or root for row in part], root), labels)
        for part, labels in zip(split, named.labels, strict=True)
    ]
    return Listing(
        where=where,
        name=table.stem,
        classes=named.classes,
        train=parts[0],
        test=parts[1] if len(parts) > 1 else None,
        test_name=test_name,
        problems=[*problems, *named.problems],
        notes=[*notes, *named.notes],
    )


def pick(
    columns: Sequence[str], accepted: Sequence[str], option: str, given: str | None, where: str
) -> str:
    """The one column that was asked for, or has one of the accepted names.

    Raises:
        DataError: there is none, or several, all listed.
    """
    if given is not None:
        if given not in columns:
            raise DataError(f"{where}: no column {option}={given}; there are {', '.join(columns)}")
        return given
    found = [c for c in columns if c.strip().lower() in accepted]
    if len(found) != 1:
        what = "several columns could be" if found else "no column is called"
        names = f"{', '.join(found or accepted)}; there are {', '.join(columns) or 'none'}"
        raise DataError(f"{where}: {what} {names}; give ,{option}=NAME")
    return found[0]


def _rows(table: Path, options: Mapping[str, str], where: str) -> tuple[list[Row], list[str]]:
    text = table.suffix.lower() != ".parquet"
    columns, records = (_read_text if text else _read_parquet)(table, where)
    image = pick(columns, IMAGE, "image_column", options.get("image_column"), where)
    kinds = {type(record.get(image)) for _, record in records}
    if dict in kinds:
        place = f"give its folder as hf:{table.parent}"
        raise DataError(f"{where}: column {image} holds images, not their paths; {place}")
    if bytes in kinds:
        raise DataError(f"{where}: column {image} holds bytes; expected paths of images as texts")
    label = pick(columns, LABEL, "label_column", options.get("label_column"), where)
    split = options.get("split_column")
    if split is not None or any(c.strip().lower() in SPLIT for c in columns):
        split = pick(columns, SPLIT, "split_column", split, where)
    rows = [
        Row(number, record.get(image), record.get(label), record.get(split) if split else "train")
        for number, record in records
    ]
    problems = [
        f"row {number}: more cells than columns" for number, record in records if None in record
    ]
    if text and all(_is_number(row.label) for row in rows):
        rows = [replace(row, label=int(row.label)) for row in rows]
    return rows, problems


def _is_number(text: str | None) -> bool:
    """Whether a text is an integer and nothing else: 7, but not 007, which may be a name."""
    return text is not None and re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) is not None


def _read_text(table: Path, where: str) -> Read:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=head.count)
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            records = [(reader.line_num, record) for record in reader]
            return list(reader.fieldnames or ()), records
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} cannot be read ({error}); expected UTF-8 text") from None


def _read_parquet(table: Path, where: str) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        read = pq.read_table(table)
        records = read.to_pylist()
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{where} cannot be read ({' '.join(str(error).split())})") from None
    return read.schema.names, list(enumerate(records, start=1))


def _parts(rows: Sequence[Row]) -> tuple[list[list[Row]], str, list[str]]:
    """Rows of the training part, and of `test`, or else `val`, if there are any."""
    found: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    for row in rows:
        found[SPLITS[row.split.strip().lower()]].append(row)
    test_name = "test" if found["test"] else "val"
    unused = found["val"] if test_name == "test" else []
    notes = [f"{len(unused)} images of the split val are not used: there is test"] * bool(unused)
    parts = [found["train"], found[test_name]]
    return (parts if parts[1] else parts[:1]), test_name, notes


def _inside(root: Path, path: str) -> Path | None:
    """The path of a row, or None if it leads out of the folder."""
    whole = os.path.normpath(os.path.join(root.absolute(), path))
    inside = os.path.relpath(whole, os.path.normpath(root.absolute()))
    return None if inside == os.curdir or inside.split(os.sep)[0] == os.pardir else root / inside


def _twice(parts: Sequence[Sequence[Row]], paths: Mapping[int, Path | None]) -> list[str]:
    """Images in more than one row, with what the rows disagree in."""
    first: dict[Path | None, tuple[int, Row]] = {}
    problems = []
    for number, part in enumerate(parts):
        for row in part:
            before = first.setdefault(paths[row.number], (number, row))
            if before[1] is not row:
                differ = [
                    *["in train and in test"] * (before[0] != number),
                    *[f"labels {before[1].label!r} and {row.label!r}"]
                    * (before[1].label != row.label),
                ]
                rows = f"rows {before[1].number} and {row.number}"
                problems.append(f"{row.path}: twice, {', '.join([rows, *differ])}")
    return problems
