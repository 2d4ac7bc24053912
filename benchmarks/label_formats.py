"""Do compact soft labels cost accuracy? Students of one set on the labels of each format.

For every seed a set of random real images, drawn, augmented and learnt from with that seed; one
teacher labels them all. Only the format differs, so formats are compared seed by seed, and which
epochs happen to be labelled is part of the spread. Cells that are in the results are not made
again; `ablation_report.py` makes the tables of them:

    python benchmarks/label_formats.py --data digits --ipc 1 5
    python benchmarks/label_formats.py --data textures --ipc 5 --losses otm

The formats with fewer epochs are those that take 1/40 of FKD's bytes at 1000 classes.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import ablation
import torch
from ablation import Cells, digest
from ablation_labels import Campaign

from otdd.distill.config import RelabelConfig, RunConfig, TrainConfig
from otdd.distill.match import make_loss
from otdd.distill.relabel import Plan, live_steps
from otdd.distill.settings import to_dict
from otdd.distill.training import Step

RESULTS = Path(__file__).parent / "results" / "label_formats.json"
KEY = ("data", "ipc", "labels", "loss", "arch", "seed", "epochs")
FORMATS = {
    "fp16": RelabelConfig(),
    "fp16, 7 epochs": RelabelConfig(label_epochs=7),
    "q8, 14 epochs": RelabelConfig(label_format="q8", label_epochs=14),
    "q4, 27 epochs": RelabelConfig(label_format="q4", label_epochs=27),
    "q8": RelabelConfig(label_format="q8"),
    "q4": RelabelConfig(label_format="q4"),
    "topk-4": RelabelConfig(label_format="topk", top_k=4),
    "topk-1": RelabelConfig(label_format="topk", top_k=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--losses", nargs="+", choices=("kl", "otm"), default=["kl", "otm"])
    parser.add_argument("--arch", default="convnet")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="sets, teachers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    campaign = Campaign(args.data, None, ["convnet"], args.work, args.epochs)
    cells = Cells(args.out, KEY, {"train": to_dict(TrainConfig())})
    for seed in args.seeds:
        for ipc in args.ipc:
            steps: list[Step] = []
            for labels in args.formats:
                for loss in args.losses:
                    key = {"data": args.data, "ipc": ipc, "labels": labels, "loss": loss}
                    key |= {"arch": args.arch, "seed": seed, "epochs": args.epochs}
                    if not cells.has(**key):
                        steps = steps or whole(campaign, ipc, seed)
                        cells.add(**key, **measure(campaign, key, steps))


def whole(campaign: Campaign, ipc: int, seed: int) -> list[Step]:
    """The steps of a student with every label as the teacher gives it."""
    config = settings(campaign, ipc, seed)
    images, _ = campaign.set_of("random", config)
    return list(live_steps(images, campaign.data, campaign.teachers(1), config))


def measure(campaign: Campaign, key: dict, steps: list[Step]) -> dict:
    """One cell: accuracy of the student, and the set and teacher that it was trained on."""
    config = settings(campaign, key["ipc"], key["seed"])
    config = dataclasses.replace(config, relabel=FORMATS[key["labels"]])
    images, hard = campaign.set_of("random", config)
    plan = Plan.of(config, campaign.data, len(images))
    loss, coded = make_loss(key["loss"], config.train), recoded(steps, plan, campaign)
    found = ablation.train(images, hard, coded, loss, campaign.data, config, key["arch"])
    return {**found, "digest": digest(images), "teachers": [t.name for t in campaign.teachers(1)]}


def recoded(steps: list[Step], plan: Plan, campaign: Campaign) -> Iterator[Step]:
    """The steps that students of a plan see, of steps with every label."""
    classes, length = len(campaign.data.classes), plan.steps_per_epoch
    for number in range(plan.total):
        step = steps[number % (plan.labelled * length)]
        kept = plan.labels.encode(step.teacher.half())
        yield Step(step.batch, plan.labels.decode(kept, classes))


def settings(campaign: Campaign, ipc: int, seed: int) -> RunConfig:
    """The run of a seed with every label."""
    train = TrainConfig(epochs=campaign.epochs)
    return RunConfig(campaign.data.name, ipc, "unused", seed=seed, train=train)


if __name__ == "__main__":
    main()
