"""Students of a set, their accuracies, and how far the set is from the real data."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from otdd.distill import geometry, students
from otdd.distill.checkpoints import Checkpoint
from otdd.distill.compare import DIGITS, interval
from otdd.distill.config import RunConfig
from otdd.distill.data import ImageData
from otdd.distill.logs import Board, read_log, write_log
from otdd.distill.match import Outcome, make_loss, reproducible, train_student
from otdd.distill.relabel import Plan, Progress, Teacher, hard_steps, live_steps, stored_steps
from otdd.distill.store import Store
from otdd.distill.training import Step, Training
from otdd.distill.workers import local_device

if TYPE_CHECKING:
    from otdd.distill.codec import Codec

LABELS = {"ce": "hard", "ce-plain": "hard", "kl": "soft", "mse": "soft", "otm": "soft"}


def wants_soft(config: RunConfig) -> bool:
    """Whether students of a run learn from soft labels."""
    return any(LABELS[loss] == "soft" for loss in config.train.losses)


class Student(NamedTuple):
    """One student of a set."""

    arch: str
    loss: str
    seed: int

    @property
    def soft(self) -> bool:
        """Whether it learns from soft labels."""
        return LABELS[self.loss] == "soft"

    def file(self, kind: str, set_name: str) -> str:
        """Its file among the `results`, `geometry`, `logs` or `checkpoints`."""
        ends = {"logs": ".csv", "checkpoints": ".safetensors", "logs/tensorboard": ""}
        stem = f"{LABELS[self.loss]}-{self.loss}-{self.seed}"
        return f"{kind}/{set_name}/{self.arch.replace('/', '_')}/{stem}{ends.get(kind, '.json')}"


def train(
    store: Store,
    data: ImageData,
    config: RunConfig,
    set_name: str,
    wanted: Sequence[Student] | None = None,
    *,
    teachers: Sequence[Teacher] = (),
    progress: Progress | None = None,
) -> None:
    """Train and test students of a set.

    Args:
        store: holds the images and, unless `relabel.store_labels` is off, the soft labels.
        data: gives the test images.
        config: losses, architectures, seeds and protocol.
        set_name: the set to train on.
        wanted: the students; by default all that the store has no result of.
        teachers: needed only where labels are not stored.
        progress: called as progress(text, done, total).
    """
    wanted = missing(store, config, set_name) if wanted is None else wanted
    batches = _Batches(store, data, config, set_name, teachers)
    plan = Plan.of(config, data, len(batches.images))
    ticker = _Ticker(progress, f"train {set_name}", plan.total, len(wanted))
    for student in wanted:
        with reproducible(data.image_shape):
            outcome = _trained(store, data, config, set_name, student, batches, plan, ticker)
        kinds = ("logs", "geometry") if student.soft else ("logs",)
        beside = [student.file(kind, set_name) for kind in kinds]
        result = {"accuracy": outcome.accuracy, "best": outcome.best, "beside": beside}
        store.write_json(student.file("results", set_name), result)
        store.remove(student.file("checkpoints", set_name))
        ticker.student_done()


def _trained(
    store: Store,
    data: ImageData,
    config: RunConfig,
    set_name: str,
    student: Student,
    batches: _Batches,
    plan: Plan,
    ticker: _Ticker,
) -> Outcome:
    """Trains one student from where it was stopped; its log is written."""
    checkpoint = _checkpoint(store, config, set_name, student)
    device = local_device(config.train.device, "train.device")

    def begin() -> Training:
        network = students.make_network(student.arch, data, student.seed).to(device)
        loss = make_loss(student.loss, config.train)
        size = (plan.total, plan.steps_per_epoch)
        return Training(network, loss, config.train, *size, arch=student.arch, seed=student.seed)

    training = checkpoint.restored(begin)
    log, board = student.file("logs", set_name), None
    if config.train.tensorboard:
        name = student.file("logs/tensorboard", set_name)
        board = Board(store, name, training.epochs)

    def after_epoch() -> None:
        if board is not None:
            board.add(training.columns, training.rows[-1])
        if checkpoint.keep(training):
            write_log(store, log, training)

    steps = ticker.count(batches.of(student, training.epochs), training.number)
    images, labels = batches.images, batches.labels
    try:
        outcome = train_student(
            training, images, labels, steps, test=data.test, after_epoch=after_epoch
        )
    finally:
        if board is not None:
            board.close()
    write_log(store, log, training)
    if student.soft:
        last = batches.of(student, plan.epochs - 1)
        found = geometry.against_labels(training.student, images, last, config.train.tau)
        store.write_json(student.file("geometry", set_name), found)
    return outcome


def _checkpoint(store: Store, config: RunConfig, set_name: str, student: Student) -> Checkpoint:
    about = {"set": set_name, **student._asdict()}
    name = student.file("checkpoints", set_name)
    return Checkpoint(store, name, about, config.train.checkpoint_every)


class _Batches:
    """The steps of the students of a set; labels of a single shard stay in memory."""

    def __init__(
        self,
        store: Store,
        data: ImageData,
        config: RunConfig,
        set_name: str,
        teachers: Sequence[Teacher],
    ) -> None:
        tensors = store.read_images(set_name)
        self.images, self.labels = tensors["images"], tensors["labels"]
        self._given = (store, data, config, set_name)
        self._teachers, self._kept = teachers, list[Step]()

    def of(self, student: Student, first: int) -> Iterable[Step]:
        """The steps of a student from epoch `first` on."""
        store, data, config, set_name = self._given
        if not student.soft:
            plain = student.loss == "ce-plain"
            count = len(self.images)
            return hard_steps(count, data, config, student.seed, first, plain=plain)
        if not config.relabel.store_labels:
            return live_steps(self.images, data, self._teachers, config, first)
        if store.has(f"sets/{set_name}/labels/00001.safetensors"):
            return stored_steps(store, data, config, set_name, first)
        self._kept = self._kept or list(stored_steps(store, data, config, set_name))
        return self._kept[first * Plan.of(config, data, len(self.images)).steps_per_epoch :]


def missing(store: Store, config: RunConfig, set_name: str) -> list[Student]:
    """Students of a set of which the store lacks the result, or what was written beside it."""
    return [s for s in all_students(config) if not finished(store, s.file("results", set_name))]


def finished(store: Store, result: str) -> bool:
    """Whether a result is there, and the files that it names.

    Results of earlier versions name none, as there may have been none.
    """
    if not store.has(result):
        return False
    return all(store.has(name) for name in store.read_json(result).get("beside", ()))


def tidy(store: Store, config: RunConfig, set_name: str) -> None:
    """Removes checkpoints of finished students of a set, which a kill may have left, and folders.

    No other process may be training.
    """
    if not store.has("checkpoints"):
        return
    for student in all_students(config):
        if store.has(student.file("results", set_name)):
            _checkpoint(store, config, set_name, student).remove()


def all_students(config: RunConfig) -> list[Student]:
    """The students of every set of a run."""
    train, seeds = config.train, range(config.seeds)
    return [Student(a, loss, seed) for a in train.archs for loss in train.losses for seed in seeds]


def accuracy_rows(store: Store, config: RunConfig) -> list[dict[str, Any]]:
    """The table: one row per set, loss and architecture with at least one finished student."""
    rows = []
    for set_name in config.sets:
        for arch in config.train.archs:
            for loss in config.train.losses:
                seeds = [Student(arch, loss, seed) for seed in range(config.seeds)]
                names = [student.file("results", set_name) for student in seeds]
                found = [store.read_json(name) for name in names if store.has(name)]
                if not found:
                    continue
                own = [s.seed for s, name in zip(seeds, names, strict=True) if store.has(name)]
                runs = [round(r["accuracy"], DIGITS) for r in found]
                best = [r["best"] for r in found]
                rows.append(
                    {
                        "set": set_name,
                        "labels": LABELS[loss],
                        "loss": loss,
                        "arch": arch,
                        "seeds": own,
                        "runs": runs,
                        "mean": round(statistics.fmean(runs), 2),
                        "std": round(statistics.pstdev(runs), 2),
                        "ci95": interval(runs),
                        "best_mean": round(statistics.fmean(best), 2),
                    }
                )
    return rows


def training_accuracies(
    store: Store, config: RunConfig, names: Sequence[str]
) -> dict[tuple[str, str], dict[str, list[list[float]]]]:
    """(Architecture, loss) -> set -> training accuracy by epoch of every finished student."""
    made: dict[tuple[str, str], dict[str, list[list[float]]]] = {}
    for student in all_students(config):
        for name in names:
            log = student.file("logs", name)
            if store.has(student.file("results", name)) and store.has(log):
                sets = made.setdefault((student.arch, student.loss), {})
                sets.setdefault(name, []).append(read_log(store, log)["train_accuracy"])
    return made


def student_geometry(store: Store, config: RunConfig, set_name: str) -> list[dict[str, Any]]:
    """Agreement with the labels and transport to them, of each architecture and soft loss."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for student in all_students(config):
        name = student.file("geometry", set_name)
        if student.soft and store.has(name):
            found.setdefault((student.arch, student.loss), []).append(store.read_json(name))
    return [geometry.summary(arch, loss, those) for (arch, loss), those in found.items()]


def transport_cost(
    images: Tensor, labels: Tensor, data: ImageData, codec: Codec, *, seed: int = 0
) -> float:
    """Mean over classes of `otdd.distill.geometry.class_costs`."""
    return statistics.fmean(geometry.class_costs(images, labels, data, codec, seed=seed).values())


class _Ticker:
    """Reports the steps of all students of a set as one count."""

    def __init__(self, progress: Progress | None, text: str, steps: int, students: int) -> None:
        self.progress, self.text, self.steps, self.total = progress, text, steps, steps * students
        self.finished = 0
        self._report(0)

    def count(self, steps: Iterable[Step], done: int) -> Iterator[Step]:
        for number, step in enumerate(steps, start=done + 1):
            yield step
            if number % 10 == 0 and number < self.steps:
                self._report(number)

    def student_done(self) -> None:
        self.finished += 1
        self._report(0)

    def _report(self, number: int) -> None:
        if self.progress is not None:
            self.progress(self.text, self.finished * self.steps + number, self.total)
