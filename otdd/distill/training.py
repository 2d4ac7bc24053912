"""A student in training: optimiser, schedule, averaged weights, its log, and all of it as tensors.

Training is a function of the settings, the batches and the number of steps done: what a network
draws for itself (dropout, stochastic depth) comes from (seed, epoch). So a student that is loaded
after some epoch ends with the bytes that it would have ended with.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from otdd.distill.augment import Batch, generator
from otdd.distill.config import ConfigError, TrainConfig

# Of a student's logits (B, K), mixed hard labels (B, K), hard labels of the base images (B,) and
# teacher logits (B, K): the loss, and its unweighted terms by name.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor]]]

CHECKS = 5
HEAD, TAIL = ("epoch", "lr", "loss"), ("train_accuracy", "test_accuracy", "seconds")


@dataclass(frozen=True)
class Step:
    """What a student sees in one step.

    Attributes:
        batch: the augmentation.
        teacher: (B, K) mean logits of the teachers on the augmented images; None for hard labels.
    """

    batch: Batch
    teacher: Tensor | None = None


class Training:
    """A student and everything that its next step depends on.

    Args:
        student: trained in place, on the device where it is.
        loss: as made by `otdd.distill.match.make_loss`.
        config: optimiser and schedule.
        total: number of steps of the whole training.
        per_epoch: steps of an epoch; by default one epoch is all there is.
        arch: name of the architecture, for learning rates of its own.
        seed: of what the network draws for itself.

    Attributes:
        number: steps done.
        scores: step and test accuracy in percent of every check so far.
        columns: names of the columns of the log; terms of the loss are known after a step.
        rows: the log, one row for each finished epoch, NaN where there was no test.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: Loss,
        config: TrainConfig,
        total: int,
        per_epoch: int | None = None,
        *,
        arch: str = "",
        seed: int = 0,
    ) -> None:
        self.student, self.loss, self.config, self.total = student, loss, config, total
        self.per_epoch, self.seed, self.arch = per_epoch or total, seed, arch
        self.lr = learning_rate(config, arch)
        self.optimizer = _optimizer(student, config, self.lr)
        self.average = _Average(student, config.ema)
        self.number = 0
        self.scores: list[tuple[int, float]] = []
        self.columns: tuple[str, ...] = ()
        self.rows: list[list[float]] = []
        self._start()

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return self.number // self.per_epoch

    @property
    def last_of_epoch(self) -> bool:
        """Whether the step just done was the last of its epoch."""
        return self.number % self.per_epoch == 0 or self.number == self.total

    def is_check(self) -> bool:
        """Whether the student is to be tested after the step just done."""
        every = self.config.test_every
        if every is None:
            return self.number in {
                max(1, round(self.total * (i + 1) / CHECKS)) for i in range(CHECKS)
            }
        return self.number % (every * self.per_epoch) == 0 or self.number == self.total

    def step(self, images: Tensor, labels: Tensor, step: Step) -> None:
        """One step on `images` (N, C, H, W), uint8 or in [0, 1], of `labels` (N,).

        Raises:
            ConfigError: the training has diverged, and the loss takes finite logits only.
        """
        if self.number % self.per_epoch == 0:
            torch.manual_seed(generator("student", self.seed, self.epochs).initial_seed())
        rate = self.lr * factor(self.config, self.number, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = device_of(self.student)
        half = self.config.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            logits = self.student(step.batch.apply(images, device))
        logits = logits.float()
        size = (images.shape[-2], images.shape[-1])
        base = labels[step.batch.index].to(device)
        mixed = step.batch.targets(labels, logits.shape[1], size).to(device)
        teacher = None if step.teacher is None else step.teacher.to(device)
        try:
            value, parts = self.loss(logits, mixed, base, teacher)
        except ValueError:  # of transport, which takes finite numbers only
            if bool(torch.isfinite(logits).all()):
                raise
            raise self._diverged("its logits are not finite") from None
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.number += 1
        self.average.update(self.number)
        self._note(rate, logits, mixed, value, parts)

    def tested(self, accuracy: float) -> None:
        """Takes down the accuracy of the averaged weights after the step just done.

        Raises:
            ConfigError: it is NaN, as `otdd.distill.match.accuracy` has it of a diverged student.
        """
        if math.isnan(accuracy):
            raise self._diverged("its logits of the test images are not finite")
        self.scores.append((self.number, accuracy))

    def end_epoch(self) -> None:
        """Closes the row of the log.

        Raises:
            ConfigError: the training has diverged.
        """
        sums, seen = self._sums.tolist(), self._seen
        test = [score for number, score in self.scores if number > self._first]
        means = [value / self._steps for value in sums[:-1]]
        if not math.isfinite(means[0]):
            raise self._diverged(f"the loss is {means[0]}")
        row = [len(self.rows) + 1, self._rate, *means, 100 * sums[-1] / seen]
        row += [test[-1] if test else math.nan, time.perf_counter() - self._since]
        self.rows.append([float(value) for value in row])
        self._start()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything between two epochs: tensors, and plain values."""
        tensors = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        if self.config.ema:
            tensors |= {f"average.{k}": v for k, v in self.average.model.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": v for name, v in slots.items()}
        tensors["log"] = torch.tensor(self.rows, dtype=torch.float64)
        tensors["scores"] = torch.tensor(self.scores, dtype=torch.float64).reshape(-1, 2)
        return tensors, {"steps": self.number, "columns": list(self.columns)}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over what `state` gave.

        Raises:
            KeyError, RuntimeError, ValueError: it is of another student.
        """
        self.student.load_state_dict(_under("student.", tensors))
        if self.config.ema:
            self.average.model.load_state_dict(_under("average.", tensors))
        state = self.optimizer.state_dict()
        for name, value in _under("optimizer.", tensors).items():
            index, slot = name.split(".", 1)
            state["state"].setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(state)
        self.rows = tensors["log"].tolist()
        self.scores = [(int(number), score) for number, score in tensors["scores"].tolist()]
        self.number, self.columns = int(meta["steps"]), tuple(meta["columns"])
        self._start()

    def _diverged(self, what: str) -> ConfigError:
        name = self.arch or "a network"
        return ConfigError(
            f"train.lr: {self.lr} makes {name} diverge, in epoch {len(self.rows) + 1} {what}; "
            "expected a smaller one"
        )

    def _start(self) -> None:
        self._sums, self._seen, self._steps, self._rate = torch.zeros(()), 0, 0, 0.0
        self._first, self._since = self.number, time.perf_counter()

    @torch.no_grad()
    def _note(
        self, rate: float, logits: Tensor, mixed: Tensor, value: Tensor, parts: dict[str, Tensor]
    ) -> None:
        self.columns = (*HEAD, *parts, *TAIL)
        right = (logits.argmax(1) == mixed.argmax(1)).sum()
        self._sums = self._sums + torch.stack([value.detach(), *parts.values(), right]).double()
        self._seen += len(mixed)
        self._steps += 1
        self._rate = self._rate if self._steps > 1 else rate


def device_of(network: nn.Module) -> torch.device:
    """Where a network is; one without weights is on the CPU."""
    weight = next(network.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def factor(config: TrainConfig, done: int, total: int) -> float:
    """What the learning rate at the start is multiplied with after `done` of `total` steps."""
    if config.schedule == "steps":  # [2/3, 5/6] and 0.2 are those of IGD's hard-label protocol
        return 0.2 ** ((done >= 2 * total / 3) + (done >= 5 * total / 6))
    return 0.5 * (1 + math.cos(math.pi * (done / (total * config.stretch))))


def learning_rate(config: TrainConfig, arch: str) -> float:
    """The learning rate at the start of an architecture: the first pattern that it matches."""
    for pattern, rate in (entry.split("=") for entry in config.arch_lr):
        if fnmatch.fnmatchcase(arch, pattern):
            return float(rate)
    return config.lr


class _Average:
    """Exponential moving average of all floating state, short at the beginning."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if decay else model
        floating = [t for t in model.state_dict().values() if t.is_floating_point()]
        mine = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        self._pairs = (mine, floating)

    @torch.no_grad()
    def update(self, number: int) -> None:
        if self.decay:
            weight = 1 - min(self.decay, (1 + number) / (10 + number))
            torch._foreach_lerp_(self._pairs[0], self._pairs[1], weight)


def _optimizer(student: nn.Module, config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        decay = config.weight_decay
        return torch.optim.SGD(student.parameters(), lr, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(student.parameters(), lr, weight_decay=config.weight_decay, fused=True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
