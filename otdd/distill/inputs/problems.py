"""What is wrong with data, said with every name at once; and what is only worth a remark."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence

from otdd.distill.config import printable

SHOWN = 200  # problems that a message lists


class DataError(ValueError):
    """Data that cannot be distilled; `problems` names every offending file, row or class."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        # Names of files may hold line ends and the control codes of terminals.
        message, *self.problems = map(printable, [message, *problems])
        super().__init__(_listing(message, self.problems))


class DataWarning(UserWarning):
    """Data that can be distilled, with something about it that its owner should know.

    Attributes:
        where: the data.
        note: what is to know, in a line.
        items: the images that it is about, each with the reason; perhaps none.
    """

    def __init__(self, where: str, note: str, items: Sequence[str] = ()) -> None:
        self.where, self.note, *self.items = map(printable, [where, note, *items])
        super().__init__(_listing(f"{self.where}: {self.note}" + ":" * bool(items), self.items))


def warn(where: str, note: str, items: Sequence[str] = ()) -> None:
    """Gives a `DataWarning`."""
    warnings.warn(DataWarning(where, note, items), stacklevel=3)


def _listing(message: str, items: Sequence[str]) -> str:
    """A message and its items, a line each."""
    more = [f"... and {len(items) - SHOWN} more"] * (len(items) > SHOWN)
    return "\n  ".join([message, *items[:SHOWN], *more])


def normal(name: str) -> str:
    """A class name as it is kept: Unicode's composed form (NFC), which file systems may change."""
    return unicodedata.normalize("NFC", name)


def check_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Problems of class names as they were found, and notes about those that look alike."""
    found = list(dict.fromkeys(names))
    problems = [
        f"class {name!a}: a name must have a character, and no control characters"
        for name in found
        if not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
    ]
    for same in _alike(found, normal):
        problems.append(f"classes {same} are one name in different Unicode spellings")
    composed = list(dict.fromkeys(map(normal, found)))
    notes = [
        f"classes {same} differ only in case or outer blanks; they stay different classes"
        for same in _alike(composed, lambda name: normal(name.strip().casefold()))
    ]
    return problems, notes


def _alike(names: Sequence[str], key: Callable[[str], str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [", ".join(map(ascii, group)) for group in groups.values() if len(group) > 1]
