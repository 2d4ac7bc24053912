"""Flags of the command line to objects of config dataclasses, and refusals in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from dataclasses import MISSING
from typing import Any

from otdd.distill.config import ConfigError, require


def parse(cls: type, flags: list[str], prog: str, about: str, base: dict[str, Any]) -> Any:
    """Flags over `base` over defaults, as an object of `cls`; refusals become `ConfigError`."""
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


def _unchecked(cls: type, values: dict[str, Any], required: Any) -> Any:
    """An object of `cls` in which settings that are still missing are marked for the parser."""
    from otdd.distill.settings import convert_fields

    made = convert_fields(cls, values)
    default = object.__new__(cls)
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
