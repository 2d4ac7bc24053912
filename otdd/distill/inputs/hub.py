"""Hugging Face data sets: a local folder, or a name on the Hub, by the library `datasets`.

A local folder is one of `save_to_disk` or one that `load_dataset` understands. Images stay where
`datasets` has them, in Arrow files that are mapped, so memory does not grow with their number; what
is loaded from the Hub is kept in its cache. Nothing is unpickled and no code of a data set is run.

With `streaming=true` nothing is loaded first: rows come one after the other, and their images are
resized to the resolution, which must be given, and kept at that size in the cache of `datasets`;
the files they come from never lie on the disk. What is kept is read again when they have changed.
An interrupted pass starts again. `limit=N` takes the first N rows of each split, to try a large
data set; where its rows are in the order of the classes, some will have no image. Class names
that the data set does not bring are known only after the pass, from the labels that were read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from otdd.distill.inputs import pictures
from otdd.distill.inputs.labels import name_labels
from otdd.distill.inputs.listing import Listing, Part
from otdd.distill.inputs.problems import DataError
from otdd.distill.inputs.spec import HUB_NAME
from otdd.distill.inputs.streamed import Read, Streamed, content, labelled, undecoded

LABEL = ("label", "labels", "class", "target")
TEST = ("test", "validation", "valid", "val")
SHOWN_NAMES = 10  # of classes, in a message


@dataclass(frozen=True)
class Rows:
    """Images of the rows of one split, as the bytes or the files that `datasets` keeps.

    Attributes:
        table: a `datasets.Dataset` whose `column` is not decoded.
        column: of the images.
        where: what messages call the split.
        split: its name.
        numbers: rows of the images.
        roots: folders in which files of images may be.
    """

    table: Any
    column: str
    where: str
    split: str
    numbers: Sequence[int]
    roots: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"{self.where}, {self.key(index)}"

    def key(self, index: int) -> str:
        return f"{self.split}[{self.numbers[index]}]"

    def decode(self, index: int, resolution: int | None) -> Tensor | str:
        found = self._raw(index)
        return found if isinstance(found, str) else pictures.decode(found, resolution)

    def header(self, index: int) -> tuple[int, int, int] | str:
        found = self._raw(index)
        return found if isinstance(found, str) else pictures.header(found)

    def select(self, indices: Sequence[int]) -> Rows:
        return replace(self, numbers=[self.numbers[k] for k in indices])

    def digest(self, start: int, stop: int) -> str:
        """Of the bytes of images, or of name and size of their files."""
        digest = hashlib.sha256()
        for index in range(start, stop):
            found = self._raw(index)
            if isinstance(found, Path):
                size = found.stat().st_size if found.is_file() else -1
                found = f"{found.name} {size}"
            content = found.encode() if isinstance(found, str) else found
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def _raw(self, index: int) -> bytes | Path | str:
        """The bytes of an image, its file, or what is wrong with it."""
        return content(self.table[self.numbers[index]][self.column], self.roots)


@dataclass(frozen=True)
class Loaded:
    """Splits by name, each a `datasets.Dataset`, and the folders of their images."""

    tables: dict[str, Any]
    where: str
    roots: tuple[Path, ...]

    def hidden(self, split: str, label: str) -> bool:
        """Whether the labels of a split are withheld."""
        return set(_values(self.tables[split], label, self.where)) == {-1}

    def read(self, split: str, image: str, label: str) -> Read:
        """The images of a split, left where they are, and their labels."""
        table = undecoded(self.tables[split].select_columns([image]), image, self.where)
        rows = Rows(table, image, self.where, split, range(len(table)), self.roots)
        return Read(rows, _values(self.tables[split], label, self.where), [])


def list_hub(name: str, options: Mapping[str, str], resolution: int | None = None) -> Listing:
    """Lists the images of a data set; none is decoded unless they are streamed.

    Args:
        name: local folder, or OWNER/NAME.
        options: `config`, `revision`, `split` (training part), `test`, `image_column`,
            `label_column`, `streaming` and `limit`.
        resolution: side of the images that are streamed.

    Raises:
        DataError: it cannot be loaded, or its columns or splits are not clear.
    """
    where, folder = f"data hf:{name}", Path(name).expanduser()
    if folder.is_file():  # which may look like a name of the Hub
        raise DataError(f"{where} is a file; expected a folder, such as hf:{folder.parent}")
    if not name or not (folder.is_dir() or HUB_NAME.fullmatch(name)):  # "" would be "."
        raise DataError(f"{where} is no folder, and no OWNER/NAME of the Hugging Face Hub")
    limit, streaming = _limit(options, where), _side(options, resolution, where)
    if limit is not None:
        where += f" (first {limit} rows of each split)"
    datasets = _library(where)
    splits: Loaded | Streamed
    if streaming is None:
        splits = _load(datasets, name, folder, options, where, limit)
    else:
        splits = _open(datasets, name, folder, options, where, limit, streaming)
    train, tests = _choose(list(splits.tables), options, where)
    features = splits.tables[train].features
    if features is None:
        raise DataError(
            f"{where}: what its columns hold is not known before it is loaded; "
            "leave out streaming=true"
        )
    image = _image_column(datasets, features, options.get("image_column"), where)
    label = _label_column(datasets, features, options.get("label_column"), where)
    test, notes = _test(splits, tests, image, label)
    used = [train, *test]
    for key in test:
        _require_same_classes(features[label], splits.tables[key].features[label], key, where)
    found = [splits.read(key, image, label) for key in used]
    notes += [note for part in found for note in part.notes]
    names = getattr(features[label], "names", None)
    if names is None and streaming is not None:
        notes.append(f"column {label} has no class names; they are the labels that were read")
    named = name_labels([part.labels for part in found], names)
    parts = [Part(r.source, labels) for r, labels in zip(found, named.labels, strict=True)]
    return Listing(
        where=where,
        name=folder.resolve().name if folder.is_dir() else name,
        classes=named.classes,
        train=parts[0],
        test=parts[1] if len(parts) > 1 else None,
        test_name=used[-1],
        problems=named.problems,
        notes=[*notes, *named.notes],
    )


def _library(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'{where}: {error}; pip install "otdd[hub]"') from None
    return datasets


def _limit(options: Mapping[str, str], where: str) -> int | None:
    text = options.get("limit")
    if text is not None and not re.fullmatch(r"[1-9][0-9]{0,11}", text):
        raise DataError(f"{where}: limit={text} is not accepted; expected an integer >= 1")
    return None if text is None else int(text)


def _side(options: Mapping[str, str], resolution: int | None, where: str) -> int | None:
    """Side of the images that are kept of a stream; None if the data set is loaded."""
    text = options.get("streaming", "false")
    if text not in ("true", "false"):
        raise DataError(f"{where}: streaming={text} is not accepted; expected true or false")
    if text == "true" and resolution is None:
        raise DataError(
            f"{where}: streaming=true keeps images at their resolution alone; give --resolution "
            "(resolution=), e.g. 64"
        )
    return resolution if text == "true" else None


def _load(
    datasets: Any,
    name: str,
    folder: Path,
    options: Mapping[str, str],
    where: str,
    limit: int | None,
) -> Loaded:
    """All splits, in the cache or where they are."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with _told(datasets, folder, where):
        if _saved(folder):
            loaded = datasets.load_from_disk(str(folder))
        else:
            place = str(folder) if folder.is_dir() else name
            loaded = datasets.load_dataset(place, options.get("config"), **_revision(options))
    places = [folder] if folder.is_dir() else [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    roots = tuple(Path(os.path.realpath(place)) for place in places)
    tables = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    if limit is not None:
        tables = {k: t.select(range(min(limit, len(t)))) for k, t in tables.items()}
    return Loaded(tables, where, roots)


def _open(
    datasets: Any,
    name: str,
    folder: Path,
    options: Mapping[str, str],
    where: str,
    limit: int | None,
    resolution: int,
) -> Streamed:
    """All splits, to be read row by row."""
    local = folder.is_dir()
    if _saved(folder):
        raise DataError(
            f"{where} is of save_to_disk: its images are read where they lie; leave out "
            "streaming=true"
        )
    with _told(datasets, folder, where):
        place = str(folder) if local else name
        builder = datasets.load_dataset_builder(place, options.get("config"), **_revision(options))
        tables = dict(builder.as_streaming_dataset())
    cache = Path(builder.cache_dir) / "otdd"
    roots = (Path(os.path.realpath(folder)),) if local else ()
    return Streamed(tables, where, None if local else name, roots, cache, resolution, limit)


def _saved(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _revision(options: Mapping[str, str]) -> dict[str, str]:
    return {key: options[key] for key in ("revision",) if key in options}


@contextmanager
def _told(datasets: Any, folder: Path, where: str) -> Iterator[None]:
    """What goes wrong in the library, in one line."""
    try:
        with _quiet(datasets, folder.is_dir()):
            yield
    except Exception as error:  # of the network, of pyarrow, of the library
        away = datasets.config.HF_HUB_OFFLINE and not folder.is_dir()
        offline = " (HF_HUB_OFFLINE is set)" if away else ""
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        problem = " ".join(f"{error}{cause}".split()) or type(error).__name__
        raise DataError(f"{where} cannot be loaded{offline}: {problem}") from None


@contextmanager
def _quiet(datasets: Any, local: bool) -> Iterator[None]:
    """Without the progress bars of the library, where nothing is fetched."""
    shown = local and not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _choose(splits: list[str], options: Mapping[str, str], where: str) -> tuple[str, list[str]]:
    """The training split, and those that may test, the best first."""
    if not splits:
        raise DataError(f"{where} has no splits")
    there = f"there are {', '.join(splits)}"
    for option in ("split", "test"):
        if options.get(option, splits[0]) not in splits:
            raise DataError(f"{where}: no split {option}={options[option]}; {there}")
    train = options.get("split") or ("train" if "train" in splits else splits[0])
    if "split" not in options and train != "train" and len(splits) > 1:
        raise DataError(f"{where}: no split is called train; {there}; give ,split=NAME")
    tests = [options["test"]] if "test" in options else [n for n in TEST if n in splits]
    return train, [name for name in tests if name != train]


def _test(
    splits: Loaded | Streamed, tests: list[str], image: str, label: str
) -> tuple[list[str], list[str]]:
    """The split that tests, if there is one, and why others do not."""
    useless = {}
    for key in tests:
        missing = [name for name in (image, label) if name not in splits.tables[key].features]
        if missing:
            useless[key] = f"no column {missing[0]}"
        elif splits.hidden(key, label):  # how the Hub withholds labels
            useless[key] = "no labels"
    tests = [key for key in tests if key not in useless]
    notes = [f"split {key} is not used: {why}" for key, why in useless.items()]
    notes += [f"split {key} is not used: there is {tests[0]}" for key in tests[1:]]
    return tests[:1], notes


def _require_same_classes(train: Any, test: Any, split: str, where: str) -> None:
    """Refuses class labels of a test split whose numbers mean other names."""
    ours, theirs = getattr(train, "names", None), getattr(test, "names", None)
    if ours is not None and theirs is not None and ours != theirs:
        some = " and ".join(", ".join(names[:SHOWN_NAMES]) for names in (theirs, ours))
        raise DataError(
            f"{where}: the class labels of split {split} have other names, or another order, than "
            f"those of the training split: {some}; cast them to the same names"
        )


def _image_column(datasets: Any, features: Any, given: str | None, where: str) -> str:
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    return _one(found, features, "image_column", given, where)


def _label_column(datasets: Any, features: Any, given: str | None, where: str) -> str:
    found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not found:
        found = [name for name in features if name.lower() in LABEL]
    column = _one(found, features, "label_column", given, where)
    kind = features[column]
    dtype = getattr(kind, "dtype", None)
    if not isinstance(dtype, str) or not re.fullmatch(r"u?int\d+|(large_)?string", dtype):
        raise DataError(f"{where}: column {column} is {kind}; expected labels: integers or texts")
    return column


def _one(found: list[str], features: Any, option: str, given: str | None, where: str) -> str:
    if given is not None:
        found = [given] if given in features else []
    if len(found) != 1:
        columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
        what = f"{len(found)} columns could be" if found else "no column is"
        named = f"{option}={given}" if given is not None else f"the {option.split('_')[0]}"
        raise DataError(f"{where}: {what} {named}; there are {columns}; give ,{option}=NAME")
    return found[0]


def _values(split: Any, label: str, where: str) -> list[Any]:
    values: list[Any] = []
    for batch in split.select_columns([label]).with_format("arrow").iter(10_000):
        values += batch.column(0).to_pylist()
    return labelled(values, where)
