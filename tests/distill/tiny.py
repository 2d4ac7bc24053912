"""Tiny random models of diffusers for the tests."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from otdd.distill.codec import import_diffusers
from otdd.distill.data import ImageData, LabeledImages, load_data


def randomise(model, seed: int = 0, scale: float = 0.1):
    """Random weights everywhere, so that no part of the model is an identity or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def transformer(classes: int = 3, channels: int = 4, side: int = 4, learned: bool = False):
    return randomise(
        import_diffusers().DiTTransformer2DModel(
            num_attention_heads=1,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=channels * (2 if learned else 1),
            num_layers=1,
            sample_size=side,
            patch_size=2,
            num_embeds_ada_norm=classes,
        )
    )


def autoencoder(channels: int = 4):
    torch.manual_seed(0)
    return (
        import_diffusers()
        .AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            scaling_factor=0.5,
        )
        .eval()
    )


def dit_pipeline(classes: int = 3, learned: bool = False, id2label=None):
    diffusers = import_diffusers()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    model = transformer(classes, learned=learned)
    return diffusers.DiTPipeline(model, autoencoder(), scheduler, id2label=id2label)


def images(counts=(6, 6, 6), side: int = 8, channels: int = 1) -> ImageData:
    """Random images, so many of each class."""
    size = (sum(counts), channels, side, side)
    pixels = torch.randint(
        0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    part = LabeledImages(pixels, labels)
    return ImageData("toy", [f"c{k}" for k in range(len(counts))], part, part)


def few_digits(folder: Path, train: int = 10, test: int = 2) -> str:
    """A file of the first so many digits of each class, as arrays."""
    arrays, data = {}, load_data("digits")
    for name, part, count in (("train", data.train, train), ("test", data.test, test)):
        rows = torch.cat([(part.labels == k).nonzero()[:count, 0] for k in range(10)])
        arrays |= {f"x_{name}": part.images[rows].numpy(), f"y_{name}": part.labels[rows].numpy()}
    np.savez(folder / "digits.npz", **arrays)
    return str(folder / "digits.npz")


class Constant(torch.nn.Module):
    """A denoiser that always predicts the same."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x, timestep, class_labels):
        return SimpleNamespace(sample=self.output)
