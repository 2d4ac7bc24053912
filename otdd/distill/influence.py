"""Influence guidance: towards images that train a network as the real ones do.

With F_1..F_S checkpoints of a surrogate over its training, and gradients of its cross-entropy L by
its weights,

    G_I(x0_hat) = 1/S sum_s [1 - cos(dL(F_s(decode(x0_hat)), y), mean_j dL(F_s(r_j), y))],

the mean over real images r_j of class y. The gradient of G_I goes through the surrogates, the
decoder and (target `through`) the denoiser, and its step is scaled by rho_t. `otdd fit-surrogate`
trains the surrogates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otdd.distill.config import InfluenceConfig
from otdd.distill.guidance import pick_reference
from otdd.distill.terms import (
    Guidance,
    Memory,
    as_usual,
    check_labels,
    check_latents,
    group_classes,
    settings_of,
)

CHUNK = 64


class InfluenceGuidance(Guidance):
    """Moves latents so that their training gradient turns to that of the real images.

    Args:
        surrogates: networks from images in [0, 1], (B, C, H, W), to logits (B, K).
        decode: latents (B, ...) to such images, with gradients: `codec.pixels`.
        config: strength, target, reference size and window.
        seed: of the choice of real images.
    """

    def __init__(
        self,
        surrogates: Sequence[nn.Module],
        decode: Callable[[Tensor], Tensor],
        config: InfluenceConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if not isinstance(surrogates, Sequence | nn.ModuleList):  # a Sequential has its layers
            seen = type(surrogates).__name__
            raise ValueError(f"surrogates: {seen} is not accepted; expected a list of modules")
        if not surrogates:
            raise ValueError("surrogates: an empty list is not accepted; expected at least one")
        self.config = settings_of(config, InfluenceConfig(strength=5.0))
        self.decode, self.seed = decode, seed
        self.surrogates = [network.eval() for network in surrogates]
        self._wanted: dict[int, list[Tensor]] = {}

    @property
    def normalised(self) -> bool:
        """Steps are scaled by rho_t."""
        return True

    @as_usual
    def set_reference(self, images: Tensor, class_labels: Tensor) -> None:
        """Takes the mean gradients over real images, on the device of the surrogates.

        Args:
            images: uint8, (R, C, H, W); at most `reference_size` of each class are used.
            class_labels: integers, (R,), as the surrogates know the classes.
        """
        if not isinstance(images, Tensor):
            raise ValueError(f"images must be a tensor, got {type(images).__name__}")
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise ValueError(
                f"images must be uint8 (R, C, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        check_labels(class_labels, len(images))
        keep = pick_reference(class_labels, self.config.reference_size, self.seed)
        images, class_labels = images[keep], class_labels[keep]
        present, groups = group_classes(class_labels)
        for group, label in enumerate(present):
            own = images[groups == group]
            self._wanted[label] = [_mean_gradient(n, own, label) for n in self.surrogates]

    def check(self, class_labels: Tensor, shape: tuple[int, ...]) -> None:
        """Raises if there are no real gradients of these classes."""
        if not self._wanted:
            raise RuntimeError("InfluenceGuidance has no reference yet: call set_reference first")
        missing = sorted(set(class_labels.tolist()) - set(self._wanted))
        if missing:
            raise ValueError(f"classes {missing} have no reference images; give them all")

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
        """The gradient of G_I by x0_hat, image by image to keep the graph small."""
        check_latents(x, class_labels, "x")
        self.check(class_labels, tuple(x.shape[1:]))
        return torch.cat(
            [
                self._gradient(x[n : n + 1].detach(), label)
                for n, label in enumerate(class_labels.tolist())
            ]
        )

    def objective(self, x: Tensor, label: int) -> Tensor:
        """G_I of one x0_hat (1, ...), with its gradient where gradients are on."""
        image = self.decode(x)
        values = [
            1 - F.cosine_similarity(_gradient(network, image, label, graph=True), wanted, dim=0)
            for network, wanted in zip(self.surrogates, self._wanted[label], strict=True)
        ]
        return torch.stack(values).mean()

    def _gradient(self, x: Tensor, label: int) -> Tensor:
        with torch.enable_grad():
            leaf = x.requires_grad_()
            return torch.autograd.grad(self.objective(leaf, label), leaf)[0]


def _gradient(network: nn.Module, images: Tensor, label: int, *, graph: bool = False) -> Tensor:
    """Gradient of the mean cross-entropy of images of one class by all weights, flat."""
    weights = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    device = next(iter(weights.values())).device
    with torch.enable_grad():
        logits = torch.func.functional_call(network, weights, (images.to(device),))
        if not 0 <= label < logits.shape[1]:
            raise ValueError(
                f"class_labels: {label} is not accepted; expected 0 to {logits.shape[1] - 1}, the "
                "classes of the surrogates"
            )
        labels = torch.full((len(images),), label, device=device)
        loss = F.cross_entropy(logits, labels)
        parts = torch.autograd.grad(loss, list(weights.values()), create_graph=graph)
    return torch.cat([part.flatten() for part in parts])


def _mean_gradient(network: nn.Module, images: Tensor, label: int) -> Tensor:
    total = torch.zeros((), device=next(network.parameters()).device)
    for part in images.split(CHUNK):
        total = total + len(part) * _gradient(network, part.float() / 255, label)
    return total / len(images)
