"""Replayable augmentation: drawn from counters, applied as one affine map and one CutMix box.

Crops, flips, shifts, rotations and zooms of an image are all one 2x3 matrix, so a batch is
described by a few small tensors. They are drawn from (seed, epoch, batch) alone; the teacher that
labels a batch and the student that trains on it apply the same tensors and see the same pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from otdd.distill.config import RelabelConfig


@dataclass(frozen=True)
class Batch:
    """One augmented batch, without its pixels.

    Attributes:
        index: (B,) rows of the set.
        theta: (B, 2, 3) maps from output to input coordinates in [-1, 1].
        partner: (B,) rows of this batch that CutMix pastes from.
        box: (4,) top, bottom, left, right of the pasted rectangle in pixels; empty without CutMix.
    """

    index: Tensor
    theta: Tensor
    partner: Tensor
    box: Tensor

    def apply(self, images: Tensor, device: torch.device | None = None) -> Tensor:
        """Augmented images in [0, 1], on a device or where `images` are.

        `images` is the whole set, uint8 or in [0, 1]; only the rows of the batch are moved.
        """
        x = images[self.index].to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        grid = F.affine_grid(self.theta.to(x), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        top, bottom, left, right = self.box.tolist()
        if bottom > top and right > left:
            mixed = x.clone()
            mixed[:, :, top:bottom, left:right] = x[self.partner, :, top:bottom, left:right]
            x = mixed
        return x

    def targets(self, labels: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
        """Hard labels of the augmented images as (B, K), mixed by pasted area."""
        top, bottom, left, right = self.box.tolist()
        share = (bottom - top) * (right - left) / (size[0] * size[1])
        hot = F.one_hot(labels[self.index], classes).float()
        return (1 - share) * hot + share * hot[self.partner]


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for a batch.

    Attributes:
        crop_scale: area range of a random resized crop; (1, 1) is none.
        shift: largest shift as a fraction of the side.
        rotate: largest rotation in degrees.
        zoom: largest relative change of either side.
        flip: mirror half of the images.
        cutmix: probability that a batch is mixed.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    flip: bool = False
    cutmix: float = 0.0

    def draw(
        self, count: int, batch: int, size: tuple[int, int], *, seed: int, epoch: int, step: int
    ) -> Batch:
        """Batch `step` of an epoch over `count` images.

        The order of an epoch is drawn from (seed, epoch); everything else from (seed, epoch, step).
        """
        order = torch.randperm(count, generator=generator("order", seed, epoch))
        length = min(batch, count)  # the last batch of an epoch is filled from its beginning
        index = order[torch.arange(step * length, (step + 1) * length) % count]
        rng = generator("augment", seed, epoch, step)
        theta = self._theta(len(index), rng)
        partner = torch.randperm(len(index), generator=rng)
        return Batch(index, theta, partner, self._box(size, rng))

    def _theta(self, count: int, rng: torch.Generator) -> Tensor:
        u = torch.rand(count, 8, generator=rng, dtype=torch.float64)
        area = self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * u[:, 0]
        ratio = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3) * (self.crop_scale[0] < 1))
        wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        x = (2 * u[:, 2] - 1) * (1 - wide + 2 * self.shift)
        y = (2 * u[:, 3] - 1) * (1 - high + 2 * self.shift)
        angle = (2 * u[:, 4] - 1) * math.radians(self.rotate)
        wide = wide * torch.exp((2 * u[:, 5] - 1) * self.zoom)
        high = high * torch.exp((2 * u[:, 6] - 1) * self.zoom)
        wide = torch.where((u[:, 7] < 0.5) & self.flip, -wide, wide)
        cos, sin = angle.cos(), angle.sin()
        rows = torch.stack([wide * cos, -high * sin, x, wide * sin, high * cos, y], dim=1)
        return rows.reshape(-1, 2, 3).float()

    def _box(self, size: tuple[int, int], rng: torch.Generator) -> Tensor:
        mixed, area, y, x = torch.rand(4, generator=rng, dtype=torch.float64).tolist()
        if mixed >= self.cutmix:
            return torch.zeros(4, dtype=torch.int64)
        edges = []
        for side, centre in zip(size, (y, x), strict=True):
            half = side * math.sqrt(area) / 2
            edges += [round(max(0.0, centre * side - half))]
            edges += [round(min(float(side), centre * side + half))]
        return torch.tensor(edges)


def augmentation(config: RelabelConfig, data_name: str, size: tuple[int, int]) -> Augmentation:
    """The augmentation that suits a data set: crops need pixels, tiny images are jittered."""
    flip = config.flip == "on" or (config.flip == "auto" and not _has_handedness(data_name))
    if min(size) < 16:
        return Augmentation(
            shift=config.shift / min(size),
            rotate=config.rotate,
            zoom=config.zoom,
            flip=flip,
            cutmix=config.cutmix,
        )
    return Augmentation(crop_scale=config.crop_scale, flip=flip, cutmix=config.cutmix)


def _has_handedness(data_name: str) -> bool:
    return any(word in data_name.lower() for word in ("digit", "mnist", "svhn", "letter"))


def generator(*key: object) -> torch.Generator:
    """Random numbers that belong to this key, whatever was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stack(batches: list[Batch]) -> dict[str, Tensor]:
    """Batches of one size as tensors for a file."""
    names = ("index", "theta", "partner", "box")
    return {k: torch.stack([getattr(b, k) for b in batches]) for k in names}


def unstack(tensors: Mapping[str, Tensor]) -> list[Batch]:
    """The batches of `stack`."""
    index, partner = tensors["index"].long(), tensors["partner"].long()
    columns = (index, tensors["theta"], partner, tensors["box"])
    return [Batch(*row) for row in zip(*columns, strict=True)]
