"""All stages of a run, each from the store to the store."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otdd import __version__
from otdd.distill.config import ConfigError, RunConfig
from otdd.distill.settings import identity, to_dict
from otdd.distill.store import Store

if TYPE_CHECKING:
    from otdd.distill.codec import Codec
    from otdd.distill.data import ImageData
    from otdd.distill.generator import Generator
    from otdd.distill.latents import Latents
    from otdd.distill.relabel import Teacher

Progress = Callable[[str, int, int], None]

CONFIG = "config.json"
METRICS = "metrics.json"
GRID = "grid.png"
SAMPLED = ("otg", "unguided")
PACKAGES = ("torch", "numpy", "diffusers", "timm", "safetensors", "scikit-learn", "pillow")
STAGES = ("sample", "relabel", "train", "evaluate")


def _silent(text: str, done: int, total: int) -> None:
    pass


@dataclass
class Run:
    """One run: its settings, its store, and what the stages share.

    Use `Run.open`, then the stages in order, or any of them on a store that has what it needs.
    """

    config: RunConfig
    store: Store
    data: ImageData
    generator: Generator | None
    latents: Latents | None = None
    progress: Progress = _silent
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: RunConfig, progress: Progress | None = None) -> Run:
        """Check everything that can be checked before any work, then open the store.

        Raises:
            ConfigError, DataError, GeneratorError, StoreError: what is wrong, in one message.
        """
        progress = progress or _silent
        progress("prepare", 0, 1)
        known = {k: v for k, v in identity(config).items() if k != "data"}
        Store(config.out).check(known)
        from otdd.distill.data import load_data

        data = load_data(
            config.data, resolution=config.resolution, seed=config.seed, ipc=config.ipc
        )
        known |= {"data": data.name, "data_sha256": data.fingerprint}
        Store(config.out).check(known)
        _check_networks(config, data)
        generator = latents = None
        if config.generator is not None or any(name in SAMPLED for name in config.sets):
            generator = _load_generator(config, data)
            try:
                generator.scheduler(config.sample.scheduler, config.sample.steps)
            except ValueError as error:
                raise ConfigError(f"sample.steps: {error}") from None
            known["generator_sha256"] = _digest(generator)
            known |= _check_terms(config, data)
            if config.latents is not None and "otg" in config.sets:
                latents = _load_latents(config, data, generator)
            known["latents_sha256"] = latents.digest if latents is not None else None
        store = Store.open(config.out, known, lock=True)
        resolved = to_dict(config)
        if Path(config.data).is_dir():
            resolved["data"] = str(Path(config.data).resolve())
        store.write_json(CONFIG, {k: v for k, v in resolved.items() if k != "out"})
        run = cls(config, store, data, generator, latents, progress)
        if store.has(METRICS):
            run.timings = dict(store.read_json(METRICS)["timings"])
        progress("prepare", 1, 1)
        return run

    def sample(self) -> None:
        """Stage 1: the images of every set."""
        from otdd.distill import baselines, sample

        for name in self.config.sets:
            if self.store.has_images(name):
                self.store.remove(f"sets/{name}/groups")  # a kill may have come before this
                continue
            with self._timed(f"sample {name}"):
                if name in SAMPLED:
                    sample.sample(
                        self.store,
                        self.data,
                        self.generator,
                        self.config,
                        set_name=name,
                        latents=self.latents,
                        progress=lambda text, *count: self.progress(f"sample {text}", *count),
                    )
                else:
                    baselines.baselines(self.store, self.data, self.config, name, codec=self._codec)

    def relabel(self) -> None:
        """Stage 2: soft labels of every set."""
        from otdd.distill import relabel

        if not self._wants_soft() or not self.config.relabel.store_labels:
            return
        for name in self._with_images():
            if not relabel.relabelled(self.store, self.data, self.config, name):
                teachers = self.teachers  # before the clock: they have their own
                with self._timed(f"relabel {name}"):
                    relabel.relabel(
                        self.store, self.data, teachers, self.config, name, self.progress
                    )

    def train(self) -> None:
        """Stage 3: students of every set, trained and tested."""
        from otdd.distill import evaluate, relabel

        stored = self.config.relabel.store_labels
        for name in self._with_images():
            left = evaluate.missing(self.store, self.config, name)
            soft = [loss for loss in left if loss != "ce"]
            labelled = not stored or relabel.relabelled(self.store, self.data, self.config, name)
            if soft and not labelled:
                raise ConfigError(f"set {name} has no soft labels yet; run `otdd relabel` first")
            if left:
                teachers = self.teachers if soft and not stored else ()
                with self._timed(f"train {name}"):
                    evaluate.train(
                        self.store,
                        self.data,
                        self.config,
                        name,
                        teachers=teachers,
                        progress=self.progress,
                    )

    def evaluate(self) -> dict[str, Any]:
        """Gather table, transport costs and picture; returns the content of metrics.json."""
        from otdd.distill import evaluate, plots

        names = self._with_images()
        sets = {name: self.store.read_images(name) for name in names}
        pairs = {name: (tensors["images"], tensors["labels"]) for name, tensors in sets.items()}
        costs = self._known("ot_cost", {})
        with self._timed("evaluate"):
            for number, name in enumerate(names, start=1):
                if name not in costs:
                    cost = evaluate.transport_cost(
                        *pairs[name], self.data, self._codec, seed=self.config.seed
                    )
                    costs[name] = round(cost, 4)
                self.progress("transport cost", number, len(names))
            if not self.store.has(GRID) or set(costs) != set(self._known("ot_cost", {})):
                self.store.write_bytes(GRID, plots.grid(pairs, self.data.classes))
        return self._write_metrics({name: costs[name] for name in names})

    @cached_property
    def teachers(self) -> list[Teacher]:
        """The teachers of the run, trained when first asked for."""
        from otdd.distill import relabel

        with self._timed("teachers"):
            return relabel.make_teachers(self.store, self.data, self.config, self.progress)

    @property
    def _codec(self) -> Codec:
        from otdd.distill.codec import PixelCodec

        return self.generator.codec if self.generator is not None else PixelCodec()

    def _with_images(self) -> list[str]:
        names = [name for name in self.config.sets if self.store.has_images(name)]
        if not names:
            raise ConfigError(f"{self.config.out} holds no images yet; run `otdd sample` first")
        return names

    def _wants_soft(self) -> bool:
        return any(loss != "ce" for loss in self.config.train.losses)

    def _teacher_facts(self) -> list[dict[str, Any]]:
        if "teachers" not in self.__dict__:  # not asked for this time
            return self._known("teachers", [])
        return [{"name": t.name, "accuracy": t.accuracy} for t in self.teachers]

    def _known(self, key: str, default: Any) -> Any:
        return (
            self.store.read_json(METRICS).get(key, default) if self.store.has(METRICS) else default
        )

    def _timed(self, name: str) -> _Timer:
        return _Timer(self, name)

    def _write_metrics(self, costs: dict[str, float]) -> dict[str, Any]:
        from otdd.distill import evaluate

        metrics = {
            "accuracy": evaluate.accuracy_rows(self.store, self.config),
            "ot_cost": costs,
            "teachers": self._teacher_facts(),
            "timings": {k: round(v, 2) for k, v in self.timings.items()},
            "versions": _versions(),
            "config": to_dict(self.config),
        }
        self.store.write_json(METRICS, metrics)
        return metrics


def run(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Distil a data set: images, soft labels, students, table. Continues an interrupted run.

    Args:
        config: settings; `config.out` is the folder of the store.
        progress: called as progress(text, done, total).

    Returns:
        What `metrics.json` holds.
    """
    return run_stages(config, STAGES, progress)


def run_stages(
    config: RunConfig, stages: tuple[str, ...], progress: Progress | None = None
) -> dict[str, Any]:
    """Some of the stages, in the order given; each continues where it was stopped."""
    work = Run.open(config, progress)
    with work.store:
        for stage in stages:
            result = getattr(work, stage)()
        return result if result is not None else work._write_metrics(work._known("ot_cost", {}))


@dataclass
class _Timer:
    """Adds the seconds of a block to the timings, also across interrupted runs."""

    run: Run
    name: str

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._start
        self.run.timings[self.name] = self.run.timings.get(self.name, 0.0) + spent


def _check_networks(config: RunConfig, data: ImageData) -> None:
    from otdd.distill.relabel import teacher_names
    from otdd.distill.students import check_network

    for arch in config.train.archs:
        check_network(arch, data)
    for teacher in teacher_names(config):
        arch, _, file = teacher.partition("=")
        if file and not Path(file).is_file():
            raise ConfigError(f"relabel.teachers: no file {file}")
        if teacher.startswith("timm:"):
            _check_timm(teacher.removeprefix("timm:"))
        else:
            check_network(arch, data)


def _check_terms(config: RunConfig, data: ImageData) -> dict[str, str]:
    """What the guided set depends on beside settings, data and generator."""
    influence = config.sample.influence
    if "otg" not in config.sets or influence.strength == 0:
        return {}
    from otdd.distill.surrogate import surrogate_digest
    from otdd.distill.update import load_wanted

    load_wanted(config.sample, data)
    return {"surrogate_sha256": surrogate_digest(influence.surrogate or "")}


def _check_timm(name: str) -> None:
    from otdd import _torchvision

    _torchvision.repair()
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"relabel.teachers: timm has no model {name!r}")


def _load_generator(config: RunConfig, data: ImageData) -> Generator:
    from otdd import _torchvision

    _torchvision.repair()
    from otdd.distill.generator import load_generator

    return load_generator(config.generator, data)


def _load_latents(config: RunConfig, data: ImageData, generator: Generator) -> Latents:
    from otdd.distill.latents import Latents

    latents = Latents(config.latents or "")
    latents.check(data, generator.codec)
    return latents


def _digest(generator: Generator) -> str:
    digest = hashlib.sha256()
    about = [generator.scheduler_config, generator.codec.config(), list(generator.classes)]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    tensors = {**generator.transformer.state_dict(), **generator.codec.tensors()}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"otdd": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
