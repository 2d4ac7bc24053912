"""Checkpoints of students: a killed training goes on from the last one, to the same bytes."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import Any

from otdd.distill.store import Store, StoreError
from otdd.distill.training import Training

INTERVAL = 60.0  # seconds between checkpoints where no number of epochs is set


class Checkpoint:
    """The checkpoint of one student, a file of the store that is there while it trains.

    Args:
        store: where it is kept.
        name: its file.
        about: what the student depends on beside the settings of the folder; plain values.
        every: epochs between two checkpoints; None: one a minute.
    """

    def __init__(self, store: Store, name: str, about: dict[str, Any], every: int | None) -> None:
        self.store, self.name, self.about, self.every = store, name, about, every
        self._last = time.monotonic()

    def restored(self, begin: Callable[[], Training]) -> Training:
        """The student as the checkpoint has it, or as `begin` makes it where there is none.

        A damaged checkpoint is named in a warning and left out.
        """
        if not self.store.has(self.name):
            return begin()
        try:
            tensors, meta = self.store.read_sealed(self.name)
            if meta["about"] != self.about:
                raise ValueError(f"it is of {meta['about']}")
            training = begin()
            training.load(tensors, meta)
        except (StoreError, KeyError, TypeError, ValueError, RuntimeError) as error:
            path = self.store.path / self.name
            what = " ".join(str(error).split())[:300]
            message = f"{path} is damaged and left out ({what}); this student starts again"
            warnings.warn(message, stacklevel=2)
            return begin()
        return training

    def keep(self, training: Training) -> bool:
        """Writes a checkpoint if one is due after the epoch just finished."""
        now = time.monotonic()
        due = training.epochs % self.every == 0 if self.every else now - self._last >= INTERVAL
        if not due or training.number == training.total:
            return False
        tensors, meta = training.state()
        self.store.write_sealed(self.name, tensors, {**meta, "about": self.about})
        self._last = time.monotonic()
        return True

    def remove(self) -> None:
        """Removes the checkpoint, and the folders that are empty without it."""
        self.store.remove(self.name)
        folder = (self.store.path / self.name).parent
        with contextlib.suppress(OSError):  # not empty, or never made
            while folder != self.store.path:
                folder.rmdir()
                folder = folder.parent
