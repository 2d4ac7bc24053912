"""Formats of stored soft labels: half precision, the largest logits, or eight or four bits.

A format is a pair of functions between the float16 logits of the teachers and what a file holds.
Students see decoded logits only, whether they were stored or are made as needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from otdd.distill.config import ConfigError, RelabelConfig, require
from otdd.ops.checks import finite

BITS = {"q8": 8, "q4": 4}


@dataclass(frozen=True)
class LabelFormat:
    """How the logits (..., K) of teachers are kept.

    * ``fp16``: as they are.
    * ``topk``: the `top_k` largest of a row in float16, their classes, and one value for all the
      others, the log of the mean of their exponentials. So the softmax of the kept classes is
      right, and the others share the rest equally.
    * ``q8``: 256 equal levels from the smallest to the largest of a row, which are kept in float32;
      no logit is off by more than half a level.
    * ``q4``: the same with 16 levels, two logits in a byte.

    Attributes:
        kind: ``fp16``, ``topk``, ``q8`` or ``q4``.
        top_k: classes kept; 0 unless ``topk``.
    """

    kind: str = "fp16"
    top_k: int = 0

    @classmethod
    def of(cls, config: RelabelConfig, classes: int) -> LabelFormat:
        """The format of a run.

        Raises:
            ConfigError: more classes are to be kept than there are beside the others.
        """
        if config.label_format != "topk":
            return cls(config.label_format)
        accepted = f"fewer than the {classes} classes of the data"
        require(config.top_k < classes, "relabel.top_k", config.top_k, accepted)
        return cls("topk", config.top_k)

    @classmethod
    def read(cls, meta: Mapping[str, Any]) -> LabelFormat:
        """The format of a file, from what is stored beside it; nothing there means float16."""
        return cls(**meta.get("format", {}))

    def meta(self) -> dict[str, Any]:
        """What `read` needs."""
        made = {"kind": self.kind} | ({"top_k": self.top_k} if self.top_k else {})
        return {} if self.kind == "fp16" else {"format": made}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Tensors for a file; `logits` (..., K) float16, finite unless the format is ``fp16``."""
        if self.kind == "fp16":
            return {"logits": logits}
        finite(logits.float(), "logits")
        return self._top(logits) if self.kind == "topk" else self._levels(logits.float())

    def decode(self, tensors: Mapping[str, Tensor], classes: int) -> Tensor:
        """Logits (..., K) float32 of the tensors made by `encode`."""
        if self.kind == "fp16":
            return tensors["logits"].float()
        if self.kind in BITS:
            low, level = (tensors[k].unsqueeze(-1) for k in ("logits_low", "logits_level"))
            steps = tensors[f"logits_{self.kind}"]
            steps = _unpacked(steps, classes) if self.kind == "q4" else steps
            return low + level * steps.float()
        rest = tensors["logits_rest"].float().unsqueeze(-1)
        made = rest.expand(*rest.shape[:-1], classes).clone()
        return made.scatter_(-1, tensors["logits_classes"].long(), tensors["logits_top"].float())

    def row_bytes(self, classes: int) -> int:
        """Bytes of the label of one augmented image."""
        return sum(t.numel() * t.element_size() for t in self._one(classes).values())

    def shapes(self, classes: int) -> dict[str, list[int]]:
        """Names and shapes of what a file holds of one augmented image."""
        return {name: list(t.shape) for name, t in self._one(classes).items()}

    def _one(self, classes: int) -> dict[str, Tensor]:
        return self.encode(torch.zeros(classes, dtype=torch.float16))

    def _top(self, logits: Tensor) -> dict[str, Tensor]:
        top, classes = logits.float().topk(self.top_k, dim=-1)
        others = logits.float().scatter(-1, classes, -torch.inf)
        count = logits.shape[-1] - self.top_k
        rest = others.logsumexp(-1) - math.log(count)
        kinds = (torch.uint8, torch.int16, torch.int32)
        kind = next(k for k in kinds if logits.shape[-1] - 1 <= torch.iinfo(k).max)
        return {
            "logits_top": top.half(),
            "logits_classes": classes.to(kind),
            "logits_rest": rest.half(),
        }

    def _levels(self, logits: Tensor) -> dict[str, Tensor]:
        top = 2 ** BITS[self.kind] - 1
        low, high = logits.aminmax(dim=-1)
        level = (high - low) / top
        steps = (logits - low.unsqueeze(-1)) / level.clamp(min=1e-30).unsqueeze(-1)
        made = steps.round().clamp(max=top).to(torch.uint8)
        made = _packed(made) if self.kind == "q4" else made
        return {f"logits_{self.kind}": made, "logits_low": low, "logits_level": level}


FLOAT16 = LabelFormat()


def _packed(steps: Tensor) -> Tensor:
    """Two numbers below 16 in a byte, the first in its lower half; (..., K) to (..., ceil(K/2))."""
    even = F.pad(steps, (0, steps.shape[-1] % 2))
    return even[..., ::2] | (even[..., 1::2] << 4)


def _unpacked(made: Tensor, classes: int) -> Tensor:
    return torch.stack([made & 15, made >> 4], dim=-1).flatten(-2)[..., :classes]


def check_format(seen: LabelFormat, wanted: LabelFormat, set_name: str) -> None:
    """Refuse stored labels of another format than the run's."""
    if seen != wanted:
        kept = f" with relabel.top_k {seen.top_k}" if seen.top_k else ""
        raise ConfigError(
            f"relabel.label_format: {wanted.kind!r} is not accepted; expected {seen.kind!r}{kept}, "
            f"as the labels of set {set_name} are stored; choose another --out"
        )


def compact(augmentation: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The integers of a stacked augmentation in the smallest type that holds them."""
    made = dict(augmentation)
    for name, kind in (("index", torch.int32), ("partner", torch.int16)):
        if int(made[name].max()) <= torch.iinfo(kind).max:
            made[name] = made[name].to(kind)
    return made


def storage(
    labels: LabelFormat, ipc: int, classes: int = 1000, epochs: int = 300, batch: int = 100
) -> int:
    """Bytes of all soft labels of a set with their augmentation, but for the headers of files.

    Args:
        labels: the format.
        ipc: images per class.
        classes: number of classes.
        epochs: epochs that are labelled.
        batch: images in a batch; one CutMix box each.
    """
    batch = min(batch, ipc * classes)
    small = labels.kind != "fp16"
    row = labels.row_bytes(classes) + 4 * 6 + (4 + 2 if small else 8 + 8)
    steps = epochs * -(-ipc * classes // batch)
    return steps * (batch * row + 4 * 8)
