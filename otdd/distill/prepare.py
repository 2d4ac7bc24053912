"""What a run works on, loaded and checked before any work, with what its results depend on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otdd.distill.config import ConfigError, RunConfig, require
from otdd.distill.logs import check_tensorboard
from otdd.distill.settings import identity, to_dict
from otdd.distill.store import Store
from otdd.distill.workers import local_device

if TYPE_CHECKING:
    from otdd.distill.codec import Codec
    from otdd.distill.data import ImageData
    from otdd.distill.generator import Generator
    from otdd.distill.latents import Latents

SAMPLED = ("otg", "unguided")


@dataclass(frozen=True)
class Prepared:
    """Inputs of a run; `known` is the identity that its folder must have."""

    data: ImageData
    generator: Generator | None
    latents: Latents | None
    known: dict[str, Any]


def prepare(config: RunConfig, *, only_sample: bool = False) -> Prepared:
    """Loads data, generator and latents; checks them, the networks and the output folder.

    Args:
        config: settings of the run.
        only_sample: nothing but sampling follows, which leaves the images of an encoded folder
            where they are.

    Raises:
        ConfigError, DataError, GeneratorError, StoreError: what is wrong, in one message.
    """
    check_tensorboard(config.train.tensorboard)
    known = {k: v for k, v in identity(config).items() if k != "data"}
    Store(config.out).check(known)
    outside(config.out, config.data)
    _check_backend(config)
    data = _load_data(config, only_sample)
    known |= {"data": data.name, "data_sha256": data.fingerprint}
    Store(config.out).check(known)
    _check_networks(config, data)
    known |= _checkpoints(config)
    generator = latents = None
    if _has_generator(config):
        generator = _load_generator(config, data)
        _check_schedule(config, generator)
        from otdd.distill.generator import generator_digest

        known["generator_sha256"] = generator_digest(generator)
        known |= _check_terms(config, data)
        if "otg" in config.sets:  # other sets do not depend on them
            latents = _load_latents(config, data, generator)
            known["latents_sha256"] = latents.digest if latents is not None else None
    return Prepared(data, generator, latents, known)


def _check_backend(config: RunConfig) -> None:
    """Raises for an OTDD_BACKEND that the ops of a run cannot use where they run.

    Costs are taken on the CPU, guidance and losses on the devices of their stages.
    """
    if not os.environ.get("OTDD_BACKEND"):
        return
    import torch

    from otdd.backends import BackendError
    from otdd.ops import cost_matrix, sinkhorn

    sampling = local_device(config.sample.device)
    for device in ("cpu", sampling, local_device(config.train.device, "train.device")):
        x = torch.zeros(1, 2, 2, device=device)
        try:
            sinkhorn(cost_matrix(x, x, "sqeuclidean"), eps=1.0, max_iter=1)
        except (BackendError, ValueError) as error:
            raise ConfigError(f"{error}; unset OTDD_BACKEND to have the ops choose") from None


def found_again(config: RunConfig) -> dict[str, Any]:
    """Settings for config.json, but `out`, with inputs that are found from any folder."""
    from otdd.distill.inputs.spec import absolute

    made = {k: v for k, v in to_dict(config).items() if k != "out"}
    made["data"] = absolute(config.data)
    groups = (made, "generator"), (made, "latents"), (made["sample"]["influence"], "surrogate")
    for group, key in groups:
        if group[key] is not None:
            group[key] = str(Path(group[key]).resolve())
    return made


def outside(out: str | os.PathLike[str], spec: str | os.PathLike[str]) -> None:
    """Refuse an output that would be taken for a class of the data folder it comes from."""
    from otdd.distill.inputs.folder import in_parts

    root, target = Path(os.path.realpath(spec)), Path(os.path.realpath(out))
    if not root.is_dir():
        return
    parts = [root / name for name in ("train", "val", "test")] if in_parts(root) else [root]
    if any(target.is_relative_to(part) for part in parts):
        raise ConfigError(f"out: {out} lies among the classes of the data folder {spec}")


def real_images(config: RunConfig, fingerprint: str) -> tuple[ImageData, Codec]:
    """The real images of a finished run and the codec of its transport costs.

    Args:
        config: settings of the run.
        fingerprint: that the data had then.

    Raises:
        ConfigError, DataError, GeneratorError: data or generator are gone or others.
    """
    from otdd.distill.codec import PixelCodec

    data = _load_data(config, only_sample=False)
    if data.fingerprint != fingerprint:
        raise ConfigError(f"data: {config.data!r} has other images than when the run was made")
    return data, _load_generator(config, data).codec if _has_generator(config) else PixelCodec()


def _has_generator(config: RunConfig) -> bool:
    return config.generator is not None or any(name in SAMPLED for name in config.sets)


def _check_networks(config: RunConfig, data: ImageData) -> None:
    from otdd.distill.augment import augmentation
    from otdd.distill.labels import LabelFormat
    from otdd.distill.relabel import MEASURED, teacher_names
    from otdd.distill.students import check_network, check_pretrained, load_checkpoint

    LabelFormat.of(config.relabel, len(data.classes))
    augmentation(config.relabel, data.name, (data.image_shape[1], data.image_shape[2]))
    for arch in config.train.archs:
        check_network(arch, data)
    if MEASURED in config.relabel.teachers:
        few = int(data.train.labels.bincount(minlength=data.num_classes).min())
        accepted = f"fewer than the {few} training images of the smallest class, with {MEASURED}"
        require(config.ipc < few, "ipc", config.ipc, accepted)
    for teacher in teacher_names(config):
        arch, given, file = teacher.partition("=")
        if teacher.startswith("timm:"):
            name = teacher.removeprefix("timm:")
            _check_timm(name)
            check_pretrained(name, data)
            continue
        check_network(arch, data)
        if given and not Path(file).is_file():
            raise ConfigError(f"relabel.teachers: no file {file!r} for {arch}")
        if given:
            load_checkpoint(arch, file, data)


def _check_schedule(config: RunConfig, generator: Generator) -> None:
    from otdd.distill.denoising import noise_levels

    try:
        scheduler = generator.scheduler(config.sample.scheduler, config.sample.steps)
    except ValueError as error:
        raise ConfigError(f"sample.steps: {error}") from None
    try:
        noise_levels(scheduler)
    except ValueError as error:
        raise ConfigError(f"generator: {error}") from None


def _checkpoints(config: RunConfig) -> dict[str, list[str]]:
    """What soft labels depend on beside the names of their teachers: the files among these."""
    hashes = []
    for teacher in config.relabel.teachers:
        if name := teacher.partition("=")[2]:
            with open(name, "rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return {"relabel.teachers_sha256": hashes} if hashes else {}


def _check_terms(config: RunConfig, data: ImageData) -> dict[str, str]:
    """What the guided set depends on beside settings, data and generator."""
    influence = config.sample.influence
    if "otg" not in config.sets or influence.strength == 0:
        return {}
    from otdd.distill.students import check_network
    from otdd.distill.surrogate import load_surrogates, surrogate_digest
    from otdd.distill.surrogate_config import SurrogateConfig

    if influence.surrogate is None:
        check_network(SurrogateConfig.arch, data)
        return {"surrogate_sha256": "trained by the run"}
    load_surrogates(influence.surrogate, data)
    return {"surrogate_sha256": surrogate_digest(influence.surrogate)}


def _check_timm(name: str) -> None:
    from otdd import _torchvision

    _torchvision.repair()
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"relabel.teachers: timm has no model {name!r}")


def _load_generator(config: RunConfig, data: ImageData) -> Generator:
    from otdd import _torchvision

    _torchvision.repair()
    from otdd.distill.generator import load_generator

    return load_generator(config.generator, data)


def _load_data(config: RunConfig, only_sample: bool) -> ImageData:
    from otdd.distill.data import BUILTIN, load_data

    keys = ("resolution", "seed", "ipc", "skip_bad_images")
    wanted: dict[str, Any] = {key: getattr(config, key) for key in keys}
    if not only_sample or config.latents is None or config.data in BUILTIN:
        return load_data(config.data, **wanted)
    from otdd.distill.latents import Latents

    return Latents(config.latents).data(config.data, **wanted)


def _load_latents(config: RunConfig, data: ImageData, generator: Generator) -> Latents | None:
    if config.latents is None:
        return None
    from otdd.distill.latents import Latents

    latents = Latents(config.latents)
    latents.check(data, generator.codec)
    return latents
