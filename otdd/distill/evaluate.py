"""Students of a set, their accuracies, and how far the set is from the real data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otdd.distill import students
from otdd.distill.augment import generator
from otdd.distill.config import RunConfig
from otdd.distill.data import ImageData
from otdd.distill.match import Step, make_loss, reproducible, train_student
from otdd.distill.relabel import Plan, Progress, Teacher, hard_steps, live_steps, stored_steps
from otdd.distill.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from otdd.distill.codec import Codec

LABELS = {"ce": "hard", "kl": "soft", "otm": "soft"}
REAL_LIMIT = 2000
MAX_ITER, TOL = 500, 1e-4  # of the transport cost


def train(
    store: Store,
    data: ImageData,
    config: RunConfig,
    set_name: str,
    *,
    teachers: Sequence[Teacher] = (),
    progress: Progress | None = None,
) -> None:
    """Train and test every student of a set that the store has no result of.

    Args:
        store: holds the images and, unless `relabel.store_labels` is off, the soft labels.
        data: gives the test images.
        config: losses, architectures, seeds and protocol.
        set_name: the set to train on.
        teachers: needed only where labels are not stored.
        progress: called as progress(text, done, total).
    """
    tensors = store.read_images(set_name)
    images, labels = tensors["images"], tensors["labels"]
    total = Plan.of(config, data, len(images)).total
    kept: list[Step] | None = None
    ticker = _Ticker(progress, f"train {set_name}", total, len(_students(config)))
    for arch, loss, seed in _students(config):
        name = result_name(set_name, arch, loss, seed)
        if not store.has(name):
            steps: Iterator[Step] | list[Step]
            if loss == "ce":
                steps = hard_steps(len(images), data, config, seed)
            elif config.relabel.store_labels:
                # Shards of large sets are streamed; labels of one shard stay in memory.
                single = not store.has(f"sets/{set_name}/labels/00001.safetensors")
                if single and kept is None:
                    kept = list(stored_steps(store, data, config, set_name))
                steps = kept or stored_steps(store, data, config, set_name)
            else:
                steps = live_steps(images, data, teachers, config)
            with reproducible(data.image_shape):
                student = students.make_network(arch, data, seed)
                objective = make_loss(loss, config.train)
                seen = ticker.count(steps)
                outcome = train_student(
                    student, images, labels, seen, total, objective, config.train, test=data.test
                )
            store.write_json(name, {"accuracy": outcome.accuracy, "best": outcome.best})
        ticker.student_done()


def missing(store: Store, config: RunConfig, set_name: str) -> list[str]:
    """Losses of the students of a set that the store has no result of."""
    rows = [s for s in _students(config) if not store.has(result_name(set_name, *s))]
    return sorted({loss for _, loss, _ in rows})


def accuracy_rows(store: Store, config: RunConfig) -> list[dict[str, Any]]:
    """The table: one row per set, loss and architecture with at least one finished student."""
    rows = []
    for set_name in config.sets:
        for arch in config.train.archs:
            for loss in config.train.losses:
                names = [result_name(set_name, arch, loss, s) for s in range(config.seeds)]
                found = [store.read_json(name) for name in names if store.has(name)]
                if not found:
                    continue
                runs = [round(r["accuracy"], 2) for r in found]
                best = [round(r["best"], 2) for r in found]
                rows.append(
                    {
                        "set": set_name,
                        "labels": LABELS[loss],
                        "loss": loss,
                        "arch": arch,
                        "runs": runs,
                        "mean": round(statistics.fmean(runs), 2),
                        "std": round(statistics.pstdev(runs), 2),
                        "best_mean": round(statistics.fmean(best), 2),
                    }
                )
    return rows


def transport_cost(
    images: Tensor, labels: Tensor, data: ImageData, codec: Codec, *, seed: int = 0
) -> float:
    """Mean over classes of the transport cost from a set to the real training images.

    Squared Euclidean cost between latents, uniform weights, eps at 1 % of the mean cost, so nearly
    the exact optimum. At most 2000 real images of a class are used.
    """
    from otdd.ops import sinkhorn

    costs = []
    for label in sorted(set(labels.tolist())):
        x = codec.encode(images[labels == label]).flatten(1).double()
        C, eps = transport_problem(x, real_latents(data, codec, label, seed=seed))
        costs.append(float(sinkhorn(C, eps=eps, max_iter=MAX_ITER, tol=TOL).cost))
    return statistics.fmean(costs)


def real_latents(data: ImageData, codec: Codec, label: int, *, seed: int = 0) -> Tensor:
    """Latents of the real training images of a class, at most 2000, float64 (M, D)."""
    real = data.train.images[data.train.labels == label]
    if len(real) > REAL_LIMIT:
        real = real[torch.randperm(len(real), generator=generator("real", seed, label))]
    return codec.encode(real[:REAL_LIMIT]).flatten(1).double()


def transport_problem(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Costs (N, M) between latents (N, D) and (M, D), and the eps to solve with."""
    from otdd.ops import cost_matrix

    C = cost_matrix(x, y, "sqeuclidean")
    return C, 0.01 * float(C.mean().clamp(min=1e-12))


def result_name(set_name: str, arch: str, loss: str, seed: int) -> str:
    """File of the result of one student."""
    return f"results/{set_name}/{arch.replace('/', '_')}/{LABELS[loss]}-{loss}-{seed}.json"


class _Ticker:
    """Reports the steps of all students of a set as one count."""

    def __init__(self, progress: Progress | None, text: str, steps: int, students: int) -> None:
        self.progress, self.text, self.steps, self.total = progress, text, steps, steps * students
        self.finished = 0
        self._report(0)

    def count(self, steps: Iterable[Step]) -> Iterator[Step]:
        for number, step in enumerate(steps, start=1):
            yield step
            if number % 10 == 0 and number < self.steps:
                self._report(number)

    def student_done(self) -> None:
        self.finished += 1
        self._report(0)

    def _report(self, number: int) -> None:
        if self.progress is not None:
            self.progress(self.text, self.finished * self.steps + number, self.total)


def _students(config: RunConfig) -> list[tuple[str, str, int]]:
    train, seeds = config.train, range(config.seeds)
    return [(a, loss, seed) for a in train.archs for loss in train.losses for seed in seeds]
