"""Fine-tuning of a class-conditional DiT on the user's classes (`otdd fit --from`).

The class embeddings are made anew for the classes of the data. Beside them nothing, low-rank
updates, a small subset or everything is trained; the rest keeps its bits. What was added for the
training (low-rank factors, scales) is folded into the weights, so the result is an ordinary
`DiTPipeline`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from otdd import _torchvision
from otdd.distill.codec import AutoencoderCodec, import_diffusers
from otdd.distill.config import ConfigError
from otdd.distill.data import ImageData
from otdd.distill.export import new_folder
from otdd.distill.fit import Pictures, key_of, resolved
from otdd.distill.fit_config import FitConfig
from otdd.distill.generator import Generator, build_transformer, generator_digest
from otdd.distill.store import Store
from otdd.distill.trainer import (
    Picture,
    Progress,
    Trainer,
    alone,
    check_unfinished,
    refuse_other,
    run,
)

SUMMARY = "fit.json"
TABLE = "class_embedder.embedding_table.weight"
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
SCALED = ("attn1.to_out.0", "ff.net.2")
CLASSES = "classes.json"


def load_base(path: str | os.PathLike[str]) -> Generator:
    """The DiT to start from: the folder of a `DiTPipeline`.

    Raises:
        ConfigError: it is no folder.
        GeneratorError: it is no DiT pipeline.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"from: {str(path)!r} is not accepted; expected a folder of DiTPipeline")
    return Generator.load(path)


def tune(
    data: ImageData,
    base: Generator,
    config: FitConfig | None = None,
    out: str | os.PathLike[str] = "generator",
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    picture: Picture | None = None,
) -> Generator:
    """Trains a DiT further on the classes of the data and writes a `DiTPipeline` folder.

    Args:
        data: training data, of the size of the images that the base makes.
        base: as `load_base` gives it; left as it is.
        config: `tune` says what is trained; `width`, `layers` and `patch_size` are the base's.
        out: folder to write; the checkpoint and the pictures lie beside it. A finished folder of
            the same training is only read.
        device: where the model is trained.
        progress: called as progress("fit", step, steps, note).
        picture: makes the pictures on the way, of the generator as averaged so far and its step.

    Returns:
        The generator with averaged weights, as read back from the folder.

    Raises:
        ConfigError: settings of the base are given, or its images are not those of the data.
        StoreError: `out` or its checkpoint is there, of another training.
        KeyboardInterrupt: on Ctrl-C; the message says what is kept where.
    """
    config, key = _checked(data, base, config or FitConfig())
    target = Path(out)
    checkpoint = f"{target.name}.checkpoint"
    with alone(target) as store:
        if target.exists():
            _refuse_other(target, key)
            store.remove(checkpoint)  # a kill may have come before this
            return _finished(target)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = with_classes(base.transformer, base.classes, data.classes)
            model = choose(model, config.tune, config.rank).to(device)
        base.codec.to(device)
        latents = base.codec.encode(data.train.images)
        now = dataclasses.replace(base, transformer=model, classes=list(data.classes), info={})
        trainer = Trainer(model, latents, data.train.labels, base.scheduler_config, config)
        picture = picture or Pictures(data, config.seed)
        run(trainer, store, target.name, key, now, picture, progress)
        facts = trainer.facts()
        with trainer.averaged(), torch.no_grad():
            _save(target, fold(model).cpu(), now, {**key, **facts})
        store.remove(checkpoint)
    return _finished(target)


def check_out(
    data: ImageData, base: Generator, config: FitConfig, out: str | os.PathLike[str]
) -> None:
    """Refuses, as `tune` does and touching nothing, an `out` that holds another training.

    Raises:
        ConfigError: settings, base and data do not fit.
        StoreError: `out` or its checkpoint is there, of another training.
    """
    target, (_, key) = Path(out), _checked(data, base, config)
    if target.exists():
        _refuse_other(target, key)
    else:
        check_unfinished(target, key)


def with_classes(base: nn.Module, old: Sequence[str], new: Sequence[str]) -> nn.Module:
    """A copy of a DiT for other classes, with all weights frozen.

    A class that the base knows by name keeps its embedding, the null class too; the others start
    from the mean of all classes (ours).
    """
    settings: Any = base.config
    config = {k: v for k, v in settings.items() if not k.startswith("_")}
    made = build_transformer({**config, "num_embeds_ada_norm": len(new)})
    known = {name: k for k, name in enumerate(old)}
    state = {k: v.float() for k, v in base.state_dict().items()}
    for name in [n for n in state if n.endswith(TABLE)]:
        table, null = state[name][: len(old)], state[name][len(old) :]
        rows = [table[known[c]] if c in known else table.mean(0) for c in new]
        state[name] = torch.cat([torch.stack(rows), null])
    made.load_state_dict(state)
    return made.eval().requires_grad_(False)


def choose(model: nn.Module, tune: str, rank: int) -> nn.Module:
    """Marks what is to be trained, and adds what `fold` takes away again; returns the model.

    `lora` is Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", by peft, on
    the products of attention and feed-forward, with alpha the rank. `difffit` is Xie et al. 2023,
    "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient
    Fine-Tuning": biases, norms, class embeddings, and scales of what attention and feed-forward
    add to the stream, one a channel.
    """
    if tune == "lora":
        peft = _import_peft()
        settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ADAPTED))
        model = peft.inject_adapter_in_model(settings, model)
    if tune == "difffit":
        blocks: Any = model.transformer_blocks
        for block in blocks:
            for name in SCALED:
                block.set_submodule(name, _Scaled(block.get_submodule(name)))
    norms = {id(m) for m in model.modules() if isinstance(m, nn.LayerNorm)}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            small = name in ("bias", "scale") or id(module) in norms
            table = f"{module_name}.{name}".endswith(TABLE)
            if tune == "all" or table or (tune == "difffit" and small) or ".lora_" in module_name:
                parameter.requires_grad_(True)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Puts low-rank updates and scales into the weights they belong to; returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _Scaled):
            model.set_submodule(name, module.folded())
        elif hasattr(module, "base_layer"):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model


class _Scaled(nn.Module):
    """A linear layer times a trained factor of each channel, 1 at first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale

    def folded(self) -> nn.Linear:
        """The layer that does the same."""
        self.linear.weight.mul_(self.scale[:, None])
        if self.linear.bias is not None:
            self.linear.bias.mul_(self.scale)
        return self.linear


def _checked(
    data: ImageData, base: Generator, config: FitConfig
) -> tuple[FitConfig, dict[str, Any]]:
    """The settings with what is chosen, and what the trained weights depend on."""
    config = resolved(config, config.tune)
    _check(config, base, data)
    return config, key_of(data, config, base=generator_digest(base))


def _refuse_other(target: Path, key: dict[str, Any]) -> None:
    made = Store(target)
    refuse_other(target, made.read_json(SUMMARY) if made.has(SUMMARY) else None, key)


def _check(config: FitConfig, base: Generator, data: ImageData) -> None:
    for name in ("width", "layers", "patch_size"):
        if getattr(config, name):
            raise ConfigError(f"{name}: {getattr(config, name)} is not accepted with --from")
    if not isinstance(base.codec, AutoencoderCodec):
        raise ConfigError("from: expected a DiTPipeline, whose images an autoencoder encodes")
    side = base.image_shape[1]
    if data.image_shape[1:] != (side, side):
        seen = "x".join(map(str, data.image_shape[1:]))
        raise ConfigError(f"resolution: the DiT makes images of {side}x{side}, the data has {seen}")
    if config.tune == "lora":
        _import_peft()


def _finished(target: Path) -> Generator:
    made = Generator.load(target)
    return dataclasses.replace(made, info=Store(target).read_json(SUMMARY))


def _save(target: Path, model: nn.Module, made: Generator, about: dict[str, Any]) -> None:
    diffusers = import_diffusers()
    kind = made.scheduler_config.get("_class_name", "DDIMScheduler")
    scheduler = getattr(diffusers, kind).from_config(made.scheduler_config)
    with new_folder(target) as folder:
        codec: Any = made.codec
        vae = codec.vae.cpu()
        diffusers.DiTPipeline(model, vae, scheduler).save_pretrained(folder.path)
        folder.write_json(CLASSES, made.classes)
        folder.write_json(SUMMARY, about)


def _import_peft() -> Any:
    _torchvision.repair()
    try:
        import peft
    except ImportError:
        raise ConfigError('tune: lora needs peft: pip install "otdd[tune]"') from None
    return peft
