"""Codecs: uint8 images <-> latents the generator works on.

A codec has `encode`, `decode`, `pixels` (decoding with gradients, to images in about [0, 1] as
networks see them), `latent_shape`, `bounded` (latents live in [-1, 1]), `config` (JSON) and
`tensors` (what a generator file must carry). Encoding is deterministic.
"""

import hashlib
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from otdd import _torchvision


class Codec(Protocol):
    """Maps images uint8 (N, C, H, W) to latents float32 (N, c, h, w) and back."""

    bounded: bool

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def pixels(self, latents: Tensor) -> Tensor: ...

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]: ...

    def to(self, device: str | torch.device) -> None: ...

    def config(self) -> dict[str, Any]: ...

    def tensors(self) -> dict[str, Tensor]: ...


class PixelCodec:
    """Pixels as latents, x / 127.5 - 1: for tiny images. uint8 -> float32 -> uint8 is exact."""

    bounded = True

    def encode(self, images: Tensor) -> Tensor:
        _check_images(images)
        return images.float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        _check_latents(latents)
        return ((latents.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def pixels(self, latents: Tensor) -> Tensor:
        return (latents.float() + 1) / 2

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return image_shape

    def to(self, device: str | torch.device) -> None:
        """Has nothing to move: images stay where they are."""

    def config(self) -> dict[str, Any]:
        return {"kind": "pixels"}

    def tensors(self) -> dict[str, Tensor]:
        return {}


class AutoencoderCodec:
    """A diffusers `AutoencoderKL`; latents are posterior means times its scaling factor.

    Grey images are repeated to the channels of the autoencoder and averaged back in `decode`.
    """

    bounded = False

    def __init__(self, vae: torch.nn.Module, *, batch_size: int = 32) -> None:
        self.vae: Any = vae.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.grey = False
        settings = cast(Any, vae).config  # of diffusers; a Module has none
        self.scale = float(settings.scaling_factor)
        self.shift = float(getattr(settings, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        _check_images(images)
        self.grey = images.shape[1] == 1
        pixels = images.expand(-1, self.vae.config.in_channels, -1, -1)
        return torch.cat([self._encode(part) for part in pixels.split(self.batch_size)])

    def _encode(self, images: Tensor) -> Tensor:
        weight = next(self.vae.parameters())
        pixels = (images.float() / 127.5 - 1).to(weight)
        mean = self.vae.encode(pixels).latent_dist.mode()
        return ((mean - self.shift) * self.scale).float().to(images.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        _check_latents(latents)
        return torch.cat([self._decode(part) for part in latents.split(self.batch_size)])

    def _decode(self, latents: Tensor) -> Tensor:
        return PixelCodec().decode(self._images(latents)).to(latents.device)

    def pixels(self, latents: Tensor) -> Tensor:
        return PixelCodec().pixels(self._images(latents)).to(latents.device)

    def _images(self, latents: Tensor) -> Tensor:
        """Images in about [-1, 1]."""
        weight = next(self.vae.parameters())
        images = self.vae.decode((latents / self.scale + self.shift).to(weight)).sample
        return images.mean(1, keepdim=True) if self.grey else images

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        _, height, width = image_shape
        if height % factor or width % factor:
            raise ValueError(f"images of {height}x{width} do not divide by the codec's {factor}")
        return self.vae.config.latent_channels, height // factor, width // factor

    def to(self, device: str | torch.device) -> None:
        """Moves the autoencoder; images and latents come back to where they were."""
        self.vae.to(device)

    def config(self) -> dict[str, Any]:
        settings = {k: v for k, v in self.vae.config.items() if not k.startswith("_")}
        return {"kind": "autoencoder_kl", "grey": self.grey, "vae": settings}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.vae.state_dict())


def codec_from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codec:
    """Rebuilds a codec from what `config()` and `tensors()` gave."""
    if config["kind"] == "pixels":
        return PixelCodec()
    if config["kind"] != "autoencoder_kl":
        raise ValueError(f"unknown codec {config['kind']!r}; accepted: pixels, autoencoder_kl")
    vae = import_diffusers().AutoencoderKL(**config["vae"])
    vae.load_state_dict({k: v.float() for k, v in tensors.items()})
    codec = AutoencoderCodec(vae)
    codec.grey = bool(config["grey"])
    return codec


def codec_digest(codec: Codec) -> str:
    """SHA-256 over what the latents of a codec depend on."""
    settings = {k: v for k, v in codec.config().items() if k != "grey"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(codec.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def import_diffusers() -> ModuleType:
    """diffusers, imported when first needed: it takes seconds."""
    _torchvision.repair()
    import diffusers

    return diffusers


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )


def _check_latents(latents: Tensor) -> None:
    if latents.ndim != 4 or not latents.is_floating_point():
        raise ValueError(
            f"latents must be floating (N, C, H, W), got {latents.dtype} {tuple(latents.shape)}"
        )
    if not torch.isfinite(latents).all():
        raise ValueError("latents contain NaN or infinity")
