"""`otdd COMMAND --help`: every flag, its values, what it does and its default, as plain text."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING
from typing import Any, Literal

from otdd.flags import Flag, named_fields

EXIT_CODES = {
    0: "done",
    1: "failure: an error that otdd did not foresee, or a package that is missing",
    2: "bad input: flags, settings, data, or files that are not what otdd wrote",
    3: "another otdd process works on this output; wait for it",
    4: "the output cannot be written (disk full, read-only); what was finished is kept",
    130: "interrupted by Ctrl-C; the same command goes on",
    141: "whoever read the output went away, as in otdd ... | head",
}
WIDEST = 100
SHORT = 24  # characters of a default that stays in one line
KINDS = {int: "INT", float: "NUMBER", str: "TEXT", bool: ""}


def page(
    cls: type, prog: str, about: str, base: Mapping[str, Any], leading: tuple[str, ...]
) -> str:
    """The help of a command.

    Args:
        cls: its flags, a config dataclass.
        prog: the command.
        about: what it does.
        base: nested settings that are stronger than the defaults.
        leading: settings whose values may come first without their flags.
    """
    groups = list(_groups(cls, base))
    required = [flag for flag, _, value in groups[0][1] if value is MISSING]
    usage = [f"usage: {prog}", *(name.upper().replace("_", "-") for name in leading)]
    usage += [
        f"{flag.spellings()[0]} {metavar(flag.kind)}"
        for flag in required
        if flag.name not in leading
    ]
    lines = [*wrapped(" ".join([*usage, "[flags]"]), "", "    "), "", *wrapped(about)]
    for title, rows in groups:
        lines += ["", *wrapped(title)]
        for flag, text, value in rows:
            # To turn on what is off takes one spelling; a setting that is on shows how to end it.
            words = ", ".join(flag.spellings() if value is True else flag.spellings()[:1])
            named = wrapped(f"{words} {metavar(flag.kind)}", "  ", "      ")
            lines += [_bold(line) for line in named]
            default = _default(value, text)
            default = default if len(default) > SHORT else default.replace(" ", "\u00a0")
            lines += wrapped(f"{text} {default}", " " * 6)
    return "\n".join([*lines, "", *exit_codes()]).replace("\u00a0", " ") + "\n"


def exit_codes() -> list[str]:
    """Lines that say what the exit codes mean."""
    rows = (wrapped(f"{code:<4} {what}", "  ", " " * 7) for code, what in EXIT_CODES.items())
    return ["exit codes", *itertools.chain.from_iterable(rows)]


def wrapped(text: str, first: str = "", later: str | None = None) -> list[str]:
    """Lines of a text that fit into the terminal, after these margins."""
    width = max(min(shutil.get_terminal_size().columns, WIDEST), 20)
    margin = first if later is None else later
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=margin, break_on_hyphens=False
    )


def metavar(kind: Any) -> str:
    """How the values of a type are written."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "{" + ", ".join(map(str, args)) + "}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(metavar(part) for part in args if part is not type(None))
    if origin is tuple:
        return f"{metavar(args[0])} ..." if args[-1] is ... else " ".join(map(metavar, args))
    return KINDS[kind]


def _default(value: Any, text: str) -> str:
    if value is MISSING:
        return "(required)"
    if value is None:  # the text says what is done then
        return "" if "default" in text else "(default: none)"
    if isinstance(value, bool):
        return f"(default: {'on' if value else 'off'})"
    values = value if isinstance(value, tuple | list) else (value,)
    words = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return f"(default: {words or 'none'})"


def _groups(
    cls: type, base: Mapping[str, Any], prefix: str = "", title: str = "flags"
) -> Iterator[tuple[str, list[tuple[Flag, str, Any]]]]:
    """Title of every group of settings, with the flag, the text and the value of each."""
    texts, rows, groups = field_texts(cls), [], []
    for field, kind, called in named_fields(cls):
        name, text = prefix + called, texts[field.name]
        if dataclasses.is_dataclass(kind):
            inside = base.get(field.name, {})
            groups.append((typing.cast(type, kind), inside, f"{name}.", f"{name}: {text}"))
        else:
            rows.append((Flag(name, name, kind), text, base.get(field.name, field.default)))
    yield title, rows
    for group in groups:
        yield from _groups(*group)


def field_texts(cls: type) -> dict[str, str]:
    """The docstring under every field of a dataclass and those that it comes from, in one line."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        found |= dict(_texts(typing.cast(ast.ClassDef, node).body))
    return found


def _texts(body: Iterable[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in itertools.pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                yield name, " ".join(str(text).split())


def _bold(text: str) -> str:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain or not sys.stdout.isatty() else f"\033[1m{text}\033[0m"
