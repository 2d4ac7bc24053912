"""What the ablations share: result files that grow cell by cell, students, paired intervals.

A cell is one student of one set; its key says which. Cells that are in the file are not made again,
and the file is whole at any moment, so a campaign may be stopped and gone on with. Commands with
more seeds or arms go into the same file.
"""

import hashlib
import json
import os
import platform
import statistics
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otdd.distill.config import RunConfig
from otdd.distill.data import ImageData
from otdd.distill.match import accuracy, reproducible, train_student
from otdd.distill.relabel import Plan
from otdd.distill.students import make_network
from otdd.distill.training import Loss, Step, Training

PACKAGES = ("torch", "diffusers", "timm", "numpy", "scikit-learn")


class Cells:
    """The cells of a result file.

    Args:
        path: JSON file, one cell a line; made by the first `add`.
        key: names of what tells cells apart.
        about: what is said of all of them.
    """

    def __init__(self, path: Path, key: tuple[str, ...], about: dict[str, Any]) -> None:
        self.path, self.key = path, key
        found = json.loads(path.read_text()) if path.exists() else {"cells": []}
        self.rows: list[dict[str, Any]] = found.pop("cells")
        self._known = {self._of(row) for row in self.rows}
        self.about = {**found, **about, "machine": machine()}

    def has(self, **key: Any) -> bool:
        """Whether the file has this cell."""
        return self._of(key) in self._known

    def add(self, **cell: Any) -> None:
        """Puts a cell into the file."""
        self.rows.append(cell)
        self._known.add(self._of(cell))
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        head = json.dumps(self.about, indent=1).removesuffix("\n}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(f'{head},\n "cells": [\n{lines}\n ]\n}}\n')
        os.replace(aside, self.path)
        print(cell, flush=True)

    def _of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)


def machine() -> dict[str, Any]:
    """Where and with what the last cells were made."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"
    return {"cpu": cpu, "python": platform.python_version(), **versions}


def train(
    images: Tensor,
    labels: Tensor,
    steps: Iterable[Step],
    loss: Loss,
    data: ImageData,
    config: RunConfig,
    arch: str = "convnet",
) -> dict[str, Any]:
    """Accuracy in percent, after the last step, of a student of the seed of `config`.

    `accuracy` is of the test images; `train_accuracy` of the real training images, which it has not
    seen either. `student` is a digest of its weights: equal ones show arms that are the same.
    """
    total = Plan.of(config, data, len(images)).total
    with reproducible(data.image_shape):
        student = make_network(arch, data, config.seed)
        training = Training(student, loss, config.train, total, arch=arch, seed=config.seed)
        train_student(training, images, labels, steps)
        weights = torch.cat([p.detach().flatten() for p in student.parameters()])
        return {
            "accuracy": round(accuracy(student, data.test), 3),
            "train_accuracy": round(accuracy(student, data.train), 3),
            "student": digest(weights),
        }


def digest(tensor: Tensor) -> str:
    """Tells sets, and students, apart."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:12]


def paired(these: dict[int, float], others: dict[int, float]) -> dict[str, Any]:
    """Mean difference over the seeds that both have, with its 95 % t interval.

    Args:
        these: seed -> accuracy.
        others: the same of what is compared with.
    """
    from scipy.stats import ttest_rel

    seeds = sorted(set(these) & set(others))
    apart = [these[s] - others[s] for s in seeds]
    mean = statistics.fmean(apart) if apart else float("nan")
    low = high = mean
    if len(set(apart)) > 1:  # else there is no spread to speak of
        found = ttest_rel([these[s] for s in seeds], [others[s] for s in seeds])
        low, high = found.confidence_interval(0.95)
    return {"n": len(seeds), "mean": mean, "low": float(low), "high": float(high)}
