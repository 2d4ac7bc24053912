"""Latents of a data set as `otdd encode` wrote them, read row by row from mapped files.

A shard is checked against its hash when it is first touched. `Latents.check` compares the pixels
that were encoded with the images of a run, and the codec with that of its generator.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, cast

import torch
from torch import Tensor

from otdd.distill.codec import Codec, codec_digest
from otdd.distill.config import ConfigError
from otdd.distill.data import Facts, ImageData, LabeledImages, check_ipc
from otdd.distill.inputs.listing import pixel_digest
from otdd.distill.store import Store, StoreError
from otdd.distill.stream import Known, StreamedImages, open_stream

INDEX = "latents.json"
LABELS = "labels.safetensors"
STATISTICS = "statistics"


class Latents:
    """Real latents by index of the training image.

    Args:
        folder: made by `otdd encode`.

    Raises:
        ConfigError: the folder holds no finished latents.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.store = Store(folder)
        if not self.store.has(INDEX):
            raise ConfigError(f"latents: {folder} holds no finished latents; run `otdd encode`")
        small = sorted(path.name for path in (self.store.path / STATISTICS).glob("*.safetensors"))
        self.store.sums.verify([INDEX, LABELS, *(f"{STATISTICS}/{name}" for name in small)])
        self.index: dict[str, Any] = self.store.read_json(INDEX)
        self.labels = self.store.read_tensors(LABELS)["labels"]
        self._checked: set[int] = set()

    @property
    def digest(self) -> str:
        """What results depend on: SHA-256 of the index, with the hashes of all shards."""
        return hashlib.sha256((self.store.path / INDEX).read_bytes()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w)."""
        return tuple(self.index["latent_shape"])

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: Tensor) -> Tensor:
        """Latents of some images, float32 (n, c, h, w); only the shards touched are read."""
        for number in (indices // self.index["shard"]).unique().tolist():
            if number not in self._checked:
                self._verify(number)
                self._checked.add(number)
        return read_rows(self.store, indices, self.index["shard"])

    def statistics(self, label: int) -> dict[str, Tensor]:
        """`mean` and `std` (c, h, w) of a class, and its k-means `modes` (M, c, h, w) if kept."""
        return self.store.read_tensors(statistics_name(label))

    def modes(self, label: int, count: int, seed: int) -> Tensor | None:
        """The k-means centres kept of a class, if they are so many and of this seed."""
        if (self.index["support"], self.index["seed"]) != (count, seed):
            return None
        return self.statistics(label)["modes"]

    def check(self, data: ImageData, codec: Codec) -> None:
        """Raises `ConfigError` unless these are the latents of this data by this codec.

        Images are compared by their pixels; those that `data` made known by their files already.
        """
        where = f"latents: {self.store.path}"
        if self.index["codec_sha256"] != codec_digest(codec):
            raise ConfigError(f"{where} was encoded by another codec than the generator's")
        if isinstance(data.train.images, StreamedImages):
            return
        same = self.index["classes"] == list(data.classes)
        if not same or tuple(self.index["image_shape"]) != data.image_shape:
            raise ConfigError(
                f"{where} holds {len(self.index['classes'])} classes of images of "
                f"{tuple(self.index['image_shape'])}; the data has {data.num_classes}, "
                f"{data.image_shape}, or other names"
            )
        if not torch.equal(self.labels, data.train.labels):
            raise ConfigError(
                f"{where} was encoded from {len(self)} training images, not these {len(data.train)}"
            )
        for shard in self._shards:
            first, stop = shard["first"], shard["first"] + shard["count"]
            if pixel_digest(data.train.images[first:stop]) != shard["pixels_sha256"]:
                raise ConfigError(
                    f"{where} was encoded from other images (among {first} to {stop - 1})"
                )

    def data(
        self,
        spec: str | os.PathLike[str],
        *,
        resolution: int | None,
        seed: int,
        ipc: int,
        skip_bad_images: bool = False,
    ) -> ImageData:
        """The data that was encoded, as `load_data` gives it, with images left in their files.

        Every file is compared by name and size with what was encoded, and none is opened; rows of
        a Hugging Face data set are compared by their bytes.

        Raises:
            ConfigError: it is another folder, or has changed.
            DataError: it cannot be used.
        """
        where, facts = f"latents: {self.store.path}", self.index["data"]
        if facts is None or resolution != self.index["resolution"]:
            there = "a built-in data set" if facts is None else self.index["resolution"]
            raise ConfigError(f"{where} was encoded at resolution {there}, not {resolution}")
        skipped = tuple((key, why) for key, why in self.index.get("skipped", ()))
        if skipped and not skip_bad_images:
            raise ConfigError(
                f"{where} was encoded without {len(skipped)} images that cannot be read: "
                "give --skip-bad-images here too"
            )
        shape = tuple(self.index["image_shape"])
        stream = open_stream(spec, resolution=resolution, seed=seed, known=Known(shape, skipped))
        if stream.classes != self.index["classes"] or not torch.equal(stream.labels, self.labels):
            raise ConfigError(f"{where} was encoded from other classes or numbers of images")
        spans = [(s["first"], s["first"] + s["count"], s["files_sha256"]) for s in self._shards]
        for first, stop, files in spans:
            if stream.digest(first, stop) != files:
                raise ConfigError(
                    f"{where} was encoded from other images (among {first} to {stop - 1})"
                )
        assert stream.test is not None  # an encoded folder has both parts
        if stream.test.digest(0, len(stream.test)) != facts["test_files_sha256"]:
            raise ConfigError(f"{where} was encoded beside other test images")
        train, test = (
            LabeledImages(cast(Tensor, StreamedImages(part)), part.labels)
            for part in (stream, stream.test)
        )
        known = Facts(tuple(facts["mean"]), tuple(facts["std"]), facts["fingerprint"])
        made = ImageData(facts["name"], stream.classes, train, test, known, stream.skipped)
        check_ipc(made, ipc)
        return made

    @property
    def _shards(self) -> list[dict[str, Any]]:
        return list(self.index["shards"])

    def _verify(self, number: int) -> None:
        name = shard_name(number)
        content = self.store.read_tensors(name)["latents"].numpy().tobytes()
        if hashlib.sha256(content).hexdigest() != self._shards[number]["latents_sha256"]:
            raise StoreError(
                f"{self.store.path / name} is not what was written; delete it and run "
                "`otdd encode` again"
            )


def read_rows(store: Store, indices: Tensor, shard: int) -> Tensor:
    """Rows of the shards in a folder, float32 (n, ...), in the order of the indices."""
    from safetensors import SafetensorError, safe_open

    if len(indices) == 0:
        raise ValueError("indices: none are given; expected at least one")
    numbers, out = indices // shard, None
    for number in numbers.unique().tolist():
        chosen = (numbers == number).nonzero()[:, 0]
        local = indices[chosen] - number * shard
        low, high = int(local.min()), int(local.max()) + 1
        path = store.path / shard_name(number)
        try:
            with safe_open(path, framework="pt") as file:
                part = file.get_slice("latents")[low:high][local - low].float()
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be read ({error})") from None
        out = part.new_empty((len(indices), *part.shape[1:])) if out is None else out
        out[chosen] = part
    assert out is not None
    return out


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"latents-{number:05d}.safetensors"


def statistics_name(label: int) -> str:
    """File of the statistics of a class."""
    return f"{STATISTICS}/{label:05d}.safetensors"
