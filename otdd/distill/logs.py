"""Logs of students: a CSV of every one, and TensorBoard where it is asked for.

`logs/SET/ARCH/hard-ce-0.csv` has a line per epoch (`read_log` reads it):

* ``epoch``: from 1; ``lr``: learning rate of its first step; ``loss``: mean over its steps.
* The terms of a loss that has several, unweighted: ``ce``, ``mse`` or ``kl``, ``ot``, and the
  weight ``beta_2``; means over the steps.
* ``train_accuracy``: percentage of augmented images on which the student, as it is before the
  step, is right about the class that fills most of the image.
* ``test_accuracy``: percentage, of the averaged weights; empty where the epoch ended untested.
* ``seconds``: of the epoch, tests among them.

The file is written with every checkpoint and when the student is finished.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from otdd.distill.config import ConfigError
from otdd.distill.store import Store

if TYPE_CHECKING:
    from otdd.distill.training import Training


def write_log(store: Store, name: str, training: Training) -> None:
    """Write the log of a student."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(training.columns)
    for row in training.rows:
        writer.writerow([int(row[0]), *("" if math.isnan(v) else f"{v:.6g}" for v in row[1:])])
    store.write_bytes(name, text.getvalue().encode())


def read_log(store: Store, name: str) -> dict[str, list[float]]:
    """Columns of a log by name; NaN where a cell is empty."""
    text = (store.path / name).read_text(encoding="utf-8")
    head, *rows = csv.reader(io.StringIO(text))
    columns = zip(*rows, strict=True) if rows else ([] for _ in head)
    made = ([float(cell) if cell else math.nan for cell in column] for column in columns)
    return dict(zip(head, made, strict=True))


def check_tensorboard(wanted: bool) -> None:
    """Raise a `ConfigError` if TensorBoard is asked for and not there."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "train.tensorboard: True is not accepted without its package: pip install tensorboard"
        )


class Board:
    """The rows of a student in TensorBoard, as they come; a resumed one goes on.

    Args:
        store: where `logs/tensorboard` is.
        name: folder of the student.
        first: epochs that are finished already; what is there of later ones is hidden.
    """

    def __init__(self, store: Store, name: str, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(store.path / name), purge_step=first + 1)

    def add(self, columns: Sequence[str], row: Sequence[float]) -> None:
        """Add the row of an epoch."""
        for column, value in zip(columns[1:], row[1:], strict=True):
            if not math.isnan(value):
                self._writer.add_scalar(column, value, int(row[0]))

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
