"""Which teachers label a set, and why: named, by a table, or measured.

The source paper takes few teachers at few images per class and more at many; how many is not known
to us, so both rules are ours. `auto` follows a table (`TEACHERS_BY_IPC`). `auto:measured` tries the
first 1, 2, 4 and 8 of the same teachers: short students learn from their labels on real training
images, as many per class as the run distils, and are tested on other real training images, which no
student has seen and the teachers have. Of counts that are within one standard error of the best the
smallest is taken. Test images are never looked at.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from otdd.distill import students
from otdd.distill.augment import generator
from otdd.distill.config import RunConfig
from otdd.distill.data import ImageData, LabeledImages
from otdd.distill.match import make_loss, reproducible, train_student
from otdd.distill.relabel import MEASURED, Plan, Progress, Teacher, live_steps
from otdd.distill.setfiles import TEACHERS
from otdd.distill.store import Store
from otdd.distill.training import Training, device_of

COUNTS = (1, 2, 4, 8)
SEEDS = 3
STEPS = 300  # of a short student, at most
HELD_OUT = 100  # images of a class, at most
_WEIGHTS = re.compile(r"teachers/[^/]+\.safetensors")


def choose(
    store: Store,
    data: ImageData,
    config: RunConfig,
    teachers: Sequence[Teacher],
    progress: Progress | None = None,
) -> list[Teacher]:
    """The teachers of a run among those that were made; `teachers.json` says which and why.

    A choice that is in the store already is kept.
    """
    if MEASURED not in config.relabel.teachers:
        chosen, about = list(teachers), _unmeasured(config, len(teachers))
    elif store.has(TEACHERS):
        about = store.read_json(TEACHERS)
        chosen = list(teachers[: len(about["teachers"])])
    else:
        found = measure(teachers, data, config, progress)
        count, why = smallest_good(found)
        chosen = list(teachers[:count])
        about = {"rule": "measured", "why": why, "candidates": found}
    facts = [{"name": t.name, "digest": t.digest, "accuracy": t.accuracy} for t in chosen]
    if not config.relabel.store_labels:  # whoever reads the folder needs the teachers themselves
        facts = [{**fact, "file": t.file} for fact, t in zip(facts, chosen, strict=True)]
    made = {**about, "teachers": facts}
    if not store.has(TEACHERS) or store.read_json(TEACHERS) != made:
        store.write_json(TEACHERS, made)
    return chosen


def kept(store: Store) -> list[dict[str, Any]]:
    """The teachers of a run as `teachers.json` has them, if all their weights are in the store.

    Empty before they are trained, and where labels are stored in their place.
    """
    found = store.read_json(TEACHERS) if store.has(TEACHERS) else {}
    teachers = found.get("teachers") if isinstance(found, dict) else None
    try:
        facts = [[t["name"], t["digest"], t["accuracy"] + 0.0, t["file"]] for t in teachers or ()]
        there = all(_WEIGHTS.fullmatch(file) and store.has(file) for *_, file in facts)
    except (KeyError, TypeError, OSError):  # of what otdd has not written
        return []
    return teachers or [] if there else []


def measure(
    teachers: Sequence[Teacher],
    data: ImageData,
    config: RunConfig,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Validation accuracies of short students of the first 1, 2, 4, 8 teachers.

    Returns:
        A dict of `count`, `runs` (accuracies in percent), `mean` and `standard_error` for each.
    """
    learnt, held = _split(data, config)
    arch = config.train.archs[0]
    loss = next((kind for kind in config.train.losses if not kind.startswith("ce")), "kl")
    per_epoch = Plan.of(config, data, len(learnt)).steps_per_epoch
    epochs = min(config.train.epochs, max(1, STEPS // per_epoch))
    train = dataclasses.replace(config.train, epochs=epochs)
    relabel = dataclasses.replace(config.relabel, label_epochs=None)
    short = dataclasses.replace(config, train=train, relabel=relabel)
    counts = [count for count in COUNTS if count <= len(teachers)]
    device = device_of(teachers[0].network)
    found: list[dict[str, Any]] = []
    for done, count in enumerate(counts):
        if progress is not None:
            progress("choose teachers", done, len(counts))
        runs = []
        with reproducible(data.image_shape):
            steps = list(live_steps(learnt.images, data, teachers[:count], short))
            for seed in range(SEEDS):
                network = students.make_network(arch, data, seed).to(device)
                size = (len(steps), per_epoch)
                training = Training(
                    network, make_loss(loss, train), train, *size, arch=arch, seed=seed
                )
                outcome = train_student(training, learnt.images, learnt.labels, steps, test=held)
                runs.append(round(outcome.accuracy, 2))
        error = statistics.stdev(runs) / math.sqrt(SEEDS)
        mean = round(statistics.fmean(runs), 2)
        found.append(
            {"count": count, "runs": runs, "mean": mean, "standard_error": round(error, 2)}
        )
    if progress is not None:
        progress("choose teachers", len(counts), len(counts))
    return found


def smallest_good(found: Sequence[dict[str, Any]]) -> tuple[int, str]:
    """The smallest count within one standard error of the best, and the reason in words."""
    best = max(found, key=lambda one: one["mean"])
    least = best["mean"] - best["standard_error"]
    taken = next(one for one in found if one["mean"] >= least)
    why = (
        f"{taken['count']} of {found[-1]['count']} teachers: validation accuracy {taken['mean']} % "
        f"of short students on held-out real training images; best is {best['mean']} ± "
        f"{best['standard_error']} % with {best['count']}"
    )
    return taken["count"], why


def _unmeasured(config: RunConfig, count: int) -> dict[str, Any]:
    if "auto" in config.relabel.teachers:
        why = f"{config.ipc} images per class: the table of otdd.distill.relabel, by inference"
        return {"rule": "table", "why": f"{why}, has {count - len(config.relabel.teachers) + 1}"}
    return {"rule": "named", "why": "relabel.teachers names them"}


def _split(data: ImageData, config: RunConfig) -> tuple[LabeledImages, LabeledImages]:
    """Real training images: some for short students to learn from, others to test them on."""
    learnt, held = [], []
    for label in range(data.num_classes):
        rows = (data.train.labels == label).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=generator("teachers", config.seed, label))
        learnt.append(rows[order[: config.ipc]])
        held.append(rows[order[config.ipc : config.ipc + HELD_OUT]])
    parts = (torch.cat(learnt), torch.cat(held))
    made = [LabeledImages(data.train.images[rows], data.train.labels[rows]) for rows in parts]
    return made[0], made[1]
