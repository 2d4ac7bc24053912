"""Stage 3: training a student, on hard labels or by matching the logits of teachers."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otdd.distill.augment import Batch
from otdd.distill.config import TrainConfig
from otdd.distill.data import LabeledImages

CHECKS = 5


@dataclass(frozen=True)
class Step:
    """What a student sees in one step.

    Attributes:
        batch: the augmentation.
        teacher: (B, K) mean logits of the teachers on the augmented images; None for hard labels.
    """

    batch: Batch
    teacher: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """Test accuracy in percent after the last step, and the best seen at five checks."""

    accuracy: float
    best: float


Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def make_loss(kind: str, config: TrainConfig) -> Loss:
    """The loss of a student: `ce` (hard), `kl` or `otm` (soft).

    Returns:
        A function of student logits (B, K), mixed hard labels (B, K), hard labels of the base
        images (B,), and teacher logits (B, K).
    """
    if kind == "ce":
        return lambda logits, mixed, base, teacher: F.cross_entropy(logits, mixed)
    if kind not in ("kl", "otm"):
        raise ValueError(f"unknown loss {kind!r}; known: ce, kl, otm")
    from otdd.losses import OTDistillationLoss, OTLogitLoss

    ot = OTLogitLoss(tau=config.tau)
    if kind == "kl":
        soft = OTDistillationLoss(0.0, 1.0, 0.0, soft="kl", ot=ot)
    else:
        share = config.beta_2_share
        beta_2 = config.beta_2 if share is None else None
        soft = OTDistillationLoss(config.kappa_1, config.kappa_2, beta_2, beta_2_share=share, ot=ot)
    return lambda logits, mixed, base, teacher: soft(logits, _given(teacher), base)


def train_student(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: Iterable[Step],
    total: int,
    loss: Loss,
    config: TrainConfig,
    *,
    test: LabeledImages | None = None,
) -> Outcome:
    """Train a student on a set and test it; the same arguments give the same bytes.

    Args:
        student: trained in place; it ends with the averaged weights.
        images: (N, C, H, W), uint8 or in [0, 1].
        labels: (N,).
        steps: augmentation and teacher logits of every step.
        total: number of steps.
        loss: as made by `make_loss`.
        config: optimiser and schedule.
        test: images to test on.
    """
    size = (images.shape[-2], images.shape[-1])
    optimizer = _optimizer(student, config)
    average = _Average(student, config.ema)
    checks = {max(1, round(total * (i + 1) / CHECKS)) for i in range(CHECKS)}
    scores: list[float] = []
    classes = 0
    student.train()
    for number, step in enumerate(steps, start=1):
        for group in optimizer.param_groups:
            progress = (number - 1) / (total * config.stretch)
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * progress))
        logits = student(step.batch.apply(images))
        classes = classes or logits.shape[1]
        mixed = step.batch.targets(labels, classes, size)
        value = loss(logits, mixed, labels[step.batch.index], step.teacher)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        average.update(number)
        if test is not None and number in checks:
            scores.append(accuracy(average.model, test))
    student.load_state_dict(average.model.state_dict())
    student.eval()
    return Outcome(scores[-1], max(scores)) if scores else Outcome(math.nan, math.nan)


@torch.no_grad()
def accuracy(network: nn.Module, test: LabeledImages, batch: int = 512) -> float:
    """Percentage of images that the network classifies rightly."""
    was_training = network.training
    network.eval()
    right = 0
    for start in range(0, len(test), batch):
        logits = network(test.images[start : start + batch].float() / 255)
        right += int((logits.argmax(1) == test.labels[start : start + batch]).sum())
    network.train(was_training)
    return 100.0 * right / len(test)


@contextlib.contextmanager
def reproducible(image_shape: tuple[int, int, int]) -> Iterator[None]:
    """Deterministic kernels, and one thread where more would only cost time (under 16 pixels).

    The same settings then give the same bytes on one machine with one number of threads; on tiny
    images with any number.
    """
    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    if min(image_shape[1:]) < 16:
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # a tenth of the time
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        deterministic.fill_uninitialized_memory = fill


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


def _optimizer(student: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        decay = config.weight_decay
        return torch.optim.SGD(student.parameters(), config.lr, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(
        student.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
    )


def _given(teacher: Tensor | None) -> Tensor:
    if teacher is None:
        raise ValueError("this loss needs soft labels; relabel the set first")
    return teacher
