"""Sets to compare a distilled set with.

`random`: real images drawn without replacement. `kmeans`: k-means centroids of the latents of each
class, decoded. `kmeans-real`: the distinct real images nearest to those centroids, the assignment
of least total squared distance. (`unguided` is `sample` with the guidance off.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from otdd.distill.codec import Codec, PixelCodec
from otdd.distill.config import RunConfig
from otdd.distill.data import ImageData, check_ipc
from otdd.distill.modes import kmeans_centres
from otdd.distill.store import Store
from otdd.distill.terms import rng
from otdd.ops import cost_matrix

BASELINES = ("random", "kmeans", "kmeans-real")


def baselines(
    store: Store,
    data: ImageData,
    config: RunConfig,
    set_name: str,
    *,
    codec: Codec | None = None,
) -> None:
    """Makes one baseline set in the store, unless it is there.

    Args:
        store: where `sets/<set_name>` is written.
        data: real images.
        config: `ipc` and `seed` are used.
        set_name: `random`, `kmeans` or `kmeans-real`.
        codec: latent space of k-means; pixels by default.
    """
    if set_name not in BASELINES:
        raise ValueError(f"set_name {set_name!r}; accepted: {', '.join(BASELINES)}")
    if store.has_images(set_name):
        return
    check_ipc(data, config.ipc)
    codec = codec or PixelCodec()
    parts, latents = [], []
    for label in range(data.num_classes):
        images = data.train.of_class(label)
        if set_name == "random":
            order = torch.randperm(len(images), generator=rng(config.seed, "random", label))
            parts.append(images[order[: config.ipc]])
            continue
        encoded = codec.encode(images)
        centres = kmeans_centres(encoded, config.ipc, config.seed)
        if set_name == "kmeans":
            latents.append(centres)
            parts.append(codec.decode(centres))
        else:
            parts.append(images[nearest_distinct(centres, encoded)])
    labels = torch.arange(data.num_classes).repeat_interleave(config.ipc)
    extra = {"latents": torch.cat(latents)} if latents else {}
    store.write_images(set_name, torch.cat(parts), labels, **extra)


def nearest_distinct(centres: Tensor, latents: Tensor) -> Tensor:
    """For each centre another row of `latents`, least total squared distance; (count,)."""
    from scipy.optimize import linear_sum_assignment

    C = cost_matrix(centres.flatten(1), latents.flatten(1), "sqeuclidean")
    return torch.from_numpy(linear_sum_assignment(C.double().numpy())[1])
