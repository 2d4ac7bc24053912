"""What a folder of a run holds, read and checked; and what it lacks, with the command for it."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otdd.distill import evaluate
from otdd.distill.config import LOSSES, SETS, ConfigError, RunConfig
from otdd.distill.export import without_paths
from otdd.distill.replay import IncompleteLabels, LabelShards
from otdd.distill.setfiles import CONFIG, DATA, EXPORTED, SetFiles, require_run
from otdd.distill.settings import from_dict
from otdd.distill.store import FORMAT, MANIFEST, Store, StoreError
from otdd.distill.words import averaged

METRICS = "metrics.json"
STEPS = 200  # batches whose soft labels are read of a set


@dataclass(frozen=True)
class Row:
    """Students of one set, loss and architecture: accuracies in % after the last step."""

    set: str
    loss: str
    arch: str
    runs: tuple[float, ...]
    mean: float
    std: float
    best_mean: float

    @property
    def text(self) -> str:
        """Mean and, of several students, deviation."""
        return averaged(self.mean, self.std, len(self.runs))


@dataclass(frozen=True)
class Metrics:
    """Content of `metrics.json`; empty where there is none yet."""

    rows: tuple[Row, ...] = ()
    ot_cost: Mapping[str, float] | None = None
    teachers: tuple[tuple[str, float], ...] = ()
    timings: Mapping[str, float] | None = None
    versions: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Entropy:
    """Entropies in nats of the soft labels of a set.

    Attributes:
        plain: of views of single images.
        mixed: of views that CutMix or Mixup mixed.
        steps: batches that were read.
        total: batches that there are.
    """

    plain: Tensor
    mixed: Tensor
    steps: int
    total: int


@dataclass(frozen=True)
class Found:
    """A run as a report shows it.

    Attributes:
        store: its folder.
        config: its settings.
        settings: the same as nested plain values, of files only their names.
        identity: what its results depend on, with hashes.
        data: facts of the data, as in `data.json`.
        sets: name -> images uint8 (N, C, H, W) and labels (N,), in the order of `SETS`.
        metrics: what was measured.
        entropies: of the sets that have all their soft labels.
        missing: what is not there yet, and the command that makes it.
    """

    store: Store
    config: RunConfig
    settings: dict[str, Any]
    identity: dict[str, Any]
    data: dict[str, Any]
    sets: dict[str, tuple[Tensor, Tensor]]
    metrics: Metrics
    entropies: dict[str, Entropy]
    missing: list[tuple[str, str]]

    @property
    def classes(self) -> list[str]:
        """Names, by label."""
        return list(self.data["classes"])


def gather(folder: str | os.PathLike[str]) -> Found:
    """Read the folder of a run.

    Raises:
        StoreError: no such folder, not of a run, or a file in it is damaged.
    """
    store = Store(folder)
    identity, settings = _identity(store), store.read_json(CONFIG)
    try:
        config = from_dict(RunConfig, {**settings, "out": str(folder)})
    except (ConfigError, TypeError) as error:
        raise _damaged(store, CONFIG, str(error)) from None
    data, metrics = _data(store), _metrics(store)
    files = {n: SetFiles.find(folder, n) for n in SETS if store.has_images(n)}
    sets = {name: _images(found) for name, found in files.items()}
    entropies = {}
    for name, found in files.items():
        entropy = _entropy(found, len(sets[name][1]))
        if entropy is not None:
            entropies[name] = entropy
    missing = list(_missing(store, config, sets, entropies, metrics))
    shown = without_paths({k: v for k, v in settings.items() if k != "out"})
    return Found(
        store, config, shown, without_paths(identity), data, sets, metrics, entropies, missing
    )


def _identity(store: Store) -> dict[str, Any]:
    if not store.path.is_dir():
        what = "a file, no folder of a run" if store.path.exists() else "no such folder"
        raise StoreError(f"{store.path}: {what}")
    if not store.has(MANIFEST):
        raise StoreError(f"{store.path} is no folder of a run: there is no {MANIFEST} in it")
    manifest = store.read_json(MANIFEST)
    if not isinstance(manifest, dict):
        raise _damaged(store, MANIFEST, "it was not written by otdd")
    if manifest.get("format") == EXPORTED:
        raise StoreError(f"{store.path} is an exported set; a report is of the folder of a run")
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("identity"), dict):
        raise _damaged(store, MANIFEST, "it was not written by this version of otdd")
    require_run(store, manifest)
    return dict(manifest["identity"])


def _damaged(store: Store, name: str, what: str) -> StoreError:
    return StoreError(f"{store.path / name} is damaged: {what}")


def _data(store: Store) -> dict[str, Any]:
    data = store.read_json(DATA)
    try:
        texts = [data["name"], data["sha256"], *data["classes"]]
        sizes = data["image_shape"]
        well = all(type(t) is str for t in texts) and all(type(n) is int for n in sizes)
        well = well and len(sizes) == 3 and len(data["classes"]) > 0
        well = well and isinstance(data.get("skipped", []), list)
    except (KeyError, TypeError):
        well = False
    if not well:
        raise _damaged(store, DATA, "expected name, sha256, classes and image_shape")
    return dict(data)


def _metrics(store: Store) -> Metrics:
    if not store.has(METRICS):
        return Metrics()
    raw = without_paths(store.read_json(METRICS))
    try:
        rows = tuple(
            Row(
                _one_of(row["set"], SETS),
                _one_of(row["loss"], LOSSES),
                _text(row["arch"]),
                tuple(_number(v) for v in row["runs"]),
                *(_number(row[k]) for k in ("mean", "std", "best_mean")),
            )
            for row in raw["accuracy"]
        )
        if not all(row.runs for row in rows):
            raise ValueError("at a row without runs")
        return Metrics(
            rows,
            {_text(k): _number(v) for k, v in raw["ot_cost"].items()},
            tuple((_text(t["name"]), _number(t["accuracy"])) for t in raw["teachers"]),
            {_text(k): _number(v) for k, v in raw["timings"].items()},
            {_text(k): _text(v) for k, v in raw["versions"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__} {error}; delete it, and `otdd evaluate` makes it again"
        raise _damaged(store, METRICS, what) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"at {value!r}, expected a text")
    return value


def _one_of(value: Any, accepted: Sequence[str]) -> str:
    if value not in accepted:
        raise ValueError(f"at {value!r}, expected one of {', '.join(accepted)}")
    return str(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"at {value!r}, expected a number")
    return float(value)


def _images(files: SetFiles) -> tuple[Tensor, Tensor]:
    name = f"sets/{files.name}/images.safetensors"
    try:
        images, labels = files.read()
    except (KeyError, RuntimeError) as error:
        if isinstance(error, StoreError):
            raise
        raise _damaged(files.store, name, "expected images and labels") from None
    well = images.dtype == torch.uint8 and labels.dtype == torch.int64 and len(labels) > 0
    if not well or not 0 <= int(labels.min()) <= int(labels.max()) < len(files.data["classes"]):
        raise _damaged(files.store, name, "expected uint8 images of the classes in data.json")
    return images, labels


def _entropy(files: SetFiles, count: int) -> Entropy | None:
    if not files.labels:
        return None
    try:
        shards = LabelShards(files, count)
    except IncompleteLabels:
        return None
    total = len(shards)
    chosen = torch.linspace(0, total - 1, min(STEPS, total)).round().long().tolist()
    plain: list[Tensor] = []
    mixed: list[Tensor] = []
    for number in chosen:
        step = shards.step(number)
        assert step.teacher is not None
        log = step.teacher.double().log_softmax(-1)
        (mixed if step.batch.mixed else plain).append(-(log.exp() * log).sum(-1))
    kinds = [torch.cat(part) if part else torch.zeros(0) for part in (plain, mixed)]
    if not all(bool(part.isfinite().all()) for part in kinds):
        raise _damaged(files.store, files.labels[0], "soft labels that are no finite numbers")
    return Entropy(kinds[0], kinds[1], len(chosen), total)


def _missing(
    store: Store,
    config: RunConfig,
    sets: Mapping[str, Any],
    entropies: Mapping[str, Any],
    metrics: Metrics,
) -> Iterator[tuple[str, str]]:
    out = shlex.quote(config.out)
    lacking = [name for name in config.sets if name not in sets]
    if lacking:
        yield f"images of {', '.join(lacking)}", f"otdd sample --out {out}"
    soft = evaluate.wants_soft(config)
    lacking = [name for name in config.sets if name in sets and name not in entropies]
    if lacking and soft and config.relabel.store_labels:
        yield f"soft labels of {', '.join(lacking)}", f"otdd relabel --out {out}"
    lacking = [n for n in config.sets if n in sets and evaluate.missing(store, config, n)]
    if lacking:
        yield f"students of {', '.join(lacking)}", f"otdd train --out {out}"
    costs, rows = metrics.ot_cost or {}, {row.set for row in metrics.rows}
    trained = [n for n in config.sets if store.has(f"results/{n}")]
    lacking = [n for n in config.sets if n in sets and n not in costs]
    if lacking or any(name not in rows for name in trained):
        yield "the table and the transport costs", f"otdd evaluate --out {out}"
