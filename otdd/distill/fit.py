"""Training of small generators (`otdd fit`).

Every random draw of step s comes from (seed, s), so a run that was interrupted and continued from
its checkpoint ends with the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from otdd.distill.codec import Codec, PixelCodec
from otdd.distill.config import ConfigError
from otdd.distill.data import ImageData
from otdd.distill.generator import Generator, build_transformer
from otdd.distill.locks import Held, locked
from otdd.distill.store import Store, StoreError

Progress = Callable[[str, int, int], None]

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class FitConfig:
    """Size and training of a small generator; zeros of the first three are chosen by the data."""

    width: int = 0
    """Width of the transformer (a multiple of 32)."""
    layers: int = 0
    """Transformer blocks."""
    patch_size: int = 0
    """Side of a patch in latent pixels."""
    steps: int = 8000
    """Training steps."""
    batch: int = 128
    """Images in a step."""
    lr: float = 1e-3
    """Peak learning rate: linear warm-up over 5 % of the steps, then a cosine to zero."""
    weight_decay: float = 0.01
    """Weight decay."""
    ema: float = 0.999
    """Decay of the averaged weights that are kept."""
    label_dropout: float = 0.1
    """Part of the labels replaced by the null class, for classifier-free guidance."""
    flip: bool = False
    """Random horizontal flips."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of weights, batches and noise."""

    def __post_init__(self) -> None:
        checks = {
            "width": (self.width >= 0 and self.width % 32 == 0, "a multiple of 32, or 0"),
            "layers": (self.layers >= 0, "an integer >= 0"),
            "patch_size": (self.patch_size >= 0, "an integer >= 0"),
            "steps": (self.steps >= 1, "an integer >= 1"),
            "batch": (self.batch >= 1, "an integer >= 1"),
            "lr": (self.lr > 0, "a number > 0"),
            "weight_decay": (self.weight_decay >= 0, "a number >= 0"),
            "ema": (0 <= self.ema < 1, "a number in [0, 1)"),
            "label_dropout": (0 <= self.label_dropout < 1, "a number in [0, 1)"),
            "checkpoint_every": (self.checkpoint_every >= 1, "an integer >= 1"),
            "seed": (0 <= self.seed < 2**31, "an integer in [0, 2^31)"),
        }
        for key, (ok, accepted) in checks.items():
            if not ok:
                value = getattr(self, key)
                raise ConfigError(f"{key}: {value!r} is not accepted; expected {accepted}")


def fit(
    data: ImageData,
    config: FitConfig | None = None,
    out: str | os.PathLike[str] = "generator.safetensors",
    *,
    resume: bool = True,
    codec: Codec | None = None,
    progress: Progress | None = None,
    info: dict[str, Any] | None = None,
) -> Generator:
    """Trains a class-conditional DiT on the training images and writes it to `out`.

    Args:
        data: training data.
        config: size and training.
        out: file to write; the checkpoint lies beside it until the end.
        resume: go on from the checkpoint of the same data and settings, if there is one, and leave
            a finished generator of them alone.
        codec: pixels by default.
        progress: called as progress("fit", step, steps).
        info: further JSON values to keep in the file.

    Returns:
        The generator with averaged weights, as read back from the file.
    """
    config, codec, target = config or FitConfig(), codec or PixelCodec(), Path(out)
    store = Store(target.parent)
    store.probe(target.name)
    about = {"fit": _facts(data, config), **(info or {})}
    known = Generator.load(target) if target.exists() else None  # nothing else is ever replaced
    try:
        with locked(target.parent / f".{target.name}.lock"):
            store.sweep(target.name, _checkpoint(target.name))
            if not (resume and known is not None and _same(known, about, codec)):
                trainer = _trained(data, config, codec, store, target.name, resume, progress)
                _generator(trainer, data, codec, about).save(target)
            store.remove(_checkpoint(target.name))
    except Held as holder:
        raise StoreError(
            f"{target} is being made by another otdd process ({holder}); wait for it"
        ) from None
    return Generator.load(target)


def _trained(
    data: ImageData,
    config: FitConfig,
    codec: Codec,
    store: Store,
    name: str,
    resume: bool,
    progress: Progress | None,
) -> _Trainer:
    """A trainer after its last step, from the checkpoint of a generator if there is one."""
    latents, checkpoint = codec.encode(data.train.images), _checkpoint(name)
    trainer = _Trainer(config, latents, data.train.labels, data.num_classes)
    key = hashlib.sha256(repr((config, data.fingerprint, codec.config())).encode()).hexdigest()
    if resume and store.has(checkpoint):
        tensors, meta = store.read_sealed(checkpoint)
        if meta["key"] == key:
            trainer.load(tensors, meta["step"])
    while trainer.step < config.steps:
        trainer.train_step()
        if not math.isfinite(trainer.loss):
            raise ConfigError(
                f"lr: {config.lr} makes the training diverge: the loss is {trainer.loss} after "
                f"step {trainer.step}; expected a smaller one"
            )
        if progress is not None:
            progress("fit", trainer.step, config.steps)
        if trainer.step % config.checkpoint_every == 0 and trainer.step < config.steps:
            store.write_sealed(checkpoint, trainer.state(), {"key": key, "step": trainer.step})
    return trainer


def _facts(data: ImageData, config: FitConfig) -> dict[str, Any]:
    return {"data": data.name, "fingerprint": data.fingerprint, **dataclasses.asdict(config)}


def _same(known: Generator, about: dict[str, Any], codec: Codec) -> bool:
    """Whether a generator is what this training would make."""
    seen = {key: known.info.get(key) for key in about}
    return seen == about and known.codec.config() == codec.config()


def _generator(
    trainer: _Trainer, data: ImageData, codec: Codec, about: dict[str, Any]
) -> Generator:
    return Generator(
        transformer=trainer.average,
        scheduler_config=dict(SCHEDULE),
        codec=codec,
        classes=list(data.classes),
        image_shape=data.image_shape,
        info={**about, "loss": round(trainer.loss, 6)},
    )


def _checkpoint(name: str) -> str:
    return f"{name}.checkpoint"


class _Trainer:
    """Weights, their average and AdamW, one step at a time; all of it goes into a checkpoint."""

    def __init__(self, config: FitConfig, latents: Tensor, labels: Tensor, classes: int) -> None:
        self.config, self.latents, self.labels, self.classes = config, latents, labels, classes
        self.step, self.loss = 0, 0.0
        settings = transformer_config(config, tuple(latents.shape[1:]), classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            # eval: label dropout is drawn here, once per image; in training mode every block of
            # the diffusers model would drop labels by itself.
            self.model = build_transformer(settings).eval()
            self.average = build_transformer(settings).eval().requires_grad_(False)
        _zero_init(self.model)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        betas = torch.linspace(
            SCHEDULE["beta_start"], SCHEDULE["beta_end"], 1000, dtype=torch.float64
        )
        self.alpha_bar = (1 - betas).cumprod(0).float()

    def train_step(self) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * _warm_cosine(self.step, config.steps)
        x0, labels, t, noise = self._batch()
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        predicted = self.model(noisy, timestep=t, class_labels=labels).sample
        loss = F.mse_loss(predicted, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, self.step / (self.step + 10))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for kept, new in pairs:
            kept.lerp_(new.detach(), 1 - decay)
        self.loss = 0.99 * self.loss + 0.01 * loss.item() if self.step > 1 else loss.item()

    def _batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config = self.config
        key = hashlib.sha256(f"fit/{config.seed}/{self.step}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        pick = torch.randint(len(self.latents), (config.batch,), generator=rng)
        x0, labels = self.latents[pick], self.labels[pick]
        drop = torch.rand(config.batch, generator=rng) < config.label_dropout
        labels = labels.masked_fill(drop, self.classes)
        if config.flip:
            mirror = torch.rand(config.batch, 1, 1, 1, generator=rng) < 0.5
            x0 = torch.where(mirror, x0.flip(-1), x0)
        t = torch.randint(SCHEDULE["num_train_timesteps"], (config.batch,), generator=rng)
        return x0, labels, t, torch.randn(x0.shape, generator=rng)

    def state(self) -> dict[str, Tensor]:
        """Everything a continued run needs."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in slots.items()}
        tensors["loss"] = torch.tensor(self.loss, dtype=torch.float64)
        return tensors

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Takes over what `state` gave after `step` steps."""
        for name, module in (("model.", self.model), ("average.", self.average)):
            part = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
            module.load_state_dict(part)
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, slot = name.split(".")
                state["state"].setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(state)
        self.step, self.loss = step, float(tensors["loss"])


def transformer_config(
    config: FitConfig, latent_shape: tuple[int, ...], classes: int
) -> dict[str, Any]:
    """Configuration of the DiT for latents of (c, h, w): about 1 M parameters by default."""
    channels, height, width = latent_shape
    if height != width:
        raise ConfigError(f"latents must be square, got {height}x{width}")
    patch = config.patch_size or max(2, 2 ** max(0, round(math.log2(width)) - 3))
    if width % patch:
        raise ConfigError(f"patch_size: {patch} does not divide the latent side {width}")
    return {
        "num_attention_heads": (config.width or 96) // 32,
        "attention_head_dim": 32,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": config.layers or 5,
        "sample_size": width,
        "patch_size": patch,
        "num_embeds_ada_norm": classes,
        "norm_elementwise_affine": False,
    }


def _zero_init(model: torch.nn.Module) -> None:
    """As in DiT: blocks start as identity and the output as zero."""
    parts: Any = model  # of diffusers, whose names a Module has not
    zeroed = [block.norm1.linear for block in parts.transformer_blocks]
    for layer in [*zeroed, parts.proj_out_1, parts.proj_out_2]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
