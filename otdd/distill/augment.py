"""Replayable augmentation: drawn from counters, applied as one affine map and one mixture.

Crops, flips, shifts, rotations and zooms of an image are all one 2x3 matrix, CutMix is one box,
Mixup one number, and a shuffle of patches a short list; so a batch is described by a few small
tensors. They are drawn from (seed, epoch, batch) alone; the teacher that labels a batch and the
student that trains on it apply the same tensors and see the same pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from otdd.distill.config import RelabelConfig, require


@dataclass(frozen=True)
class Batch:
    """One augmented batch, without its pixels.

    Attributes:
        index: (B,) rows of the set.
        theta: (B, 2, 3) maps from output to input coordinates in [-1, 1].
        partner: (B,) rows of this batch that CutMix pastes from, or Mixup adds.
        box: (4,) top, bottom, left, right of the pasted rectangle in pixels; empty without CutMix.
        blend: () weight of the partner in Mixup; None where a run has none.
        patches: (B, P*P) uint8, which patch comes to each place, row by row; None where a run
            does not shuffle.
    """

    index: Tensor
    theta: Tensor
    partner: Tensor
    box: Tensor
    blend: Tensor | None = None
    patches: Tensor | None = None

    @property
    def mixed(self) -> bool:
        """Whether the images of a pair are in each image."""
        return self._pasted or (self.blend is not None and float(self.blend) > 0)

    @property
    def _pasted(self) -> bool:
        top, bottom, left, right = self.box.tolist()
        return bool(bottom > top and right > left)

    def apply(self, images: Tensor, device: torch.device | None = None) -> Tensor:
        """Augmented images in [0, 1], on a device or where `images` are.

        `images` is the whole set, uint8 or in [0, 1]; only the rows of the batch are moved.
        """
        x = images[self.index].to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if self.patches is not None:
            x = _rearranged(x, self.patches.to(x.device).long())
        grid = F.affine_grid(self.theta.to(x), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        if self._pasted:
            top, bottom, left, right = self.box.tolist()
            pasted = x.clone()
            pasted[:, :, top:bottom, left:right] = x[self.partner, :, top:bottom, left:right]
            x = pasted
        if self.blend is not None and float(self.blend) > 0:
            x = torch.lerp(x, x[self.partner], float(self.blend))
        return x

    def targets(self, labels: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
        """Hard labels of the augmented images as (B, K), mixed by pasted area or weight."""
        top, bottom, left, right = self.box.tolist()
        share = (bottom - top) * (right - left) / (size[0] * size[1])
        if self.blend is not None and float(self.blend) > 0:  # never beside a box
            share = float(self.blend)
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
        cutmix: probability that a batch is mixed by CutMix.
        mixup: probability that a batch without a CutMix box is mixed by Mixup.
        mixup_alpha: the partner's weight is of Beta(mixup_alpha, mixup_alpha); in (0, 1].
        patch_shuffle: P; the P x P patches of an image change places, before all else. 1: none.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    flip: bool = False
    cutmix: float = 0.0
    mixup: float = 0.0
    mixup_alpha: float = 0.8
    patch_shuffle: int = 1

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
        partner, box = torch.randperm(len(index), generator=rng), self._box(size, rng)
        made = Batch(index, theta, partner, box)
        if self.mixup > 0:
            blend = 0.0 if made.mixed else self._blend(generator("mixup", seed, epoch, step))
            made = dataclasses.replace(made, blend=torch.tensor(blend))
        if self.patch_shuffle > 1:
            patches = self._patches(len(index), generator("patches", seed, epoch, step))
            made = dataclasses.replace(made, patches=patches)
        return made

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

    def _blend(self, rng: torch.Generator) -> float:
        if float(torch.rand((), generator=rng, dtype=torch.float64)) >= self.mixup:
            return 0.0
        while True:  # Johnk's way to a beta variable, in logarithms: of a small shape all is near 0
            x, y = torch.rand(2, generator=rng, dtype=torch.float64).log() / self.mixup_alpha
            if torch.logaddexp(x, y) <= 0:
                return float(torch.sigmoid(x - y))

    def _patches(self, count: int, rng: torch.Generator) -> Tensor:
        keys = torch.rand(count, self.patch_shuffle**2, generator=rng, dtype=torch.float64)
        return keys.argsort(1).to(torch.uint8)


def augmentation(config: RelabelConfig, data_name: str, size: tuple[int, int]) -> Augmentation:
    """The augmentation that suits a data set: crops need pixels, tiny images are jittered.

    Raises:
        ConfigError: the images cannot be cut into the patches that are to be shuffled.
    """
    side, fits = config.patch_shuffle, not any(length % config.patch_shuffle for length in size)
    accepted = f"a number that divides both sides of the images, {size[0]} and {size[1]} pixels"
    require(fits, "relabel.patch_shuffle", side, accepted)
    flip = config.flip == "on" or (config.flip == "auto" and not _has_handedness(data_name))
    made = Augmentation(
        flip=flip,
        cutmix=config.cutmix,
        mixup=config.mixup,
        mixup_alpha=config.mixup_alpha,
        patch_shuffle=side,
    )
    if min(size) >= 16:
        return dataclasses.replace(made, crop_scale=config.crop_scale)
    shift = config.shift / min(size)
    return dataclasses.replace(made, shift=shift, rotate=config.rotate, zoom=config.zoom)


def _rearranged(x: Tensor, patches: Tensor) -> Tensor:
    """Images (B, C, H, W) with their patches in the order of `patches` (B, P*P)."""
    batch, channels, height, width = x.shape
    side = math.isqrt(patches.shape[1])
    cut = x.reshape(batch, channels, side, height // side, side, width // side)
    cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    cut = cut[torch.arange(batch, device=x.device).unsqueeze(1), patches]
    cut = cut.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, channels, height, width)


def _has_handedness(data_name: str) -> bool:
    return any(word in data_name.lower() for word in ("digit", "mnist", "svhn", "letter"))


def generator(*key: object) -> torch.Generator:
    """Random numbers that belong to this key, whatever was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stack(batches: list[Batch]) -> dict[str, Tensor]:
    """Batches of one size and one kind of augmentation as tensors for a file."""
    names = [f.name for f in dataclasses.fields(Batch) if getattr(batches[0], f.name) is not None]
    return {k: torch.stack([getattr(b, k) for b in batches]) for k in names}


def shapes(steps: int, batch: int, names: Iterable[str], side: int) -> dict[str, list[int]]:
    """Shapes of what `stack` makes of `steps` batches.

    Args:
        steps: how many there are.
        batch: images of each.
        names: of the tensors in a file; those that only some runs have are left out if absent.
        side: patches a side of a shuffle.
    """
    made = {
        "index": [steps, batch],
        "theta": [steps, batch, 2, 3],
        "partner": [steps, batch],
        "box": [steps, 4],
    }
    some = {"blend": [steps], "patches": [steps, batch, side * side]}
    return made | {name: shape for name, shape in some.items() if name in names}


def unstack(tensors: Mapping[str, Tensor]) -> list[Batch]:
    """The batches of `stack`."""
    columns = {f.name: tensors[f.name] for f in dataclasses.fields(Batch) if f.name in tensors}
    columns |= {name: columns[name].long() for name in ("index", "partner")}
    rows = zip(*columns.values(), strict=True)
    return [Batch(**dict(zip(columns, row, strict=True))) for row in rows]
