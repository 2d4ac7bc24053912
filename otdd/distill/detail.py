"""Guidance by means of images, with the detail and the contrast of images (ours).

A barycentric projection is a mean of many real latents. Where these line up, as digits do, it is
one of their kind; where they do not, as in photographs, it has lost their detail, and a latent that
moves there loses its own. At each spatial frequency k of the two-dimensional cosine transform

    q_k = (mean |T_k|^2 / mean |x_k|^2 - c) / (1 - c),    c = min(1/2, N / M)

is the part of the energy of the real latents x that their projections T keep beyond chance: a mean
of n latents that have nothing in common has 1/n of their energy, and each of N latents that share M
real ones stands for M / N. Both means are over the latents, and over k and its neighbours, as those
of few latents at one frequency are mostly chance. A latent moves there by

    min(1, max(0, q_k / theta)) * (T_k / max(theta, sqrt(mean |T_k|^2 / mean |x_k|^2)) - z_k):

the whole way where the projections keep theta or more, and not at all where they have nothing to
say. The division gives the projections the energy of the real latents back, up to a factor of
1 / theta in amplitude: means lie nearer to the middle of a class than its members do, so a set
that moved to them would have less contrast than the real images.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

_AT_ONCE = 256  # latents whose frequencies exist at a time


class Detail:
    """Weighs the frequencies of the moves of latents (C, H, W), which are rows of D = C * H * W.

    Args:
        real: real latents by class (K, M, D).
        weights: theirs, (K, M); 0 for padding.
        shape: (C, H, W).
        theta: in (0, 1].
    """

    def __init__(self, real: Tensor, weights: Tensor, shape: tuple[int, ...], theta: float) -> None:
        self.shape, self.theta = shape, theta
        self.down, self.across = (_cosines(size, real.device) for size in shape[-2:])
        energies = []
        for own, weight in zip(real, weights, strict=True):
            parts = zip(own.split(_AT_ONCE), weight.split(_AT_ONCE), strict=True)
            each = [_energy(self._transform(part), w) for part, w in parts]
            energies.append(torch.stack(each).sum(0))
        self.real = _around(torch.stack(energies))
        self.count = (weights > 0).float().sum(-1)

    def move(self, z: Tensor, image: Tensor, weights: Tensor, sharing: Tensor) -> Tensor:
        """What moves latents to their projections, weighed, when it is subtracted; (K, N, D).

        Args:
            z: the latents in flight, (K, N, D).
            image: their projections T, (K, N, D).
            weights: theirs, (K, N).
            sharing: weights of all that share the real latents with them, (K, N + L).
        """
        image = self._transform(image)
        energies = [_energy(own, weight) for own, weight in zip(image, weights, strict=True)]
        kept = torch.where(self.real > 0, _around(torch.stack(energies)) / self.real, 1.0)
        chance = ((sharing > 0).float().sum(-1) / self.count).clamp_max(0.5)[:, None, None]
        gain = ((kept - chance) / ((1 - chance) * self.theta)).clamp(0.0, 1.0)
        amplitude = kept.sqrt().clamp_min(self.theta)
        away = self._transform(z) - image / amplitude[:, None, None]
        return (self.down.T @ (away * gain[:, None, None]) @ self.across).flatten(-3)

    def _transform(self, rows: Tensor) -> Tensor:
        return self.down @ rows.unflatten(-1, self.shape) @ self.across.T


def _energy(waves: Tensor, weights: Tensor) -> Tensor:
    """Mean energy (H, W) of transformed latents (N, C, H, W)."""
    return torch.tensordot(weights, waves.square().sum(1), 1)


def _around(energies: Tensor) -> Tensor:
    """Mean over each frequency and its up to 8 neighbours, (K, H, W)."""
    return functional.avg_pool2d(energies[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


@functools.lru_cache(maxsize=16)
def _cosines(size: int, device: torch.device) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of `size` numbers, as a matrix."""
    places, frequencies = torch.arange(size) + 0.5, torch.arange(size)
    matrix = torch.cos(math.pi / size * torch.outer(frequencies, places).double())
    matrix[0] *= 0.5**0.5
    return ((2 / size) ** 0.5 * matrix).float().to(device)
