"""Networks that learn from a distilled set: the field's ConvNet and ResNetAP, and timm's models.

Every network takes images in [0, 1] and normalises them itself, so that teachers, students and
whoever loads a checkpoint cannot disagree about it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from otdd.distill.config import ConfigError
from otdd.distill.data import ImageData

OWN = ("convnet", "convnet-3", "convnet-6", "resnetap-10")


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling; a linear head."""

    def __init__(
        self, channels: int, classes: int, size: tuple[int, int], depth: int, width: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), _norm(width, size)]
            layers.append(nn.ReLU(inplace=True))
            if min(size) >= 2:
                layers.append(nn.AvgPool2d(2))
                size = (size[0] // 2, size[1] // 2)
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width * size[0] * size[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        return self.head(self.features(x).flatten(1))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, width: int, size: tuple[int, int], pool: bool) -> None:
        super().__init__()
        after = (size[0] // 2, size[1] // 2) if pool else size
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            _norm(width, size),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2) if pool else nn.Identity(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            _norm(width, after),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False) if channels != width else nn.Identity(),
            nn.AvgPool2d(2) if pool else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNetAP(nn.Module):
    """ResNet of one basic block per stage that shrinks by average pooling, not by strides."""

    def __init__(self, channels: int, classes: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        layers += [_norm(width, size), nn.ReLU(inplace=True)]
        while min(size) > 64:  # a stem for photographs
            layers.append(nn.AvgPool2d(2))
            size = (size[0] // 2, size[1] // 2)
        before = width
        for stage in range(4):
            pool = stage > 0 and min(size) >= 4
            layers.append(_ResidualBlock(before, width << stage, size, pool))
            size = (size[0] // 2, size[1] // 2) if pool else size
            before = width << stage
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        return self.head(self.features(x).flatten(1))


class Normalized(nn.Module):
    """A network behind the normalisation it expects."""

    def __init__(self, body: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.body = body
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1], (B, C, H, W), to logits (B, K)."""
        return self.body((x - self.mean) / self.std)


def make_network(name: str, data: ImageData, seed: int) -> Normalized:
    """A freshly initialised network for the images and classes of a data set.

    Args:
        name: convnet (depth by image size), convnet-DEPTH, resnetap-10, or a timm name.
        data: gives channels, size, classes and normalisation.
        seed: of the initial weights.

    Raises:
        ConfigError: no such architecture, or it cannot take these images.
    """
    channels, height, width = data.image_shape
    side, classes = min(height, width), len(data.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        convnet = re.fullmatch(r"convnet(?:-(\d+))?", name)
        if convnet:
            depth = int(convnet[1] or min(6, max(2, side.bit_length() - 3)))
            wide = 64 if side < 16 else 128
            body: nn.Module = ConvNet(channels, classes, (height, width), depth, wide)
        elif name == "resnetap-10":
            body = ResNetAP(channels, classes, (height, width), 32 if side < 16 else 64)
        else:
            body = _timm(name, channels, classes, (height, width))
    return Normalized(body, data.mean, data.std)


def check_network(name: str, data: ImageData) -> None:
    """Raise `ConfigError` when the architecture is unknown or cannot take these images."""
    if name not in OWN:
        _check_fit(lambda: make_network(name, data, seed=0), name, data)


def check_pretrained(name: str, data: ImageData) -> None:
    """The same for a pretrained timm model, of which no weights are fetched."""
    what = f"relabel.teachers: timm:{name}"
    _check_fit(lambda: pretrained(name, data, weights=False), what, data)


def _check_fit(make: Callable[[], Normalized], what: str, data: ImageData) -> None:
    try:
        network = make().eval()
        with torch.no_grad():
            seen = tuple(network(torch.zeros(1, *data.image_shape)).shape)
    except ConfigError:
        raise
    except Exception as error:  # of many kinds, by whoever wrote the network
        shape = "x".join(map(str, data.image_shape))
        raise ConfigError(f"{what} cannot take images of {shape}: {_line(error)}") from None
    if seen != (1, data.num_classes):
        raise ConfigError(
            f"{what} gives {seen} for an image; expected logits (1, {data.num_classes})"
        )


def pretrained(name: str, data: ImageData, *, weights: bool = True) -> Normalized:
    """A pretrained timm model with its own normalisation and the classes of the data.

    Without `weights` it is the same network with others, for checks.
    """
    timm = import_timm()
    try:
        body = timm.create_model(name, pretrained=weights, in_chans=data.image_shape[0])
    except Exception as error:
        raise ConfigError(f"relabel.teachers: timm:{name} cannot be had: {_line(error)}") from error
    if body.num_classes != len(data.classes):
        raise ConfigError(
            f"relabel.teachers: timm:{name} knows {body.num_classes} classes, "
            f"{data.name} has {len(data.classes)}"
        )
    mean, std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
    if data.image_shape[0] != len(mean):
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return Normalized(body, mean, std)


def load_checkpoint(arch: str, path: str | Path, data: ImageData) -> Normalized:
    """A network of this architecture with the weights of a safetensors or torch file.

    Torch files are read with `weights_only=True`: no code in them is run. Weights may be those of
    a network in DistributedDataParallel. Teachers of otdd carry the names of their classes, which
    must be those of the data, and their normalisation; other networks get that of the data.

    Raises:
        ConfigError: the file cannot be read or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = make_network(arch, data, seed=0)
    state: Any
    classes = None
    try:
        if str(path).endswith(".safetensors"):
            state = load_file(path)
            classes = _classes_of(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a pickle that is refused then
                state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, Mapping):
                state = state.get("state_dict", state.get("model", state))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"relabel.teachers: cannot read {path}: {_line(error)}") from error
    except Exception as error:  # of many kinds; what torch says of code is advice to run it
        raise ConfigError(
            f"relabel.teachers: cannot read {path}: expected safetensors (a name that ends so), or "
            "what torch.load reads with weights_only=True, such as a saved state_dict()"
        ) from error
    if not (isinstance(state, Mapping) and all(isinstance(name, str) for name in state)):
        raise ConfigError(
            f"relabel.teachers: {path} holds no weights by name; expected those of state_dict(), "
            "or a mapping with them under 'state_dict' or 'model'"
        )
    if all(name.startswith("module.") for name in state):  # as DistributedDataParallel has them
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if classes not in (None, list(data.classes)):
        raise ConfigError(
            f"relabel.teachers: {path} knows the classes {_some(classes)}; "
            f"{data.name} has {_some(data.classes)}"
        )
    # A file of ours carries the normalisation; others hold the bare network.
    target = network if "mean" in state else network.body
    try:
        target.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        lines = str(error).splitlines()
        why = "; ".join(" ".join(line.split())[:160] for line in lines[1:4] or lines)
        raise ConfigError(f"relabel.teachers: {path} does not hold a {arch}: {why}") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise ConfigError(f"relabel.teachers: {path} holds weights that are not finite")
    return network


def _classes_of(path: str | Path) -> Any:
    """Class names that otdd has put into a file of weights; None in files of others."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("otdd", "null"))
    return about.get("classes") if isinstance(about, dict) else None


def _some(classes: Sequence[str]) -> str:
    return ", ".join(map(repr, classes[:5])) + ", ..." * (len(classes) > 5)


def _norm(width: int, size: tuple[int, int]) -> nn.Module:
    # One group per channel is an instance norm; on a few pixels that would erase its input.
    return nn.GroupNorm(width if min(size) > 2 else 1, width)


def _timm(name: str, channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name}*")[:3])
        hint = f" (like {close})" if close else ""
        message = f"unknown architecture {name!r}; known: {', '.join(OWN)}, or a timm name{hint}"
        raise ConfigError(message)
    options = {"num_classes": classes, "in_chans": channels}
    try:
        return timm.create_model(name, img_size=size, **options)
    except TypeError:  # convolutional models take any size and know no such argument
        return timm.create_model(name, **options)


def import_timm() -> ModuleType:
    """timm, imported when first needed, with torchvision repaired."""
    from otdd import _torchvision

    _torchvision.repair()
    import timm

    return timm


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
