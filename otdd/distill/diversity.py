"""Diversity guidance: away from the nearest latents of the same class.

With m* the nearest by cosine among the last `memory` finished latents m of the class,

    G_D(x) = cos(x, m*),   x <- x - strength * grad G_D(x).

In joint order, where the images of a class are made together, the others in flight are looked at
too. Where there is nothing to be near to, nothing moves. The gradient is not scaled further; on
latents of unit variance in D dimensions its norm is about 1 / sqrt(D).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from otdd.distill.config import DiversityConfig
from otdd.distill.terms import Guidance, Memory, as_usual, check_latents, group_classes, settings_of


class DiversityGuidance(Guidance):
    """Moves latents away from the nearest of their class; needs no reference.

    Args:
        config: strength, target, memory and window.
    """

    def __init__(self, config: DiversityConfig | None = None) -> None:
        self.config = settings_of(config, DiversityConfig(strength=50.0))

    def check(self, class_labels: Tensor, shape: tuple[int, ...]) -> None:
        """Takes any latents."""

    @as_usual
    def direction(
        self,
        x: Tensor,
        t: int | Tensor,
        class_labels: Tensor,
        *,
        alpha_bar: float | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """The gradient of the cosine to the nearest latents."""
        check_latents(x, class_labels, "x")
        rows = x.detach().flatten(1).float()
        present, groups = group_classes(class_labels)
        move = torch.zeros_like(rows)
        for group, label in enumerate(present):
            own = (groups == group).nonzero()[:, 0]
            near = rows[own]
            if memory is not None:
                past = memory[0][memory[1] == label][-self.config.memory :]
                near = torch.cat([near, past.flatten(1).to(near)])
            if len(near) > 1:
                move[own] = _away(rows[own], near)
        return move.view_as(x).to(x.dtype)


def _away(rows: Tensor, near: Tensor) -> Tensor:
    """Gradient of the largest cosine of each row (B, D) to `near` (M, D), which begins with them.

    d cos(x, m) / dx = (m / |m| - cos(x, m) x / |x|) / |x|.
    """
    lengths = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit, others = rows / lengths, F.normalize(near, dim=1)
    similar = unit @ others.T
    similar.fill_diagonal_(-torch.inf)  # a latent is not near to itself
    largest, nearest = similar.max(1, keepdim=True)
    return (others[nearest[:, 0]] - largest * unit) / lengths
