"""The geometry report: the three terms of the source paper's bound, as far as they can be measured.

    W(mu_true, nu_new) <= E_y[ W(mu_true(x|y), nu_hard(x|y)) ] alpha(nu_soft) + W(nu_soft, nu_new)

The first factor is the transport from a set to the real images, class by class. What the labels do
to it, alpha, the paper does not give as a number; reported are the entropy of the soft labels and
how often a student agrees with its teachers. The last is the transport between the soft labels of
a set and what a trained student says of the same augmented images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from otdd.distill.augment import generator, unstack
from otdd.distill.codec import Codec
from otdd.distill.data import ImageData
from otdd.distill.labels import LabelFormat
from otdd.distill.store import Store
from otdd.distill.training import Step, device_of
from otdd.ops import cost_matrix, sinkhorn

REAL_LIMIT = 2000
MAX_ITER, TOL = 500, 1e-4  # of every transport here
OUTPUT_LIMIT = 1024  # rows of the transport between outputs and labels


def class_costs(
    images: Tensor, labels: Tensor, data: ImageData, codec: Codec, *, seed: int = 0
) -> dict[int, float]:
    """Transport cost from a set to the real training images of each class.

    Squared Euclidean cost between latents, uniform weights, eps at 1 % of the mean cost, so nearly
    the exact optimum. At most 2000 real images of a class are used.
    """
    costs = {}
    for label in sorted(set(labels.tolist())):
        x = codec.encode(images[labels == label]).flatten(1).double()
        costs[label] = _transport(x, real_latents(data, codec, label, seed=seed))
    return costs


def real_latents(data: ImageData, codec: Codec, label: int, *, seed: int = 0) -> Tensor:
    """Latents of the real training images of a class, at most 2000, float64 (M, D)."""
    real = data.train.images[data.train.labels == label]
    if len(real) > REAL_LIMIT:
        real = real[torch.randperm(len(real), generator=generator("real", seed, label))]
    return codec.encode(real[:REAL_LIMIT]).flatten(1).double()


def transport_problem(x: Tensor, y: Tensor, metric: str = "sqeuclidean") -> tuple[Tensor, float]:
    """Costs (N, M) between points (N, D) and (M, D), and the eps to solve with: 1 % of the mean."""
    C = cost_matrix(x, y, metric)
    return C, 0.01 * float(C.mean().clamp(min=1e-12))


def label_entropy(store: Store, shard: str, classes: int) -> float:
    """Mean entropy in nats of the soft labels (softmax of the logits) in a shard."""
    tensors, meta = store.read_tensors(shard), store.read_meta(shard)
    logits = LabelFormat.read(meta).decode(tensors, classes).double()
    log_p = logits.log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def label_accuracy(store: Store, shard: str, labels: Tensor, classes: int) -> float | None:
    """Percentage of the views in a shard that its teachers take for the class of the image.

    Args:
        store: of the set.
        shard: file of soft labels.
        labels: int64 (N,), classes of the images of the set.
        classes: how many there are.

    Returns:
        Of views of one image only; None where CutMix or Mixup mixed all of them.
    """
    tensors, meta = store.read_tensors(shard), store.read_meta(shard)
    logits = LabelFormat.read(meta).decode(tensors, classes)
    right = [
        given.argmax(-1) == labels[batch.index.long()]
        for batch, given in zip(unstack(tensors), logits, strict=True)
        if not batch.mixed
    ]
    return 100 * float(torch.cat(right).double().mean()) if right else None


@torch.no_grad()
def against_labels(
    student: nn.Module, images: Tensor, steps: Iterable[Step], tau: float
) -> dict[str, float]:
    """A trained student beside the soft labels of one epoch.

    Args:
        student: gives logits.
        images: of the set.
        steps: of the epoch, with the logits of the teachers.
        tau: temperature of the softmax before the transport.

    Returns:
        `agreement`: percentage of augmented images of one class for both; `transport`: mean L1
        cost, 0 to 2, between softened outputs and labels, of at most 1024 rows, eps at 1 % of the
        mean cost.
    """
    student.eval()
    device = device_of(student)

    def outputs_of(step: Step) -> Tensor:
        return student(step.batch.apply(images, device)).float().cpu()

    pairs = [(outputs_of(step), _labels(step)) for step in steps]
    outputs, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    agreement = float((outputs.argmax(1) == labels.argmax(1)).double().mean())
    mine, theirs = ((x[:OUTPUT_LIMIT].double() / tau).softmax(1) for x in (outputs, labels))
    return {"agreement": 100 * agreement, "transport": _transport(mine, theirs, "l1")}


def report(
    costs: dict[str, float], entropy: float | None, classes: int, students: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `metrics.json` has of a set under `geometry`."""
    # Of the rounded entropy, which is all that a later call has.
    entropy = None if entropy is None else round(entropy, 4)
    share = None if entropy is None else round(entropy / math.log(max(2, classes)), 4)
    return {
        "class_transport": costs,
        "label_entropy": entropy,
        "label_entropy_share": share,  # of log K
        "students": students,
    }


def summary(arch: str, loss: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the students of an architecture and a loss."""
    return {
        "arch": arch,
        "loss": loss,
        "students": len(found),
        "agreement": round(statistics.fmean(f["agreement"] for f in found), 2),
        "output_transport": round(statistics.fmean(f["transport"] for f in found), 4),
    }


def _labels(step: Step) -> Tensor:
    if step.teacher is None:
        raise ValueError("steps without soft labels have nothing to be compared with")
    return step.teacher


def _transport(x: Tensor, y: Tensor, metric: str = "sqeuclidean") -> float:
    """Cost of transport between two clouds of equal weights."""
    C, eps = transport_problem(x, y, metric)
    return float(sinkhorn(C, eps=eps, max_iter=MAX_ITER, tol=TOL).cost)
