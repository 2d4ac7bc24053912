"""Settings of `otdd fit`. Nothing here imports torch, so that the command line refuses quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from otdd.distill.config import require

Tune = Literal["embeddings", "lora", "difffit", "all"]

# Peak learning rates. From scratch: of the small transformers here. `all` is DiT's, `difffit` ten
# times that, as in the DiffFit paper; the others are ours.
LEARNING_RATES = {"": 1e-3, "embeddings": 1e-3, "lora": 5e-4, "difffit": 1e-3, "all": 1e-4}


@dataclass(frozen=True)
class FitConfig:
    """Size and training of a generator; zeros of width, layers, patch_size and lr are chosen."""

    width: int = 0
    """Features of the transformer, a multiple of 32; 0: 128."""
    layers: int = 0
    """Transformer blocks; 0: 6."""
    patch_size: int = 0
    """Side of a patch in latent pixels; 0: a quarter of the latent side up to 8, then an eighth."""
    steps: int = 6000
    """Training steps."""
    batch: int = 32
    """Images in a step."""
    lr: float = 0.0
    """Peak learning rate: linear warm-up over 5 % of the steps, then a cosine to zero; 0: 0.001,
    with --from 0.0005 for lora and 0.0001 for all."""
    weight_decay: float = 0.01
    """Weight decay of the optimiser, per step as a factor of the learning rate."""
    min_snr: float = 5.0
    """Largest weight of the error of x0, by signal-to-noise ratio (1 or more); 0: no weights."""
    ema: float = 0.999
    """Decay per step of the averaged weights, which are kept; less at the beginning."""
    label_dropout: float = 0.1
    """Fraction of the labels replaced by the null class, for classifier-free guidance."""
    flip: bool = False
    """Horizontal flips of half of the images."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, which an interrupted training goes on from."""
    grid_every: int = 1000
    """Steps between two pictures of samples, in OUT.grids, always of the same noise; 0: none."""
    seed: int = 0
    """Seed of weights, batches and noise."""
    tune: Tune = "lora"
    """What is trained with --from: the class embeddings alone, or also low-rank updates (lora),
    biases, norms and scales (difffit), or everything (all)."""
    rank: int = 16
    """Rank of the updates of lora, in features."""

    def __post_init__(self) -> None:
        wide = self.width >= 0 and self.width % 32 == 0
        require(wide, "width", self.width, "a multiple of 32, or 0")
        least = {"layers": 0, "patch_size": 0, "steps": 1, "batch": 1}
        least |= {"checkpoint_every": 1, "grid_every": 0, "rank": 1}
        for name, low in least.items():
            value = getattr(self, name)
            require(value >= low, name, value, f"an integer >= {low}")
        require(
            self.min_snr == 0 or self.min_snr >= 1, "min_snr", self.min_snr, "0 or a number >= 1"
        )
        for name in ("lr", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        for name in ("ema", "label_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)")
        require(0 <= self.seed < 2**31, "seed", self.seed, "an integer in [0, 2^31)")
        require(self.tune in get_args(Tune), "tune", self.tune, ", ".join(get_args(Tune)))
