"""A small finished run, made once for the tests of what comes after it."""

import torch

from otdd.distill import relabel
from otdd.distill.data import ImageData, LabeledImages, load_data
from otdd.distill.pipeline import STAGES, Run
from otdd.distill.setfiles import describe
from otdd.distill.settings import resolve, to_dict
from otdd.distill.store import Store

DATA = load_data("digits")
LABELLED = ("sample", "relabel")


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


def finished_run(out, shard_bytes=1, stages=STAGES, **changes):
    """Every epoch of labels in a shard of its own; returns the config."""
    config = settings(out, **changes)
    limit, relabel.SHARD_BYTES = relabel.SHARD_BYTES, shard_bytes
    try:
        run = Run.open(config)
        with run.store:
            for stage in stages:
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


def written_set(out, classes, *, ipc=2, channels=3, name="otg"):
    """The folder of a run that ended after sampling, of random images; returns them."""
    count = len(classes) * ipc
    images = torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8)
    labels = torch.arange(len(classes)).repeat_interleave(ipc)
    part = LabeledImages(images, labels)
    with Store.open(out, {"data": "toy", "relabel.teachers": ["convnet=/home/me/t.pt"]}) as store:
        store.write_images(name, images, labels)
        store.write_json("data.json", describe(ImageData("toy", list(classes), part, part)))
        config = to_dict(settings("x", data="/home/me/toy", generator="/home/me/g.safetensors"))
        store.write_json("config.json", config)
    return images
