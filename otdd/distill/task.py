"""Distillation as a task of timm: a student, its teachers, and the loss between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otdd.distill.students import import_timm
from otdd.logit_losses import OTDistillationLoss

if TYPE_CHECKING:
    from timm.task import TrainingTask
    from timm.task import TrainingTask as _Base


def _base() -> type[TrainingTask]:
    """The class that timm's training script expects."""
    version = import_timm().__version__
    try:
        from timm.task import TrainingTask
    except ImportError as error:
        message = f"timm: got {version}, without timm.task; accepted: tested with 1.0.31"
        raise ImportError(message) from error
    return TrainingTask


if not TYPE_CHECKING:
    _Base = _base()


class OTDistillationTask(_Base):
    """Train a student on hard labels and the mean logits of its teachers.

    A `timm.task.TrainingTask`: `setup_ema`, `prepare_distributed`, `compile` and the checkpoints of
    timm work on the student alone. The teachers are frozen and stay in evaluation mode; they see
    the input of the student, so a teacher of another normalisation needs a module that converts.

    Args:
        student: The network to train; (B, C, H, W) -> logits (B, K).
        teachers: One network or several, of the same classes.
        loss: None: `OTDistillationLoss()`.
        device: Of the task; modules are not moved.
        dtype: Of the task.
        verbose: As in timm.

    Shape: input ``(B, C, H, W)``, target ``(B,)`` int64 -> a dict of ``loss``, ``output`` (logits
    of the student), ``teacher_output`` (their mean), and detached for logging the unweighted
    terms ``ce_loss``, ``mse_loss`` or ``kl_loss``, ``ot_loss``, and the weight ``beta_2``.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module],
        loss: OTDistillationLoss | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if isinstance(teachers, nn.Module) and not isinstance(teachers, nn.ModuleList):
            teachers = [teachers]
        teachers = list(teachers) if isinstance(teachers, Iterable) else [teachers]
        for module, name in [(student, "student"), *((t, "teachers") for t in teachers)]:
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: got {type(module).__name__}; accepted: torch.nn.Module")
        if not teachers:
            raise ValueError("teachers: got none; accepted: at least one module")
        trained = {id(p) for p in student.parameters()}
        if any(id(p) in trained for teacher in teachers for p in teacher.parameters()):
            raise ValueError(
                "teachers: got one that shares parameters with the student; accepted: others"
            )
        self.criterion = OTDistillationLoss() if loss is None else loss
        if not isinstance(self.criterion, OTDistillationLoss):
            accepted = "an OTDistillationLoss or None"
            raise TypeError(f"loss: got {type(loss).__name__}; accepted: {accepted}")
        self.trainable_module = student
        self.teachers = nn.ModuleList(teachers).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> OTDistillationTask:
        """Training mode for the student; the teachers keep to evaluation."""
        super().train(mode)
        self.teachers.eval()
        return self

    def prepare_distributed(
        self, device_ids: list[int] | None = None, **ddp_kwargs: Any
    ) -> OTDistillationTask:
        """Wrap the student in DistributedDataParallel; the loss may have ``gather=True``."""
        from torch.nn.parallel import DistributedDataParallel

        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(  # type: ignore[override]  # timm's, which is not a Module's
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the student, for training and evaluation, and the teachers."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        compiled: Any = torch.compile(self.trainable_module, **options)
        self.trainable_module = compiled
        self.eval_model = self.trainable_module
        for teacher in self.teachers:
            teacher.compile(**options)
        return self.trainable_module

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, and what to log of it."""
        output = self.trainable_module(input)
        _check_logits(output, "student")
        computed = torch.promote_types(output.dtype, torch.float32)
        with torch.no_grad():
            theirs = [teacher(input) for teacher in self.teachers]
            for number, logits in enumerate(theirs):
                _check_logits(logits, f"teachers[{number}]", output)
            mean = sum(logits.to(computed) for logits in theirs) / len(theirs)
        loss, parts = self.criterion(output, mean, target, parts=True)
        terms = {k if k == "beta_2" else f"{k}_loss": v for k, v in parts.items()}
        return {"loss": loss, "output": output, "teacher_output": mean, **terms}


def _check_logits(seen: object, name: str, like: Tensor | None = None) -> None:
    """Refuses what is no (B, K), or not of the shape of others, which would broadcast."""
    if isinstance(seen, Tensor) and (seen.dim() == 2 if like is None else seen.shape == like.shape):
        return
    what = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
    accepted = "(B, K)" if like is None else f"of the student's shape, {tuple(like.shape)}"
    raise ValueError(f"{name}: it returned {what}; accepted: modules that return logits {accepted}")
