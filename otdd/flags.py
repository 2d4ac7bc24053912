"""Flags of the command line to objects of config dataclasses, and refusals in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from typing import Any, Literal

from otdd.distill.config import ConfigError, require

Log = Literal["auto", "bars", "lines", "json", "quiet"]


def parse(cls: type, flags: list[str], prog: str, about: str, base: dict[str, Any]) -> Any:
    """Flags over `base` over defaults, as an object of `cls`; refusals become `ConfigError`."""
    _refuse_unknown(flags, cls, prog)
    import tyro

    errors = io.StringIO()
    try:
        default = _unchecked(cls, base, tyro.MISSING)
        with contextlib.redirect_stderr(errors):
            made = tyro.cli(
                cls,
                args=flags,
                prog=prog,
                description=about,
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
                use_underscores=True,
            )
        _finite(made)
        return made
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(_one_line(errors.getvalue(), prog)) from None


def _finite(made: Any, prefix: str = "") -> None:
    """Refuse infinite and undefined numbers in an object of settings."""
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if dataclasses.is_dataclass(value):
            _finite(value, f"{prefix}{field.name}.")
        for number in value if isinstance(value, tuple) else (value,):
            ok = not isinstance(number, float) or math.isfinite(number)
            require(ok, f"--{prefix}{field.name}", number, "a finite number")


def _refuse_unknown(flags: list[str], cls: type, prog: str) -> None:
    known = [name for name, _ in flags_of(cls)]
    for flag in flags:
        name = flag.split("=", 1)[0].replace("-", "_").replace("__", "--", 1)
        if not name.startswith("--") or name == "--help" or name in known:
            continue
        hint = nearest(name, known) or f"{prog} --help lists all"
        raise ConfigError(f"unknown flag {flag.split('=', 1)[0]}; {hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A question about the likeliest of the known words, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def flags_of(cls: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Dotted flags of a config dataclass, each with the words that it takes; () for any."""
    hints, extras = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        notes = getattr(extras[field.name], "__metadata__", ())
        renamed = next((n.name for n in notes if getattr(n, "name", None)), field.name)
        name, kind = f"{prefix}{renamed}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from flags_of(typing.cast(type, kind), f"{name}.")
            continue
        yield f"--{name}", tuple(_choices(kind))
        if kind is bool:
            *groups, last = name.split(".")
            yield "--" + ".".join([*groups, f"no_{last}"]), ()


def _choices(kind: Any) -> Iterator[str]:
    origin = typing.get_origin(kind)
    if origin is Literal:
        yield from map(str, typing.get_args(kind))
    elif origin in (tuple, typing.Union, types.UnionType):
        for part in typing.get_args(kind):
            yield from _choices(part)


def _unchecked(cls: type, values: dict[str, Any], required: Any) -> Any:
    """An object of `cls` in which settings that are still missing are marked for the parser."""
    from otdd.distill.settings import convert_fields

    made = convert_fields(cls, values)
    default: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        value = required
        if field.name in made:
            value = made[field.name]
        elif field.default is not MISSING:
            value = field.default
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        object.__setattr__(default, field.name, value)
    return default


def _one_line(box: str, prog: str) -> str:
    """The message inside a box of the flag parser."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:  # after the title
        text = line.strip("╭╮╰╯│ ")
        rule = not text.strip("─-")
        if rule and lines:
            break
        if not rule:
            lines.append(text)
    text = " ".join(lines)
    if text.startswith("Missing from"):
        names = ", ".join(re.findall(r"(--[\w.]+) [A-Z{]", text))
        return f"missing: {names} (otdd {prog.split()[-1]} --help explains)"
    nested = re.fullmatch(r"Error parsing (\S+): (\w+): (.*)", text)
    if nested and not nested[1].startswith("--"):
        group = "" if nested[1][0].isupper() else f"{nested[1]}."
        return f"--{group}{nested[2]}: {nested[3]}"
    number = re.search(r"parsing (\S+): .*?(int|float).*: '(.*)'$", text)
    if number:
        wanted = {"int": "an integer", "float": "a number"}[number[2]]
        return f"{number[1]}: {number[3]!r} is not accepted; expected {wanted}"
    return (text[0].lower() + text[1:]) if text else "these flags are not understood"


def value(flags: list[str], name: str) -> str | None:
    """Value of one flag, before the others are looked at."""
    found = None
    for i, flag in enumerate(flags):
        if flag == name and i + 1 < len(flags):
            found = flags[i + 1]
        elif flag.startswith(name + "="):
            found = flag.split("=", 1)[1]
    return found
