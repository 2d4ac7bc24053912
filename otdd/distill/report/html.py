"""HTML in which a text can only stand escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

EMPTY = ("img", "source", "meta", "link")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """A value as HTML; control characters become spaces."""
    if isinstance(value, Markup):
        return value
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in str(value))
    return Markup(html.escape(shown))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """An element: content and attributes are escaped; `class_` is `class`; None is left out."""
    given = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    head = "".join(f' {k}="{text(v)}"' for k, v in given.items())
    if name in EMPTY:
        return Markup(f"<{name}{head}>")
    return Markup(f"<{name}{head}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Pieces one after the other."""
    return Markup("".join(text(part) for part in parts))


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table that scrolls by itself where the page is narrow; the first cell heads its row."""
    top = tag("tr", *(tag("th", head, scope="col") for head in heads))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    inner = tag("table", tag("thead", top), tag("tbody", *body))
    return tag("div", inner, class_="wide", tabindex=0)


def tree(values: Mapping[str, Any]) -> Markup:
    """Nested settings: a table, and groups that fold."""
    single = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
    rows = [tag("tr", tag("th", k, scope="row"), tag("td", plain(v))) for k, v in single.items()]
    groups = [
        tag("details", tag("summary", k), tree(v))
        for k, v in values.items()
        if isinstance(v, Mapping)
    ]
    own = tag("table", tag("tbody", *rows), class_="settings") if rows else Markup()
    return join([own, *groups])


def image_url(data: bytes) -> str:
    """A PNG file inside the page."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def plain(value: Any) -> str:
    """A setting as a reader writes it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
