"""Labels as they were given to class names and numbers, one rule for tables, rows and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otdd.distill.inputs.problems import check_names, normal

SHOWN_ROWS = 3


@dataclass(frozen=True)
class Named:
    """Class names, the labels int64 (N,) of every part, and what is wrong or remarkable."""

    classes: list[str]
    labels: list[Tensor]
    problems: list[str]
    notes: list[str]


def name_labels(parts: Sequence[Sequence[Any]], classes: Sequence[str] | None = None) -> Named:
    """Numbers the labels of all parts.

    Args:
        parts: labels of every part: all int, or all str; anything else is a problem.
        classes: names in their order, when the input has them; an int is then an index. Without
            them texts are ordered as texts, as folders are, and ints as numbers.
    """
    values = [label for part in parts for label in part]
    texts = sum(isinstance(v, str) for v in values)
    odd = [v for v in values if not isinstance(v, str | int) or isinstance(v, bool)]
    if odd or 0 < texts < len(values):
        what = f"{len(odd)} are neither (such as {odd[0]!r})" if odd else "some are texts, some not"
        return _wrong(parts, f"labels must all be integers or all be texts: {what}")
    if classes is not None:
        names, order = list(map(str, classes)), list(range(len(classes)))
    else:
        order = sorted(set(values))
        names = list(map(str, order))
    problems, notes = check_names(names)
    names = [normal(name) for name in names]
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        return _wrong(parts, *problems, f"class names must differ; twice: {', '.join(twice)}")
    known: dict[Any, int] = {name: k for k, name in enumerate(names)}
    numbers: dict[Any, int] = {value: k for k, value in enumerate(order)}
    index = known if texts else numbers
    keyed = [[normal(v) if isinstance(v, str) else v for v in part] for part in parts]
    strange = list(dict.fromkeys(v for part in keyed for v in part if v not in index))
    if strange:
        some = ", ".join(map(repr, strange[:SHOWN_ROWS])) + ", ..." * (len(strange) > SHOWN_ROWS)
        problems.append(f"labels without a class: {some}; there are {len(names)} classes")
    labels = [torch.tensor([index.get(v, 0) for v in part], dtype=torch.long) for part in keyed]
    return Named(names, labels, problems, notes)


def _wrong(parts: Sequence[Sequence[Any]], *problems: str) -> Named:
    empty = [torch.zeros(len(part), dtype=torch.long) for part in parts]
    return Named([], empty, list(problems), [])
