"""`otdd encode`: the latents of a whole data set, once, with statistics of every class.

Images are read, encoded and written shard by shard, so memory depends on the size of a shard alone.
A finished shard is kept when the command is started again, if the files behind it are the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from otdd.distill.codec import Codec, codec_digest
from otdd.distill.data import gather_facts
from otdd.distill.encode_config import EncodeConfig
from otdd.distill.latents import INDEX, LABELS, Latents, read_rows, shard_name, statistics_name
from otdd.distill.modes import kmeans_centres
from otdd.distill.store import Store, StoreError
from otdd.distill.stream import Stream
from otdd.distill.terms import rng

__all__ = ["EncodeConfig", "encode"]

Progress = Callable[[str, int, int], None]

FACTS = "facts.json"
KMEANS_LIMIT = 5000  # latents of a class that k-means sees


def encode(
    data: Stream,
    codec: Codec,
    config: EncodeConfig | None = None,
    out: str | os.PathLike[str] = "latents",
    *,
    progress: Progress | None = None,
) -> Latents:
    """Writes the latents of all training images in half precision; continues where it stopped.

    Args:
        data: images, one range at a time.
        codec: its latents.
        config: shards and statistics.
        out: folder of the shards.
        progress: called as progress("encode", images, of how many), then for the statistics.
    """
    config, progress = config or EncodeConfig(), progress or (lambda *_: None)
    latent_shape = codec.latent_shape(data.image_shape)
    about = identity(data, codec, config)
    with Store.open(out, about, lock=True) as store:
        shards = _shards(store, data, codec, config, progress)
        store.write_tensors(LABELS, {"labels": data.labels})
        progress("statistics", 0, len(data.classes))
        for label in range(len(data.classes)):
            _statistics(store, data, shards, config, label)
            progress("statistics", label + 1, len(data.classes))
        index = {
            **{k: about[k] for k in ("classes", "image_shape", "codec_sha256")},
            **{k: asdict(config)[k] for k in ("shard", "support", "seed")},
            "resolution": data.resolution,
            "latent_shape": list(latent_shape),
            "data": _facts(store, data, config, progress),
            "shards": shards,
        }
        if data.skipped:
            index["skipped"] = [list(pair) for pair in data.skipped]
        store.write_json(INDEX, index)
    return Latents(out)


def identity(data: Stream, codec: Codec, config: EncodeConfig) -> dict[str, Any]:
    """What the content of a folder depends on."""
    return {
        "latents": asdict(config),
        "classes": data.classes,
        "labels_sha256": hashlib.sha256(data.labels.numpy().tobytes()).hexdigest(),
        "image_shape": list(data.image_shape),
        "codec_sha256": codec_digest(codec),
    }


def _shards(
    store: Store, data: Stream, codec: Codec, config: EncodeConfig, progress: Progress
) -> list[dict[str, Any]]:
    """All shards, those that are there left alone; returns what their headers say."""
    spans = [(k, min(k + config.shard, len(data))) for k in range(0, len(data), config.shard)]
    kept = {span: meta for span in spans if (meta := _kept(store, data, config, span))}
    if len(kept) < len(spans):  # what follows from all images is made anew
        for name in (INDEX, FACTS, "statistics"):
            store.remove(name)
    done = sum(stop - first for first, stop in kept)
    progress("encode", done, len(data))
    for span in spans:
        if span not in kept:
            for part in _encoded(store, data, codec, config, span):
                progress("encode", done + part, len(data))
            done += span[1] - span[0]
            kept[span] = store.read_meta(shard_name(span[0] // config.shard))
    return [kept[span] for span in spans]


def _kept(
    store: Store, data: Stream, config: EncodeConfig, span: tuple[int, int]
) -> dict[str, Any] | None:
    """Header of a finished shard, if it was made from the same files."""
    name = shard_name(span[0] // config.shard)
    meta = store.read_meta(name) if store.has(name) else None
    return meta if meta and meta["files_sha256"] == data.digest(*span) else None


def _encoded(
    store: Store, data: Stream, codec: Codec, config: EncodeConfig, span: tuple[int, int]
) -> Iterator[int]:
    """Makes one shard; says after every batch how many of its images are done."""
    first, stop = span
    files, pixels, parts = data.digest(first, stop), hashlib.sha256(), []
    for images in _ahead(data, first, stop, config.batch):
        pixels.update(images.contiguous().numpy().data.cast("B"))
        parts.append(codec.encode(images).half())
        yield sum(map(len, parts))
    latents = torch.cat(parts)
    if not torch.isfinite(latents).all():
        raise StoreError(f"latents of images {first} to {stop - 1} leave the half-precision range")
    meta = {
        "first": first,
        "count": stop - first,
        "files_sha256": files,
        "pixels_sha256": pixels.hexdigest(),
        "latents_sha256": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
    }
    store.write_tensors(shard_name(first // config.shard), {"latents": latents}, meta)


def _ahead(data: Stream, first: int, stop: int, batch: int) -> Iterator[Tensor]:
    """Batches of images, the next one read while one is encoded."""
    starts = range(first, stop, batch)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(data.read, first, min(first + batch, stop))
        for start in starts:
            images = coming.result()
            following = start + batch
            if following < stop:
                coming = pool.submit(data.read, following, min(following + batch, stop))
            yield images


def _facts(
    store: Store, data: Stream, config: EncodeConfig, progress: Progress
) -> dict[str, Any] | None:
    """What `load_data` would find out of a folder, in a second pass over its images.

    With it a run samples without holding the images.
    """
    if data.test is None:
        return None
    files = data.test.digest(0, len(data.test))
    if store.has(FACTS) and store.read_json(FACTS)["test_files_sha256"] == files:
        return dict(store.read_json(FACTS))
    done, total = 0, len(data) + len(data.test)

    def counted(part: Stream) -> Iterator[Tensor]:
        nonlocal done
        for images in part.batches(config.batch):
            yield images
            done += len(images)
            progress("check", done, total)

    progress("check", 0, total)
    parts = ((part.labels, counted(part)) for part in (data, data.test))
    facts = gather_facts(data.classes, data.image_shape, parts)
    made = {"name": data.name, "test_files_sha256": files, **asdict(facts)}
    store.write_json(FACTS, made)
    return made


def _statistics(
    store: Store, data: Stream, shards: list[dict[str, Any]], config: EncodeConfig, label: int
) -> None:
    """Mean, deviation and k-means centres of one class, made unless they are there."""
    name = statistics_name(label)
    if store.has(name):
        return
    own = (data.labels == label).nonzero()[:, 0]
    total = square = torch.zeros((), dtype=torch.float64)
    for part in own.split(config.shard):
        rows = read_rows(store, part, config.shard).double()
        total, square = total + rows.sum(0), square + rows.square().sum(0)
    mean = total / len(own)
    spread = (square / len(own) - mean.square()).clamp_min(0).sqrt()
    tensors = {"mean": mean.float(), "std": spread.float()}
    if config.support:
        order = torch.randperm(len(own), generator=rng(config.seed, "support", label))
        seen = read_rows(store, own[order[:KMEANS_LIMIT].sort().values], config.shard)
        count = min(config.support, len(seen))
        tensors["modes"] = kmeans_centres(seen, count, config.seed)
    store.write_tensors(name, tensors, {"count": len(own)})
