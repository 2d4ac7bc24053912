"""Training of small generators from scratch (`otdd fit`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from otdd.distill.codec import Codec, PixelCodec
from otdd.distill.config import ConfigError, SampleConfig
from otdd.distill.data import ImageData
from otdd.distill.fit_config import LEARNING_RATES, FitConfig
from otdd.distill.generator import Generator, build_transformer
from otdd.distill.plots import MAX_CLASSES, grid
from otdd.distill.sample import Batch, run_batch
from otdd.distill.terms import rng
from otdd.distill.trainer import (
    Picture,
    Progress,
    Trainer,
    alone,
    check_unfinished,
    refuse_other,
    run,
)

__all__ = ["FitConfig", "fit"]

# x0 on the cosine schedule of Nichol & Dhariwal 2021: of large patches a small network can tell the
# image sooner than the noise (Li & He 2025, "Back to Basics: Let Denoising Generative Models
# Denoise"), and samples keep less noise.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
}
PICTURED, PICTURE_STEPS = 4, 25  # images a class, denoising steps
SHOWN = ("checkpoint_every", "grid_every")  # settings that change no weight


def fit(
    data: ImageData,
    config: FitConfig | None = None,
    out: str | os.PathLike[str] = "generator.safetensors",
    *,
    codec: Codec | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    picture: Picture | None = None,
    info: dict[str, Any] | None = None,
) -> Generator:
    """Trains a class-conditional DiT on the training images and writes it to `out`.

    Args:
        data: training data.
        config: size and training.
        out: file to write; the checkpoint and the pictures lie beside it. A finished file of the
            same training is only read.
        codec: pixels by default.
        device: where the model is trained.
        progress: called as progress("fit", step, steps, note).
        picture: makes the pictures on the way, of the generator as averaged so far and its step.
        info: further JSON values to keep in the file.

    Returns:
        The generator with averaged weights, as read back from the file.

    Raises:
        StoreError: `out` or its checkpoint is there, of another training.
        KeyboardInterrupt: on Ctrl-C; the message says what is kept where.
    """
    config, codec = resolved(config or FitConfig(), ""), codec or PixelCodec()
    target, key = Path(out), _key(data, config, codec)
    checkpoint = f"{target.name}.checkpoint"
    with alone(target) as store:
        finished = _finished(target, key)
        if finished is not None:
            store.remove(checkpoint)  # a kill may have come before this
            return finished
        latents = codec.encode(data.train.images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_transformer(
                transformer_config(config, tuple(latents.shape[1:]), data.num_classes)
            )
        _zero_init(model)
        made = Generator(
            transformer=model.to(device),
            scheduler_config=dict(SCHEDULE),
            codec=codec,
            classes=list(data.classes),
            image_shape=data.image_shape,
        )
        trainer = Trainer(model, latents, data.train.labels, SCHEDULE, config)
        picture = picture or Pictures(data, config.seed)
        run(trainer, store, target.name, key, made, picture, progress)
        made.info = {"fit": key, **trainer.facts(), **(info or {})}
        with trainer.averaged():
            made.save(target)
        store.remove(checkpoint)
    return Generator.load(target)


def check_out(data: ImageData, config: FitConfig, out: str | os.PathLike[str]) -> None:
    """Refuses, as `fit` does and touching nothing, an `out` that holds another training.

    Raises:
        StoreError: so it is, or its checkpoint is.
        GeneratorError: it is no generator.
    """
    target, key = Path(out), _key(data, resolved(config, ""), PixelCodec())
    if _finished(target, key) is None:
        check_unfinished(target, key)


def _key(data: ImageData, config: FitConfig, codec: Codec) -> dict[str, Any]:
    return key_of(data, config, codec=codec.config())


def _finished(target: Path, key: dict[str, Any]) -> Generator | None:
    """The generator that is there, of this training."""
    if not target.exists():
        return None
    made = Generator.load(target)
    refuse_other(target, made.info.get("fit"), key)
    return made


def resolved(config: FitConfig, tune: str) -> FitConfig:
    """The settings with their learning rate chosen, for a way of tuning or "" from scratch."""
    return dataclasses.replace(config, lr=config.lr or LEARNING_RATES[tune])


def key_of(data: ImageData, config: FitConfig, **more: Any) -> dict[str, Any]:
    """What the trained weights depend on, as JSON."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in SHOWN}
    return {"data": data.name, "fingerprint": data.fingerprint, **settings, **more}


class Pictures:
    """Samples of a generator in training as a PNG, beside real images; always of the same noise.

    Args:
        data: gives the real images.
        seed: of the noise.
        scales: of classifier-free guidance, a row of samples each.
    """

    def __init__(self, data: ImageData, seed: int, scales: Sequence[float] = (1.0,)) -> None:
        self.seed, self.train, self.scales = seed, data.train, scales
        self.shown = list(data.classes[:MAX_CLASSES])
        self.labels = torch.arange(len(self.shown)).repeat_interleave(PICTURED)
        firsts = [(data.train.labels == k).nonzero()[:PICTURED, 0] for k in range(len(self.shown))]
        self.real = torch.cat(firsts)

    def __call__(self, generator: Generator, step: int) -> bytes:
        shown = {}
        for scale in self.scales:
            title = f"step {step}" + (f", guidance {scale:g}" if scale != 1 else "")
            shown[title] = self._samples(generator, scale), self.labels
        real = self.train.images[self.real], self.train.labels[self.real]
        return grid({**shown, "real": real}, generator.classes)

    def _samples(self, generator: Generator, scale: float) -> Tensor:
        streams = [rng(self.seed, "grid", name, n) for name in self.shown for n in range(PICTURED)]
        batch = Batch(self.labels.to(generator.device), self.labels, streams)
        settings = SampleConfig(steps=PICTURE_STEPS, guidance_scale=scale)
        return generator.codec.decode(run_batch(generator, batch, settings).cpu())


def transformer_config(
    config: FitConfig, latent_shape: tuple[int, ...], classes: int
) -> dict[str, Any]:
    """Configuration of the DiT for latents of (c, h, w): 2 M parameters and 16 or 64 patches.

    Large patches make most of little work: a quarter of the side, up to 8, then an eighth. They
    overlap, as samples of so little training would otherwise have seams.
    """
    channels, height, width = latent_shape
    if height != width:
        raise ConfigError(f"latents must be square, got {height}x{width}")
    most = max(2, min(8, width // 4), width // 8)
    patch = config.patch_size or max(p for p in range(1, most + 1) if width % p == 0)
    if width % patch:
        raise ConfigError(f"patch_size: {patch} does not divide the latent side {width}")
    return {
        "num_attention_heads": (config.width or 128) // 32,
        "attention_head_dim": 32,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": config.layers or 6,
        "sample_size": width,
        "patch_size": patch,
        "num_embeds_ada_norm": classes,
        "norm_elementwise_affine": False,
        "lapped": True,
    }


def _zero_init(model: nn.Module) -> None:
    """As in DiT: blocks start as identity and the output as zero."""
    parts: Any = model  # of diffusers, whose names a Module has not
    zeroed = [block.norm1.linear for block in parts.transformer_blocks]
    for layer in [*zeroed, parts.proj_out_1, parts.proj_out_2]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
