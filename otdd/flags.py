"""Flags of the command line to objects of config dataclasses, and refusals in one line.

Every setting is a flag, those of a group dotted (`--sample.steps 50`), shown with dashes and taken
with underscores too. What a group checks itself is told in the words of the flag.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from otdd.distill.config import ConfigError, require

Log = Literal["auto", "bars", "lines", "json", "quiet"]
MANY = sys.maxsize
_FLAG = re.compile(r"--?[a-zA-Z]")  # -1 is a number


@dataclass(frozen=True)
class Flag:
    """A setting on the command line."""

    key: str
    """Dotted name of the setting in Python and in files."""
    name: str
    """Dotted name after the dashes."""
    kind: Any
    """Type of its value."""

    def spellings(self) -> list[str]:
        """What help and completion show."""
        *groups, last = self.name.replace("_", "-").split(".")
        words = [last, f"no-{last}"] if self.kind is bool else [last]
        return ["--" + ".".join([*groups, word]) for word in words]

    def choices(self) -> tuple[str, ...]:
        """The words that it takes; none for any value."""
        return tuple(_choices(self.kind))

    def read(self, spelling: str, words: list[str]) -> Any:
        """The value that these words stand for."""
        if self.kind is bool:
            require(not words, spelling, " ".join(words), "no value")
            return spelling == self.spellings()[0]
        least, most = self.counts()
        seen = " ".join(words) or "no value"
        if not least <= len(words) <= most:
            raise ConfigError(f"{spelling}: {seen} is given; expected {_expected(self.kind)}")
        if typing.get_origin(self.kind) is tuple:
            return tuple(_value(typing.get_args(self.kind)[0], word, spelling) for word in words)
        return _value(self.kind, words[0], spelling)

    def counts(self) -> tuple[int, int]:
        """The least and the most words of a value."""
        if self.kind is bool:
            return 0, 0
        parts = typing.get_args(self.kind) if typing.get_origin(self.kind) is tuple else (None,)
        return (0, MANY) if parts[-1] is ... else (len(parts), len(parts))


def parse(
    cls: type,
    flags: list[str],
    prog: str,
    about: str,
    base: dict[str, Any],
    leading: tuple[str, ...] = (),
) -> Any:
    """Flags over `base` over defaults, as an object of `cls`; refusals become `ConfigError`.

    Args:
        cls: a config dataclass.
        flags: of the command.
        prog: the command, for messages and help.
        about: the first line of the help.
        base: nested settings under the flags.
        leading: settings whose values may come first without their flags.
    """
    from otdd.distill.settings import from_dict, merge

    if asks_help(flags):
        from otdd.helptext import page

        sys.stdout.write(page(cls, prog, about, base, leading))
        raise SystemExit(0)
    names: dict[str, str] = {}
    given: dict[str, Any] = {}
    for flag, value in _read(cls, _named(flags, leading), prog):
        names[flag.key] = flag.spellings()[0]
        for part in reversed(flag.key.split(".")):
            value = {part: value}
        given = merge(given, value)
    made = merge(base, given)
    missing = [
        f"--{name}".replace("_", "-")
        for field, _, name in named_fields(cls)
        if field.name not in made and is_required(field)
    ]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)} ({prog} --help explains)")
    try:
        return from_dict(cls, made)
    except ConfigError as error:
        key, colon, why = str(error).partition(":")
        raise ConfigError(names.get(key, key) + colon + why) from None


def asks_help(flags: list[str]) -> bool:
    """Whether the help is asked for."""
    return "-h" in flags or "--help" in flags


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def _named(flags: list[str], names: tuple[str, ...]) -> list[str]:
    """Flags with names put before the values that come first without any."""
    named: list[str] = []
    for name, flag in zip(names, flags, strict=False):
        if flag.startswith("-"):
            break
        named += [f"--{name}", flag]
    return named + flags[len(named) // 2 :]


def _read(cls: type, flags: list[str], prog: str) -> Iterator[tuple[Flag, Any]]:
    """Every flag that is given, with its value."""
    known = {spelling: flag for flag in flags_of(cls) for spelling in flag.spellings()}
    rest = list(flags)
    while rest:
        word, equals, first = rest.pop(0).partition("=")
        spelling = word.replace("_", "-")
        if spelling not in known:
            hint = _meant(spelling, known) or f"{prog} --help lists all"
            what = f"unknown flag {word}" if _FLAG.match(word) else f"{word!r} follows no flag"
            raise ConfigError(f"{what}; {hint}")
        flag = known[spelling]
        words = [first] if equals else []
        while rest and len(words) < flag.counts()[1] and not _FLAG.match(rest[0]):
            words.append(rest.pop(0))
        yield flag, flag.read(spelling, words)


def nearest(word: str, known: Iterable[str]) -> str:
    """A question about the likeliest of the known words, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def _meant(spelling: str, known: Iterable[str]) -> str:
    """A question about the flags of groups that end like an unknown one, or about the likeliest."""
    last = spelling.lstrip("-").split(".")[-1]
    same = [name for name in known if name.split(".")[-1] == last and "." in name]
    return f"did you mean {' or '.join(same[:3])}?" if same else nearest(spelling, known)


def flags_of(cls: type, prefix: str = "", key: str = "") -> Iterator[Flag]:
    """The flags of a config dataclass, those of its groups dotted."""
    for field, kind, name in named_fields(cls):
        if dataclasses.is_dataclass(kind):
            group = typing.cast(type, kind)
            yield from flags_of(group, f"{prefix}{name}.", f"{key}{field.name}.")
        else:
            yield Flag(key + field.name, prefix + name, kind)


def named_fields(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any, str]]:
    """Every field with its type, and its name on the command line (`from` is none in Python)."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield field, hints[field.name], field.metadata.get("flag", field.name)


def _choices(kind: Any) -> Iterator[str]:
    origin = typing.get_origin(kind)
    if origin is Literal:
        yield from map(str, typing.get_args(kind))
    elif origin in (tuple, typing.Union, types.UnionType):
        for part in typing.get_args(kind):
            yield from _choices(part)


def _value(kind: Any, word: str, spelling: str) -> Any:
    """A word as a value of a type."""
    parts = typing.get_args(kind) if typing.get_origin(kind) is not Literal else (kind,)
    if word in _choices(kind):
        return word
    if word == "None" and type(None) in parts:
        return None
    for plain in (int, float, str):
        if plain in (kind, *parts):
            try:
                return plain(word)
            except ValueError:
                break
    require(False, spelling, word, _expected(kind))


def _expected(kind: Any) -> str:
    """What is accepted as a value of a type, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(args)
    if origin is tuple:
        return _expected(args[0]) if args[-1] is ... else f"{len(args)} values"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(part) for part in args if part is not type(None))
    words: dict[Any, str] = {int: "an integer", float: "a number", str: "a name or a path"}
    return words[kind]


def value(flags: list[str], name: str) -> str | None:
    """Value of one flag, before the others are looked at."""
    found = None
    for i, flag in enumerate(flags):
        if flag == name and i + 1 < len(flags):
            found = flags[i + 1]
        elif flag.startswith(name + "="):
            found = flag.split("=", 1)[1]
    return found
