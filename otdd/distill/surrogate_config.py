"""Settings of `otdd fit-surrogate`, without torch: the command line refuses quickly."""

from __future__ import annotations

from dataclasses import dataclass

from otdd.distill.config import require


@dataclass(frozen=True)
class SurrogateConfig:
    """The network and its training."""

    arch: str = "convnet-6"
    """Architecture, as of students: convnet, convnet-3, convnet-6, resnetap-10 or any timm name."""
    checkpoints: int = 4
    """Networks kept, evenly spaced over the training; the last is that of its end."""
    epochs: int = 40
    """Epochs over the training images."""
    batch: int = 128
    """Images in a step."""
    lr: float = 1e-3
    """Learning rate of AdamW at the start of a cosine."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, per step as a factor of the learning rate."""
    seed: int = 0
    """Seed of weights, batches and augmentation."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "an integer >= 1")
        ok = 1 <= self.checkpoints <= self.epochs
        require(ok, "checkpoints", self.checkpoints, f"1 to the epochs, {self.epochs}")
        require(self.batch >= 1, "batch", self.batch, "an integer >= 1")
        require(self.lr > 0, "lr", self.lr, "a number > 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        require(0 <= self.seed < 2**31, "seed", self.seed, "an integer in [0, 2^31)")

    def marks(self) -> list[int]:
        """Epochs after which a checkpoint is kept."""
        count = self.checkpoints
        return [-(-self.epochs * (k + 1) // count) for k in range(count)]
