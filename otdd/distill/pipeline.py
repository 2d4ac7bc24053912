"""All stages of a run, each from the store to the store."""

from __future__ import annotations

import platform
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

from otdd import __version__
from otdd.distill.config import ConfigError, RunConfig, require
from otdd.distill.inputs.problems import warn
from otdd.distill.prepare import SAMPLED, found_again, prepare
from otdd.distill.setfiles import CONFIG, DATA, TEACHERS, describe
from otdd.distill.settings import to_dict
from otdd.distill.store import Store
from otdd.distill.workers import Workers, local_device

if TYPE_CHECKING:
    from torch import Tensor

    from otdd.distill.codec import Codec
    from otdd.distill.data import ImageData
    from otdd.distill.generator import Generator
    from otdd.distill.latents import Latents
    from otdd.distill.relabel import Teacher

Progress = Callable[[str, int, int], None]

METRICS = "metrics.json"
GRID = "grid.png"
CURVES = "curves.png"
PACKAGES = (
    "torch",
    "numpy",
    "diffusers",
    "timm",
    "safetensors",
    "scikit-learn",
    "pillow",
    "pyarrow",
)
DOUBTFUL = 25.0  # percentage points that teachers see less in a set than in the test images
STAGES = ("sample", "relabel", "train", "evaluate")
SHARED = ("sample", "train")  # by several processes


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
    workers: Workers = field(default_factory=Workers)
    progress: Progress = _silent
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        config: RunConfig,
        progress: Progress | None = None,
        workers: Workers | None = None,
        *,
        only_sample: bool = False,
    ) -> Run:
        """Check everything that can be checked before any work, then open the store.

        Of several processes the first makes the folder and holds its lock. With `only_sample` the
        images of an encoded folder stay in their files.

        Raises:
            ConfigError, DataError, GeneratorError, StoreError: what is wrong, in one message.
        """
        progress, workers = progress or _silent, workers or Workers()
        progress("prepare", 0, 1)
        device = local_device(config.sample.device)
        local_device(config.train.device, "train.device")
        made = prepare(config, only_sample=only_sample)
        if made.generator is not None:
            import torch

            made.generator.to(device, getattr(torch, config.sample.precision))
            if config.sample.compile:
                made.generator.transformer.compile()
        store = _open_store(config, made.known, made.data, workers)
        try:
            run = cls(config, store, made.data, made.generator, made.latents, workers, progress)
            if store.has(METRICS):
                run.timings = dict(store.read_json(METRICS)["timings"])
            progress("prepare", 1, 1)
        except BaseException:  # a process that lives on would keep its lock
            store.close()
            raise
        return run

    def sample(self) -> None:
        """Stage 1: the images of every set."""
        from otdd.distill import baselines, sample, update

        for name in self.config.sets:
            if self.workers.share(self.store.has_images(name)):
                if self.workers.first:
                    self.store.remove(f"sets/{name}/groups")  # a kill may have come before this
                    self.store.restore_pictures(name)
                continue
            judged = name == "otg" and update.judged_by_teachers(self.config)
            teachers = self._shared_teachers() if judged else ()  # they have their own clock
            with self._timed(f"sample {name}"):
                if name in SAMPLED:
                    assert self.generator is not None  # `prepare` has loaded it
                    sample.sample(
                        self.store,
                        self.data,
                        self.generator,
                        self.config,
                        set_name=name,
                        latents=self.latents,
                        teachers=teachers,
                        workers=self.workers,
                        progress=lambda text, *count: self.progress(f"sample {text}", *count),
                    )
                elif self.workers.first:
                    baselines.baselines(self.store, self.data, self.config, name, codec=self._codec)

    def relabel(self) -> None:
        """Stage 2: soft labels of every set, or the teachers alone where none are stored."""
        from otdd.distill import choice, evaluate, relabel

        if not evaluate.wants_soft(self.config):
            return
        if not self.config.relabel.store_labels:
            _ = choice.kept(self.store) or self.teachers
            return
        for name in self._with_images():
            if not relabel.relabelled(self.store, self.data, self.config, name):
                teachers = self.teachers  # before the clock: they have their own
                with self._timed(f"relabel {name}"):
                    relabel.relabel(
                        self.store, self.data, teachers, self.config, name, self.progress
                    )
                self._doubt(name, teachers)

    def train(self) -> None:
        """Stage 3: students of every set, trained and tested; several processes share them."""
        from otdd.distill import evaluate, relabel

        stored = self.config.relabel.store_labels
        left: dict[str, list[evaluate.Student]] = {}
        if self.workers.first:  # what is missing is looked for once, before anyone makes it
            for name in self._with_images():
                left[name] = evaluate.missing(self.store, self.config, name)
        left = self.workers.share(left)
        for name in left:
            labelled = not stored or relabel.relabelled(self.store, self.data, self.config, name)
            if not labelled and any(student.soft for student in left[name]):
                raise ConfigError(f"set {name} has no soft labels yet; run `otdd relabel` first")
        soft = any(student.soft for students in left.values() for student in students)
        teachers = self._shared_teachers() if soft and not stored else ()
        mine = self.workers.part([(name, s) for name, students in left.items() for s in students])
        for name in left:
            wanted = [student for where, student in mine if where == name]
            if wanted:
                with self._timed(f"train {name}"):
                    evaluate.train(
                        self.store,
                        self.data,
                        self.config,
                        name,
                        wanted,
                        teachers=teachers,
                        progress=self.progress,
                    )
        self.workers.wait()
        for name in left if self.workers.first else ():
            evaluate.tidy(self.store, self.config, name)

    def evaluate(self) -> dict[str, Any]:
        """Gather what is known of the sets, with pictures and a card; returns metrics.json."""
        from otdd.distill import curves, evaluate, hf, plots, relabel

        names = self._with_images()
        sets = {name: self.store.read_images(name) for name in names}
        pairs = {name: (tensors["images"], tensors["labels"]) for name, tensors in sets.items()}
        known, reports = self._known("geometry", {}), {}
        with self._timed("evaluate"):
            for number, name in enumerate(names, start=1):
                reports[name] = self._geometry(name, pairs[name], known.get(name, {}))
                self.progress("transport cost", number, len(names))
            if not self.store.has(GRID) or set(reports) != set(known):
                self.store.write_bytes(GRID, plots.grid(pairs, self.data.classes))
            if runs := evaluate.training_accuracies(self.store, self.config, names):
                self.store.write_bytes(CURVES, curves.curves(runs))
        metrics = self._write_metrics(reports)
        labelled = {
            name: relabel.relabelled(self.store, self.data, self.config, name) for name in names
        }
        hf.describe_run(self.store, labelled, self.store.read_json(CONFIG), metrics)
        return metrics

    @cached_property
    def teachers(self) -> list[Teacher]:
        """The teachers of the run, trained and chosen when first asked for."""
        from otdd.distill import choice, relabel

        with self._timed("teachers"):
            made = relabel.make_teachers(self.store, self.data, self.config, self.progress)
            return choice.choose(self.store, self.data, self.config, made, self.progress)

    def _shared_teachers(self) -> list[Teacher]:
        """The teachers, trained by the first process and read by the others."""
        if self.workers.first:
            _ = self.teachers
        self.workers.wait()
        return self.teachers

    @property
    def _codec(self) -> Codec:
        from otdd.distill.codec import PixelCodec

        return self.generator.codec if self.generator is not None else PixelCodec()

    def _with_images(self) -> list[str]:
        names: list[str] = [name for name in self.config.sets if self.store.has_images(name)]
        if not names:
            raise ConfigError(f"{self.config.out} holds no images yet; run `otdd sample` first")
        return names

    def _geometry(
        self, name: str, pair: tuple[Tensor, Tensor], known: dict[str, Any]
    ) -> dict[str, Any]:
        """The geometry report of a set; what is known of it already is not computed again."""
        from otdd.distill import evaluate, geometry, relabel

        costs, entropy = known.get("class_transport"), known.get("label_entropy")
        if costs is None:
            made = geometry.class_costs(*pair, self.data, self._codec, seed=self.config.seed)
            costs = {self.data.classes[label]: round(cost, 6) for label, cost in made.items()}
        shard, count = relabel.shard_name(name, 0), self.data.num_classes
        if entropy is None and self.store.has(shard):
            entropy = geometry.label_entropy(self.store, shard, count)
        students = evaluate.student_geometry(self.store, self.config, name)
        return geometry.report(costs, entropy, count, students)

    def _doubt(self, name: str, teachers: Sequence[Teacher]) -> None:
        """Remarks on a set whose soft labels contradict its images."""
        from otdd.distill import geometry, relabel

        labels, shard = self.store.read_images(name)["labels"], relabel.shard_name(name, 0)
        right = geometry.label_accuracy(self.store, shard, labels, self.data.num_classes)
        usual = statistics.fmean(teacher.accuracy for teacher in teachers)
        if right is not None and right < usual - DOUBTFUL:
            hint = "; weaker guidance, --sample.guidance.strength, may help" * (name == "otg")
            known = f"in {right:.0f} % of its views, but in {usual:.0f} % of the test images"
            warn(f"set {name}", f"the teachers see the class of an image {known}{hint}")

    def _teacher_facts(self) -> list[dict[str, Any]]:
        known = self._known("teachers", [])
        labelled = any(self.store.has(f"sets/{name}/labels") for name in self.config.sets)
        if labelled and not self.store.has(TEACHERS) and (not known or self.store.has("teachers")):
            _ = self.teachers  # what was said of them was lost: it is said again
        if not self.store.has(TEACHERS):
            return known
        facts = self.store.read_json(TEACHERS)["teachers"]  # their weights may be gone
        return [{"name": t["name"], "accuracy": t["accuracy"]} for t in facts]

    def _known(self, key: str, default: Any) -> Any:
        return (
            self.store.read_json(METRICS).get(key, default) if self.store.has(METRICS) else default
        )

    def _timed(self, name: str) -> _Timer:
        return _Timer(self, name)

    def _write_metrics(self, reports: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes metrics.json; without new reports those that it has stay there."""
        from otdd.distill import compare, ddranking, evaluate

        rows, teachers = evaluate.accuracy_rows(self.store, self.config), self._teacher_facts()
        costs = self._known("ot_cost", {})
        if reports is not None:
            means = {n: statistics.fmean(r["class_transport"].values()) for n, r in reports.items()}
            costs = {name: round(cost, 4) for name, cost in means.items()}
        metrics = {
            "accuracy": rows,
            "comparisons": compare.comparisons(rows),
            "dd_ranking": ddranking.scores(rows, teachers),
            "ot_cost": costs,
            "geometry": self._known("geometry", {}) if reports is None else reports,
            "teachers": teachers,
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

    Raises:
        ConfigError, DataError, GeneratorError, StoreError: what is wrong, in one message.
    """
    accepted = "a RunConfig, which otdd.distill.resolve makes of settings"
    require(isinstance(config, RunConfig), "config", config, accepted)
    return run_stages(config, STAGES, progress)


def run_stages(
    config: RunConfig,
    stages: tuple[str, ...],
    progress: Progress | None = None,
    on_stage: Callable[[str, float | None], None] | None = None,
) -> dict[str, Any]:
    """Some of the stages, in the order given; each continues where it was stopped.

    Of several processes all sample and train, and the first alone does the rest; the others return
    nothing. `on_stage` is called as on_stage(name, None) before a stage and with its seconds after.
    """
    from otdd.distill.match import undisturbed

    with undisturbed():
        workers = Workers.join()
        work = Run.open(config, progress, workers, only_sample=stages == ("sample",))
        result = None
        with work.store:
            for stage in stages:
                if workers.first or stage in SHARED:
                    start = time.perf_counter()
                    if on_stage is not None:
                        on_stage(stage, None)
                    result = getattr(work, stage)()
                    if on_stage is not None:
                        on_stage(stage, time.perf_counter() - start)
            workers.leave()
            if not workers.first:
                return {}
            return result if result is not None else work._write_metrics()


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


def _open_store(
    config: RunConfig, known: dict[str, Any], data: ImageData, workers: Workers
) -> Store:
    if not workers.first:
        workers.wait()
        store = Store(config.out)
        store.check(known)
        store.sums.keep(f"{workers.rank}-{uuid.uuid4().hex[:8]}")
        return store
    store = Store.open(config.out, known, lock=True)
    try:
        store.write_json(CONFIG, found_again(config))
        if not store.has(DATA):  # of the same data: the store has compared its hash
            store.write_json(DATA, describe(data))
        workers.wait()
    except BaseException:
        store.close()
        raise
    return store


def _versions() -> dict[str, str]:
    found = {"otdd": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
