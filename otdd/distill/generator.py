"""A class-conditional diffusion model with all that sampling needs, kept in one file.

A `Generator` is a diffusers `DiTTransformer2DModel`, the configuration of its noise schedule, a
codec and the names of its classes. `otdd.distill.fit.fit` trains small ones, whose patches overlap.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otdd.distill.codec import AutoencoderCodec, Codec, codec_from_config, import_diffusers
from otdd.distill.denoiser import Denoiser
from otdd.distill.denoising import PREDICTIONS
from otdd.distill.store import Store, StoreError

if TYPE_CHECKING:
    from otdd.distill.data import ImageData
    from otdd.distill.stream import Stream

FORMAT = 1
UNNAMED = (
    "; it was saved without names (diffusers loses them): put a list of them, in the order of the "
    "labels, as classes.json into its folder"
)
WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers calls them
SHIPPED = {"digits": "digits.safetensors"}
SCHEDULERS = ("ddim", "ddpm", "dpm++")


class GeneratorError(ValueError):
    """A generator that cannot be loaded, or that does not fit the data."""


@dataclass
class Generator:
    """Denoiser, noise schedule, codec and class names.

    Attributes:
        transformer: maps (x (B, c, h, w), timestep (B,), class_labels (B,)) to its prediction.
        scheduler_config: configuration of a diffusers scheduler.
        codec: images <-> latents.
        classes: names, in the order of the class embeddings.
        image_shape: (C, H, W) of decoded images.
        info: how it was trained (JSON).
    """

    transformer: torch.nn.Module
    scheduler_config: dict[str, Any]
    codec: Codec
    classes: list[str]
    image_shape: tuple[int, int, int]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self._config.num_embeds_ada_norm
        if len(self.classes) != known:
            raise GeneratorError(f"{len(self.classes)} class names for {known} class embeddings")
        if len(set(self.classes)) != len(self.classes):
            raise GeneratorError("class names of a generator must differ")
        if self.prediction_type not in PREDICTIONS:
            accepted = ", ".join(PREDICTIONS)
            raise GeneratorError(f"prediction_type {self.prediction_type!r}; accepted: {accepted}")

    @property
    def null_class(self) -> int:
        """Label of the unconditional embedding: the one after the last class."""
        return len(self.classes)

    @property
    def _config(self) -> Any:
        """What diffusers keeps of how the transformer was made."""
        return self.transformer.config

    @property
    def denoiser(self) -> Denoiser:
        """The transformer with its class embeddings."""
        return Denoiser(self.transformer)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Generator:
        """Moves transformer and codec, the former to `dtype` as well; returns itself."""
        # The `to` of diffusers warns of modules to keep in float32 where a DiT has none.
        torch.nn.Module.to(self.transformer, device, dtype)
        self.codec.to(device)
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""
        config = self._config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def prediction_type(self) -> str:
        """What the transformer predicts: epsilon, v_prediction or sample."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def learned_sigma(self) -> bool:
        """Whether the upper half of the output channels holds variances."""
        config = self._config
        return bool((config.out_channels or config.in_channels) == 2 * config.in_channels)

    def predict(
        self, x: Tensor, t: Tensor | int, labels: Tensor, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """`Denoiser.predict` of the transformer: prediction and learned variances, or None."""
        return self.denoiser.predict(x, t, labels, guidance_scale)

    def class_indices(self, names: Sequence[str]) -> list[int]:
        """Labels of the named classes.

        Raises:
            GeneratorError: naming every class that the generator was not trained on.
        """
        index = {name: k for k, name in enumerate(self.classes)}
        missing = [name for name in names if name not in index]
        if missing:
            raise GeneratorError(
                f"classes missing from the generator: {', '.join(map(repr, missing))}; "
                f"it knows {', '.join(self.classes[:20])}{', ...' * (len(self.classes) > 20)}"
                + UNNAMED
                * bool(self.info.get("unnamed"))
            )
        return [index[name] for name in names]

    def scheduler(self, name: str, steps: int) -> Any:
        """A diffusers scheduler (ddim, ddpm or dpm++) set to `steps` timesteps.

        The sampling loop clamps x0_hat itself, before it is guided, so no scheduler clips.
        """
        if name not in SCHEDULERS:
            raise ValueError(f"scheduler {name!r}; accepted: {', '.join(SCHEDULERS)}")
        diffusers = import_diffusers()
        total = self.scheduler_config["num_train_timesteps"]
        if not 1 <= steps <= total:
            raise ValueError(f"steps must lie in 1..{total}, got {steps}")
        config = dict(self.scheduler_config, clip_sample=False, thresholding=False)
        config.update(prediction_type=self.prediction_type, timestep_spacing="trailing")
        if name == "ddpm":
            variance = "learned_range" if self.learned_sigma else "fixed_small"
            made = diffusers.DDPMScheduler.from_config(config, variance_type=variance)
        elif name == "ddim":
            made = diffusers.DDIMScheduler.from_config(config, set_alpha_to_one=True)
        else:
            made = diffusers.DPMSolverMultistepScheduler.from_config(
                config, algorithm_type="dpmsolver++", solver_order=2, variance_type=None
            )
        made.set_timesteps(steps)
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, weights in float16; the file appears when complete."""
        tensors = {f"transformer.{k}": v for k, v in self.transformer.state_dict().items()}
        tensors |= {f"codec.{k}": v for k, v in self.codec.tensors().items()}
        half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        config = {k: v for k, v in self._config.items() if not k.startswith("_")}
        meta = {
            "format": FORMAT,
            "transformer": config,
            "scheduler": self.scheduler_config,
            "codec": self.codec.config(),
            "classes": list(self.classes),
            "image_shape": list(self.image_shape),
            "info": self.info,
        }
        target = Path(path)
        Store(target.parent).write_sealed(target.name, half, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Generator:
        """Reads a file written by `save`, or the folder of a diffusers `DiTPipeline`.

        The names of its classes are those of `classes.json` in the folder, or of `id2label` in
        `model_index.json`; without either they are the numbers 0, 1, ...
        """
        source = Path(path)
        if source.is_dir():
            return cls._load_folder(source)
        store = Store(source.parent)
        try:
            tensors, meta = store.read_sealed(source.name)
        except StoreError as error:
            raise GeneratorError(f"generator {path} cannot be loaded: {error}") from error
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise GeneratorError(f"{path} is no generator written by this version of otdd")
        with _readable(path):
            transformer = build_transformer(meta["transformer"])
            transformer.load_state_dict(_part(tensors, "transformer."))
            return cls(
                transformer=transformer.eval().requires_grad_(False),
                scheduler_config=dict(meta["scheduler"]),
                codec=codec_from_config(meta["codec"], _part(tensors, "codec.")),
                classes=list(meta["classes"]),
                image_shape=tuple(meta["image_shape"]),
                info=dict(meta["info"]),
            )

    @classmethod
    def _load_folder(cls, folder: Path) -> Generator:
        wanted = ("model_index.json", "scheduler/scheduler_config.json", "transformer", "vae")
        missing = [name for name in wanted if not (folder / name).exists()]
        if missing:
            raise GeneratorError(f"{folder} is no DiT pipeline: {', '.join(missing)} missing")
        for part in ("transformer", "vae"):  # .bin files of weights are pickles
            if not any(
                (folder / part / name).exists() for name in (WEIGHTS, f"{WEIGHTS}.index.json")
            ):
                raise GeneratorError(
                    f"{folder / part} has no {WEIGHTS}; it is in what diffusers saves anew: "
                    f"DiTPipeline.from_pretrained({str(folder)!r}).save_pretrained(FOLDER), with "
                    "variant='fp16' or the like in from_pretrained where the files have it"
                )
        diffusers = import_diffusers()
        with _readable(folder):
            transformer, vae = (
                kind.from_pretrained(folder / part, use_safetensors=True)
                for kind, part in (
                    (diffusers.DiTTransformer2DModel, "transformer"),
                    (diffusers.AutoencoderKL, "vae"),
                )
            )
            scheduler = dict(json.loads((folder / wanted[1]).read_text(encoding="utf-8")))
            _require_betas(scheduler)
        classes = _folder_classes(folder, transformer.config.num_embeds_ada_norm)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        side = transformer.config.sample_size * factor
        return cls(
            transformer=transformer.eval().requires_grad_(False),
            scheduler_config=scheduler,
            codec=AutoencoderCodec(vae),
            classes=classes or [str(k) for k in range(transformer.config.num_embeds_ada_norm)],
            image_shape=(vae.config.out_channels, side, side),
            info={} if classes else {"unnamed": True},
        )


@contextlib.contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a damaged or foreign model raises in the libraries that build it, in one line."""
    try:
        yield
    except GeneratorError as error:
        raise GeneratorError(f"generator {path} cannot be loaded: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GeneratorError(
            f"generator {path} cannot be loaded ({type(error).__name__}: {reason})"
        ) from error


def _require_betas(scheduler: dict[str, Any]) -> None:
    """Raises for noise that no betas describe, as in flow matching: DDIM would sample noise."""
    if "beta_schedule" not in scheduler or scheduler.get("use_flow_sigmas"):
        raise GeneratorError(
            f"its scheduler is {scheduler.get('_class_name')}, whose noise is no schedule of "
            "betas; accepted: models that were trained as DDPM is"
        )


def _folder_classes(folder: Path, count: int) -> list[str]:
    """Class names of a pipeline folder, or none."""
    try:
        if (folder / "classes.json").exists():
            names = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
            if len(names) != count or not all(isinstance(name, str) for name in names):
                raise ValueError(f"expected a list of {count} names")
            return list(names)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        known = {int(k): v for k, v in (index.get("id2label") or {}).items()}
    except (ValueError, TypeError) as error:
        raise GeneratorError(f"class names in {folder} cannot be read: {error}") from None
    return [known.get(k, str(k)) for k in range(count)] if known else []


def build_transformer(config: dict[str, Any]) -> torch.nn.Module:
    """A `DiTTransformer2DModel`, or with `lapped` a `LappedDiT`, from its configuration."""
    from otdd.distill.lapped import LappedDiT

    settings = dict(config)
    if settings.pop("lapped", False):
        return LappedDiT(**settings)
    return import_diffusers().DiTTransformer2DModel(**settings)


def load_generator(spec: str | os.PathLike[str] | None, data: ImageData | Stream) -> Generator:
    """The generator for a data set, checked against it.

    Args:
        spec: file or folder of a generator; None takes the one shipped for the data.
        data: what will be distilled.

    Raises:
        GeneratorError: none is shipped, it cannot be read, or classes or shapes do not fit.
    """
    if spec is not None:
        generator = Generator.load(spec)
    elif data.name in SHIPPED:
        with resources.as_file(
            resources.files(__package__) / "assets" / SHIPPED[data.name]
        ) as file:
            generator = Generator.load(file)
    else:
        raise GeneratorError(
            f"no generator is shipped for data {data.name!r}: train one with "
            "`otdd fit --data DATA --out GEN` and give it as --generator GEN"
        )
    generator.class_indices(data.classes)
    grey = False
    if data.image_shape[0] == 1 and isinstance(generator.codec, AutoencoderCodec):
        grey = True
        generator.codec.grey = True
    shape = generator.image_shape
    if tuple(shape[1:]) != data.image_shape[1:] or (shape[0] != data.image_shape[0] and not grey):
        raise GeneratorError(
            f"the generator makes images of {tuple(shape)}, the data has {data.image_shape}"
            " (channels, height, width)"
        )
    return generator


def generator_digest(generator: Generator) -> str:
    """SHA-256 over what the samples of a generator depend on."""
    digest = hashlib.sha256()
    about = [generator.scheduler_config, generator.codec.config(), list(generator.classes)]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    tensors = {**generator.transformer.state_dict(), **generator.codec.tensors()}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        k.removeprefix(prefix): v.float() if v.is_floating_point() else v
        for k, v in tensors.items()
        if k.startswith(prefix)
    }
