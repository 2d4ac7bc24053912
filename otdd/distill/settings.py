"""From flags, YAML files and presets to a checked `RunConfig`, and back to plain values."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from otdd.distill.config import PRESETS, PROTOCOLS, ConfigError, RunConfig, require

MOST_VALUES = 10_000  # in a YAML file
# What may change without changing any finished result of a folder: more seeds, sets, losses or
# architectures add rows; the rest says where things are, or how they were asked for.
# Data, generator, surrogate and latents count by their content.
FREE_FIELDS = (
    *("out", "preset", "seeds", "sets", "generator", "latents", "train.losses", "train.archs"),
    *("sample.influence.surrogate", "sample.memory", "skip_bad_images"),
    *("train.protocol", "train.checkpoint_every", "train.tensorboard"),
)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config, ready for JSON or YAML."""
    out = dataclasses.asdict(config)
    return typing.cast(dict[str, Any], _plain(out))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict as one level of dotted keys."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that finished results depend on, as dotted keys."""
    return {k: v for k, v in flatten(to_dict(config)).items() if k not in FREE_FIELDS}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, nested dicts merged."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        out[key] = value
    return out


def from_dict(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Make a config dataclass from nested plain values, checking keys and types.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of the wrong kind.
    """
    made = convert_fields(cls, values, prefix)
    for f in dataclasses.fields(cls):
        name = f.name
        free = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if free and name not in values:
            raise ConfigError(f"{prefix}{name}: missing; give --{prefix}{name} or set it in a file")
    try:
        return cls(**made)
    except ConfigError as error:
        raise error if not prefix else ConfigError(f"{prefix}{error}") from None


def convert_fields(cls: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The given settings of a config dataclass in their types; those not given stay away.

    Raises:
        ConfigError: an unknown key, or a value of the wrong kind.
    """
    hints = typing.get_type_hints(cls)
    require_known(cls, values, prefix)
    return {k: _convert(hints[k], v, prefix + k) for k, v in values.items()}


def require_known(cls: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a `ConfigError` for a key that is no setting of a config dataclass."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            names = ", ".join(prefix + k for k in known)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {names}"
            raise ConfigError(f"{prefix}{key}: unknown setting; {hint}")


def _convert(kind: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), key, value, "a group of settings")
        return from_dict(typing.cast(type, kind), value, f"{key}.")
    if origin is Literal:
        if isinstance(value, bool) and "on" in args:  # what YAML makes of the words
            value = "on" if value else "off"
        require(value in args, key, value, f"one of {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        words = [w for a in args if typing.get_origin(a) is Literal for w in typing.get_args(a)]
        if value in words or (value is None and type(None) in args):
            return value
        require(not words or not isinstance(value, str), key, value, f"a number or {words[:1]}")
        return _convert(args[0], value, key)
    if origin is tuple:
        value = [value] if isinstance(value, str) else value
        require(isinstance(value, list | tuple), key, value, "a list")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, key) for v in value)
        require(len(value) == len(args), key, value, f"{len(args)} values")
        return tuple(_convert(a, v, key) for a, v in zip(args, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 takes 1e-3 for a text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, float):
        require(math.isfinite(value), key, value, "a finite number")
    right = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    require(right, key, value, names[kind])
    return value


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML or JSON file as nested dicts.

    Raises:
        ConfigError: the file is missing, unreadable, not a mapping, or has a name twice in one.
    """
    import yaml

    try:
        if not Path(path).is_file():
            raise ConfigError(f"config: cannot read {path}: no regular file of this name")
        text = Path(path).read_text(encoding="utf-8-sig")
        try:  # PyYAML refuses JSON's tabs, and reads its escape of a pictograph as two halves
            loaded = json.loads(text, object_pairs_hook=_once)
        except json.JSONDecodeError:
            loaded = _yaml(text)
        size = _size(loaded)
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"config: {path} is neither YAML nor JSON: {_problem(error)}") from None
    require(loaded is None or isinstance(loaded, dict), "config", str(path), "a YAML mapping")
    accepted = f"at most {MOST_VALUES} values, repeated ones counted"
    require(size <= MOST_VALUES, "config", str(path), accepted)
    return dict(loaded or {})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that is there twice the first value would be lost."""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice")
    return dict(pairs)


def _yaml(text: str) -> Any:
    """What a YAML text says, every name of a mapping once, which PyYAML does not ask for."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML brings no types
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[Any] = set()
            for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
                if key.value in seen:
                    problem = f"{key.value} is there twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add(key.value)
            return node

    return yaml.load(text, Loader)


def _problem(error: Exception) -> str:
    """What is wrong with a YAML file, and where."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', error)}"


def _size(value: Any, known: dict[int, int] | None = None) -> int:
    """Values in a nest, each as often as aliases repeat it: ten lines of them can be a billion."""
    known = {} if known is None else known
    if not isinstance(value, Mapping | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # of one that holds itself
        inside = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in inside)
    return known[id(value)]


def preset(name: str | None) -> dict[str, Any]:
    """Settings of a preset, its name among them; nothing for None."""
    ok = name is None or (isinstance(name, str) and name in PRESETS)
    require(ok, "preset", name, f"one of {', '.join(PRESETS)}")
    return {} if name is None else {**PRESETS[name], "preset": name}


def protocol(name: str | None, ipc: Any) -> dict[str, Any]:
    """Settings of a training protocol for so many images per class; nothing for None.

    An `ipc` that is no number counts as 1 here and is refused with the other settings.
    """
    ok = name is None or (isinstance(name, str) and name in PROTOCOLS)
    require(ok, "train.protocol", name, f"one of {', '.join(PROTOCOLS)}")
    if name is None:
        return {}
    try:
        count = int(str(ipc))
    except ValueError:
        count = 1
    return merge(PROTOCOLS[name](count), {"train": {"protocol": name}})


def resolve(flags: Mapping[str, Any] | None = None, *, file: str | Path | None = None) -> RunConfig:
    """Config from defaults, then a preset, a protocol, a file and flags, the later the stronger.

    Args:
        flags: nested settings given by the caller; `preset` and `train.protocol` among them name
            the preset and the protocol.
        file: YAML file of settings.
    """
    flags = flags or {}
    filed = load_yaml(file) if file is not None else {}
    chosen = preset(flags.get("preset") or filed.get("preset"))
    given = merge(filed, flags)
    chosen = merge(chosen, protocol(named_protocol(given), given.get("ipc")))
    return typing.cast(RunConfig, from_dict(RunConfig, merge(chosen, given)))


def named_protocol(settings: Mapping[str, Any]) -> str | None:
    """The protocol that settings name, if any."""
    train = settings.get("train")
    return train.get("protocol") if isinstance(train, Mapping) else None
