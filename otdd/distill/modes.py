"""Mode guidance: each image of a class is led to its own k-means centre of the real latents.

With modes m_1, m_2, ... of its class, the n-th image of the class moves by

    x0_hat <- x0_hat + strength * (m_n - x0_hat).

An image counts behind the finished ones of its class and those before it in the batch; where there
are more images than modes they start over.
"""

from __future__ import annotations

from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from otdd.distill.config import ModeConfig
from otdd.distill.terms import Guidance, Memory, check_latents, group_classes, settings_of


class ModeGuidance(Guidance):
    """Moves every x0_hat towards a mode of its class.

    Args:
        config: strength and window.
        seed: of k-means.
    """

    def __init__(self, config: ModeConfig | None = None, *, seed: int = 0) -> None:
        self.config = settings_of(config, ModeConfig(strength=0.1))
        self.seed = seed
        self._modes: dict[int, Tensor] = {}

    @property
    def target(self) -> str:
        """Always x0."""
        return "x0"

    def set_reference(self, latents: Tensor, class_labels: Tensor, count: int) -> None:
        """Finds `count` modes of each class among real latents.

        Args:
            latents: (R, ...), finite.
            class_labels: integers, (R,).
            count: modes of a class, as many as images are wanted.
        """
        check_latents(latents, class_labels, "latents")
        present, groups = group_classes(class_labels)
        sizes = torch.bincount(groups)
        if not isinstance(count, Integral) or not 1 <= count <= int(sizes.min()):
            label = present[int(sizes.argmin())]
            raise ValueError(
                f"count: {count!r} is not accepted; expected 1 to {int(sizes.min())}, the latents "
                f"of class {label}"
            )
        for group, label in enumerate(present):
            own = latents[groups == group].float()
            modes = kmeans_centres(own.cpu(), count, self.seed)
            self._modes[label] = modes.to(latents.device)

    def set_modes(self, modes: Tensor, label: int) -> None:
        """Takes the modes of one class as they are, (count, ...)."""
        check_latents(modes, torch.full((len(modes),), label, device=modes.device), "modes")
        self._modes[label] = modes.float()

    def check(self, class_labels: Tensor, shape: tuple[int, ...]) -> None:
        """Raises if there are no modes for latents of this shape and these classes."""
        if not self._modes:
            raise RuntimeError("ModeGuidance has no modes yet: call set_reference first")
        missing = sorted(set(class_labels.tolist()) - set(self._modes))
        if missing:
            raise ValueError(f"classes {missing} have no modes; give real latents of them all")
        for label in set(class_labels.tolist()):
            have = tuple(self._modes[label].shape[1:])
            if have != tuple(shape):
                raise ValueError(f"x has latents of {tuple(shape)}, the modes have {have}")

    def direction(
        self,
        x: Tensor,
        t: int | Tensor,
        class_labels: Tensor,
        *,
        alpha_bar: float | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """x0_hat - m_n, which is -g."""
        check_latents(x, class_labels, "x")
        self.check(class_labels, tuple(x.shape[1:]))
        counts = dict.fromkeys(self._modes, 0)
        if memory is not None:
            for label in memory[1].tolist():
                counts[label] = counts.get(label, 0) + 1
        chosen = []
        for label in class_labels.tolist():
            modes = self._modes[label]
            chosen.append(modes[counts[label] % len(modes)])
            counts[label] += 1
        return x - torch.stack(chosen).to(x)


def kmeans_centres(latents: Tensor, count: int, seed: int) -> Tensor:
    """k-means centroids (count, ...) of latents (N, ...): best of 10 starts, on one thread."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums in one order: the same bytes on any machine load
        model = KMeans(count, n_init=10, random_state=seed).fit(latents.flatten(1).double().numpy())
    centres = torch.from_numpy(np.ascontiguousarray(model.cluster_centers_)).float()
    return centres.view(count, *latents.shape[1:])
