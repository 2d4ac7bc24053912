"""Settings of `otdd encode`, without torch: the command line refuses quickly."""

from __future__ import annotations

from dataclasses import dataclass

from otdd.distill.config import require


@dataclass(frozen=True)
class EncodeConfig:
    """How the latents are laid out, and what is counted of them."""

    shard: int = 4096
    """Images in one file."""
    batch: int = 64
    """Images read and encoded at once."""
    support: int = 10
    """k-means centres of every class kept with its mean and deviation; 0: none."""
    seed: int = 0
    """Seed of k-means, and of the split of data without test images."""

    def __post_init__(self) -> None:
        require(self.shard >= 1, "shard", self.shard, "an integer >= 1")
        require(self.batch >= 1, "batch", self.batch, "an integer >= 1")
        require(self.support >= 0, "support", self.support, "an integer >= 0")
        require(0 <= self.seed < 2**31, "seed", self.seed, "an integer in [0, 2^31)")
