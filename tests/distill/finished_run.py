"""A small finished run, made once for the tests of what comes after it."""

import torch

from otdd.distill import relabel
from otdd.distill.data import load_data
from otdd.distill.pipeline import Run
from otdd.distill.settings import resolve

DATA = load_data("digits")


def settings(out, **changes):
    given = {
        "data": "digits",
        "ipc": 2,
        "out": str(out),
        "seeds": 1,
        "sets": ["random", "kmeans"],
        "relabel": {"teacher_epochs": 1},
        "train": {"epochs": 3, "batch": 8, "losses": ["ce", "kl"]},
    }
    return resolve({**given, **changes})


def finished_run(out, shard_bytes=1, **changes):
    """Every epoch of labels in a shard of its own; returns the config."""
    config = settings(out, **changes)
    limit, relabel.SHARD_BYTES = relabel.SHARD_BYTES, shard_bytes
    try:
        run = Run.open(config)
        with run.store:
            for stage in ("sample", "relabel", "train", "evaluate"):
                getattr(run, stage)()
    finally:
        relabel.SHARD_BYTES = limit
    return config


def seen_in_training(store, config, name):
    """Pixels, logits, mixed and base labels of every step of a student of otdd."""
    tensors = store.read_images(name)
    size = tuple(tensors["images"].shape[-2:])
    for step in relabel.stored_steps(store, DATA, config, name):
        yield (
            step.batch.apply(tensors["images"]),
            step.teacher,
            step.batch.targets(tensors["labels"], 10, size),
            tensors["labels"][step.batch.index],
        )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
