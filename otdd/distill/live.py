"""Soft labels of a run that stores none: its teachers make them again as they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otdd.distill import students
from otdd.distill.choice import kept
from otdd.distill.config import ConfigError, RunConfig
from otdd.distill.data import Facts, ImageData, LabeledImages
from otdd.distill.match import reproducible, undisturbed
from otdd.distill.relabel import Plan, Teacher, digest_of, live_step
from otdd.distill.setfiles import CONFIG, TEACHERS, SetFiles
from otdd.distill.settings import from_dict
from otdd.distill.store import Store, StoreError
from otdd.distill.training import Step


class LiveLabels:
    """The steps of a set, each labelled when it is asked for; as `replay.LabelShards`.

    On the machine of the run, with as many threads, the logits are those that would have been
    stored, to the bit.

    Args:
        files: of the set.
        images: of the set, uint8 (N, C, H, W).
        device: of the teachers, who label there.
        verify: compare what is read with its hash in `SHA256SUMS`.

    Attributes:
        epochs: how many there are with labels of their own.
        steps_per_epoch: batches of one epoch.

    Raises:
        StoreError: the teachers are not there, or what is there is damaged.
    """

    def __init__(
        self, files: SetFiles, images: Tensor, device: str, *, verify: bool = True
    ) -> None:
        store = files.store
        if verify:
            store.sums.verify([TEACHERS])
        facts = kept(store)
        if not facts:
            raise StoreError(
                f"{store.path}: set {files.name} has no soft labels (relabel.store_labels is off) "
                f"and no teachers who could make them; `otdd relabel --out {store.path}` with the "
                "settings of the run makes these"
            )
        if verify:
            store.sums.verify([fact["file"] for fact in facts])
        try:
            self._data = _described(files.data)
            config = from_dict(RunConfig, {**store.read_json(CONFIG), "out": str(store.path)})
            self._plan = Plan.of(config, self._data, len(images))
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{store.path} was not written by this otdd: {error}") from None
        self.epochs, self.steps_per_epoch = self._plan.labelled, self._plan.steps_per_epoch
        self._images, self._store, self._facts, self._device = images, store, facts, device
        self._made = self._teachers()

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_made"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A worker reads them itself: a pickle of networks imports timm, and torchvision as it is.
        self.__dict__.update(state)
        self._made = self._teachers()

    def _teachers(self) -> list[Teacher]:
        with undisturbed():
            return [_teacher(self._store, fact, self._data, self._device) for fact in self._facts]

    def step(self, number: int) -> Step:
        """Augmentation and logits of a step, counted from the first of the first epoch."""
        batch = self._plan.batch_of(*divmod(number, self.steps_per_epoch))
        with reproducible(self._data.image_shape):
            return live_step(batch, self._images, self._made, self._plan.labels)


def _described(data: dict[str, Any]) -> ImageData:
    """What is known of real images that are not there themselves."""
    none = torch.zeros(0, *data["image_shape"], dtype=torch.uint8)
    part = LabeledImages(none, torch.zeros(0, dtype=torch.int64))
    facts = Facts(tuple(data["mean"]), tuple(data["std"]), data["sha256"])
    return ImageData(data["name"], data["classes"], part, part, facts)


def _teacher(store: Store, fact: dict[str, Any], data: ImageData, device: str) -> Teacher:
    file, name = fact["file"], fact["name"]
    state, meta = store.read_tensors(file), store.read_meta(file)
    try:
        network = students.make_network(meta["arch"], data, seed=0)
        for part in ("mean", "std"):  # a pretrained network has its own, perhaps in other channels
            setattr(network, part, state[part])
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
        network(torch.zeros(1, *data.image_shape))
        digest = digest_of(network)
    except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise StoreError(f"{store.path / file} does not hold teacher {name}: {why}") from None
    if digest != fact["digest"]:
        raise StoreError(f"{store.path / file} is not teacher {name} of {TEACHERS}: other weights")
    return Teacher(name, network.to(device), digest, fact["accuracy"], file)
