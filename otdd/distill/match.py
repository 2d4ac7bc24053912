"""Stage 3: training a student, on hard labels or by matching the logits of teachers."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otdd.distill.config import TrainConfig
from otdd.distill.data import LabeledImages
from otdd.distill.training import Loss, Step, Training, device_of


@dataclass(frozen=True)
class Outcome:
    """Test accuracy in percent after the last step, and the best seen at any check."""

    accuracy: float
    best: float


def make_loss(kind: str, config: TrainConfig) -> Loss:
    """The loss of a student: `ce` and `ce-plain` (hard), `kl`, `mse` or `otm` (soft).

    `mse` is `otm` without its transport: EDC's loss.

    Returns:
        A function of student logits (B, K), mixed hard labels (B, K), hard labels of the base
        images (B,), and teacher logits (B, K); it gives the loss and its unweighted terms.
    """
    if kind in ("ce", "ce-plain"):
        return lambda logits, mixed, base, teacher: (F.cross_entropy(logits, mixed), {})
    if kind not in ("kl", "mse", "otm"):
        raise ValueError(f"unknown loss {kind!r}; known: ce, ce-plain, kl, mse, otm")
    from otdd.losses import OTDistillationLoss, OTLogitLoss

    ot = OTLogitLoss(tau=config.tau)
    if kind == "kl":
        soft = OTDistillationLoss(0.0, 1.0, 0.0, soft="kl", ot=ot)
    else:
        share = config.beta_2_share if kind == "otm" else None
        beta_2 = None if share is not None else config.beta_2 if kind == "otm" else 0.0
        soft = OTDistillationLoss(config.kappa_1, config.kappa_2, beta_2, beta_2_share=share, ot=ot)
    return lambda logits, mixed, base, teacher: soft(logits, _given(teacher), base, parts=True)


def train_student(
    training: Training,
    images: Tensor,
    labels: Tensor,
    steps: Iterable[Step],
    *,
    test: LabeledImages | None = None,
    after_epoch: Callable[[], None] | None = None,
) -> Outcome:
    """Train a student on a set and test it; the same arguments give the same bytes.

    Args:
        training: the student, new or loaded; it ends with the averaged weights.
        images: (N, C, H, W), uint8 or in [0, 1]; batches of them are moved to the student.
        labels: (N,).
        steps: augmentation and teacher logits of every step that is left.
        test: images to test on.
        after_epoch: called when an epoch is finished and its row is in the log.

    Raises:
        ConfigError: the training diverges.
    """
    student = training.student
    student.train()
    device = device_of(student)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in steps:
            training.step(images, labels, step)
            if test is not None and training.is_check():
                training.tested(accuracy(training.average.model, test))
            if training.last_of_epoch:
                training.end_epoch()
                if after_epoch is not None:
                    after_epoch()
    student.load_state_dict(training.average.model.state_dict())
    student.eval()
    scores = [score for _, score in training.scores]
    return Outcome(scores[-1], max(scores)) if scores else Outcome(math.nan, math.nan)


@torch.no_grad()
def accuracy(network: nn.Module, test: LabeledImages, batch: int = 128) -> float:
    """Percentage of images that the network classifies rightly; NaN if a logit is not finite."""
    was_training = network.training
    network.eval()
    right, finite, device = 0, True, device_of(network)
    for start in range(0, len(test), batch):
        logits = network(test.images[start : start + batch].to(device).float() / 255)
        right += int((logits.argmax(1).cpu() == test.labels[start : start + batch]).sum())
        finite = finite and bool(logits.isfinite().all())
    network.train(was_training)
    return 100.0 * right / len(test) if finite else math.nan


class _WholeProcess:
    """A setting of the whole process, for as long as some thread is inside.

    The first thread to come in changes it and the last to go out sets it back, so that no thread
    takes what another has changed for what the caller has set.
    """

    def __init__(self, change: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._change, self._inside = change, 0
        self._undo, self._lock = contextlib.ExitStack(), threading.Lock()
        os.register_at_fork(  # a worker that is forked meanwhile would wait for ever
            before=self._lock.acquire,
            after_in_parent=self._lock.release,
            after_in_child=self._lock.release,
        )

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._undo.enter_context(self._change())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()


@contextlib.contextmanager
def _single_precision() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    if dtype == torch.float32:  # no change where none is needed: another thread may make one
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _deterministic_kernels() -> Iterator[None]:
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # a tenth of the time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill


_float32, _deterministic = _WholeProcess(_single_precision), _WholeProcess(_deterministic_kernels)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Types, devices and gradients as they are by default, whatever the caller has set.

    A notebook may have float64 as the default type or a GPU as the default device, and loops of
    others run under `torch.no_grad`, `torch.inference_mode` or autocast: results are the same.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_float32)
        yield


@contextlib.contextmanager
def reproducible(image_shape: tuple[int, int, int]) -> Iterator[None]:
    """Deterministic kernels, and one thread where more would only cost time (under 16 pixels).

    The same settings then give the same bytes on one machine with one number of threads; on tiny
    images with any number.
    """
    threads = torch.get_num_threads()  # of this thread of Python; new ones take what was set last
    change = min(image_shape[1:]) < 16 and threads > 1
    if change:
        torch.set_num_threads(1)
    try:
        with _deterministic:
            yield
    finally:
        if change:
            torch.set_num_threads(threads)


def _given(teacher: Tensor | None) -> Tensor:
    if teacher is None:
        raise ValueError("this loss needs soft labels; relabel the set first")
    return teacher
