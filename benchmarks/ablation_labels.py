"""Stages 1 to 3: what do transport in sampling, aligned teachers and transport of logits bring?

The source's ablation table on our data. For every seed: sets sampled with that seed, labelled under
augmentation of that seed, and students of that seed, so arms are compared seed by seed. Intervals,
tables and figures are made of the file by `ablation_report.py`.

    python benchmarks/ablation_labels.py --archs convnet-6 resnetap-10 resnet18 --ipc 1 5 10
    python benchmarks/ablation_labels.py --archs convnet --ipc 1 5 --arms sweep

Arms, all with kappa_1 .025, kappa_2 1 (squared error of logits), tau 2, eps .1, 20 iterations:

* `full`: the set `starts-4` of `ablation_guidance.py`, which `otdd run` sampled before it had
  `detail` and classifier-free guidance by default; labels of |T(IPC)| teachers, 1 below IPC 10 and
  2 from there; transport of logits with beta_2 .08.
* `no-otg`: the same on the set `unguided`, sampled from the same noise.
* `no-lia`: the same with the first teacher alone at every IPC. Below IPC 10 that is `full` itself,
  by definition, and is not run.
* `all-teachers`: the same with all four teachers at every IPC, as the predecessors do (ours).
* `no-otm`: the same with beta_2 0.
* `hard-otg`, `hard-no-otg`: cross-entropy on hard labels, mixed by CutMix, on either set.
* `run`, `run-no-otg`: `full` and `no-otg` with the settings that `otdd run` samples with;
  `hard-run`, `hard-run-no-otg`: the same on hard labels.
* `now`, `now-...`, `run-...`: `full` on the set of that variant of `ablation_guidance.py`, today's
  guidance (from one start, or as `otdd run` does) with one setting changed.
* `random`, `kmeans`: `full` on random real images and on k-means centroids (of pixels);
  `random-no-otm`, `kmeans-no-otm`: the same without transport of logits. They need no generator.
* `sweep`: `full` with one of tau, eps, beta_2, beta_2_share or the batch changed (see `SWEEP`), and
  `no-otm` of each batch. `share` is beta_2_share: the transport's part of the gradient norm.

`shares` of a cell are what the transport term's gradient was of that of the other terms, with
respect to the logits, in the first and in the last step. Teachers are trained here once.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import ablation
import torch
from ablation import Cells, digest
from ablation_guidance import VARIANTS, make_set
from torch import Tensor

from otdd.distill.baselines import BASELINES, baselines
from otdd.distill.config import RelabelConfig, RunConfig, SampleConfig, TrainConfig
from otdd.distill.data import load_data
from otdd.distill.generator import Generator, load_generator
from otdd.distill.match import make_loss
from otdd.distill.relabel import Teacher, hard_steps, live_steps, make_teachers
from otdd.distill.settings import from_dict, to_dict
from otdd.distill.store import Store
from otdd.distill.training import Step
from otdd.losses import OTDistillationLoss, OTLogitLoss

RESULTS = Path(__file__).parent / "results" / "ablation_labels.json"
KEY = ("data", "ipc", "arm", "arch", "seed", "epochs")
# Neighbours share labels.
TABLE = ("full", "no-otm", "hard-otg", "no-lia", "all-teachers", "no-otg", "hard-no-otg")
LINES = ("random", "random-no-otm", "kmeans", "kmeans-no-otm")
NOW = ("run", "hard-run", "run-no-otg", "hard-run-no-otg")
CHANGED = tuple(v for v in VARIANTS if v.startswith(("now", "run-")) and v != "run-unguided")
SWEEP = (
    *(f"tau-{v:g}" for v in (1, 4)),
    *(f"eps-{v:g}" for v in (0.02, 0.5)),
    *(f"beta_2-{v:g}" for v in (0.8, 8, 80)),
    *(f"share-{v:g}" for v in (0.1, 0.3, 1.0)),
    *(f"batch-{v}" for v in (10, 25)),
    *(f"no-otm-batch-{v}" for v in (10, 25)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--generator", help="of `otdd fit`; by default the one shipped")
    parser.add_argument(
        "--arms", nargs="+", default=TABLE, help=f"{TABLE + LINES + NOW}, sweep, or ..."
    )
    parser.add_argument("--archs", nargs="+", default=["convnet-6"])
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--teachers", nargs="+", default=["convnet", "resnetap-10"])
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="sets, teachers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {*TABLE, *LINES, *NOW, *SWEEP, *CHANGED}
    arms = [arm for name in args.arms for arm in (SWEEP if name == "sweep" else (name,))]
    if unknown := [arm for arm in arms if arm not in known]:
        parser.error(f"--arms: {unknown} not known; accepted: sweep or {sorted(known)}")
    campaign = Campaign(args.data, args.generator, args.teachers, args.work, args.epochs)
    cells = Cells(args.out, KEY, {"train": to_dict(TrainConfig()), "sweep": SWEEP})
    for seed in args.seeds:
        for ipc in args.ipc:
            for arm in arms:
                for arch in args.archs:
                    key = {"data": args.data, "ipc": ipc, "arm": arm, "arch": arch, "seed": seed}
                    key |= {"epochs": args.epochs}
                    if not (campaign.same(arm, ipc) or cells.has(**key)):
                        cells.add(**key, **campaign.measure(arm, ipc, seed, arch))


class Campaign:
    """Sets, teachers and labels of a data set, each made once.

    Args:
        data, generator: as for `otdd run`.
        teachers: architectures that take turns in the list of four teachers.
        work: folder of sets and teachers, by data set and generator.
        epochs: of a student.
    """

    def __init__(
        self, data: str, generator: str | None, teachers: list[str], work: Path, epochs: int
    ) -> None:
        self.data = load_data(data)
        self._spec = generator
        own = sha256(Path(generator).read_bytes()).hexdigest()[:8] if generator else ""
        self.work = work / f"{data}-{own}".rstrip("-")
        self.epochs, self.archs = epochs, teachers
        self._teachers: list[Teacher] = []
        self._last: tuple[Any, list[Step]] = (None, [])

    @cached_property
    def generator(self) -> Generator:
        """Loaded when a set has to be sampled."""
        return load_generator(self._spec, self.data)

    def same(self, arm: str, ipc: int) -> bool:
        """Whether an arm is `full` or `no-otm` itself: then there is nothing to measure."""
        batch = _batch(arm)
        larger = batch is not None and batch >= ipc * self.data.num_classes
        return larger or (arm == "no-lia" and ipc < 10)

    def teachers(self, count: int) -> list[Teacher]:
        """The first of four teachers: the architectures with one seed, then with another."""
        for number in range(len(self._teachers), count):
            again, position = divmod(number, len(self.archs))
            relabel = RelabelConfig((self.archs[position],))
            seed = 1000 * again
            config = RunConfig(self.data.name, 1, str(self.work), seed=seed, relabel=relabel)
            self._teachers += make_teachers(Store(self.work), self.data, config)
            last = self._teachers[-1]
            print(f"teacher {last.name}, seed {seed}: {last.accuracy} %", flush=True)
        return self._teachers[:count]

    def measure(self, arm: str, ipc: int, seed: int, arch: str) -> dict[str, Any]:
        """One cell: accuracy of the student, and what it was trained on."""
        batch = _batch(arm) or TrainConfig.batch
        train = dataclasses.replace(TrainConfig(), epochs=self.epochs, batch=batch)
        config = RunConfig(self.data.name, ipc, "unused", seed=seed, train=train)
        count = {"no-lia": 1, "all-teachers": 4}.get(arm, _aligned(ipc))
        old, now = ("starts-4", "unguided"), ("run", "run-unguided")
        set_name = (now if arm in NOW else old)[arm.endswith("no-otg")]
        if arm in LINES:
            set_name = arm.split("-")[0]
        elif arm in CHANGED:
            set_name = arm
        images, labels = self.set_of(set_name, config)
        if arm.startswith("hard"):
            watched = None
            loss, steps = make_loss("ce", train), hard_steps(len(images), self.data, config, seed)
            count = 0
        else:
            watched = Watched(objective(arm))
            loss, steps = watched, self._labelled(images, config, set_name, count)
        found = ablation.train(images, labels, steps, loss, self.data, config, arch)
        shares = watched.shares() if watched is not None else None
        return {
            **found,
            "set": set_name,
            "digest": digest(images),
            "teachers": [t.name for t in self.teachers(count)],
            "shares": shares,
        }

    def set_of(self, name: str, config: RunConfig) -> tuple[Tensor, Tensor]:
        store = Store(self.work / f"ipc{config.ipc}-seed{config.seed}-{name}")
        made = name if name in BASELINES else "unguided" if "unguided" in name else "otg"
        if not store.has_images(made):
            if name in BASELINES:
                baselines(store, self.data, config, name)
            else:
                settings = from_dict(SampleConfig, VARIANTS[name])
                own = dataclasses.replace(config, sample=settings)
                judged = name.startswith("run") and name != "run-unguided"
                judges = self.teachers(_aligned(config.ipc)) if judged else ()
                make_set(store, self.data, self.generator, own, name, judges)
        tensors = store.read_images(made)
        return tensors["images"], tensors["labels"]

    def _labelled(
        self, images: Tensor, config: RunConfig, set_name: str, count: int
    ) -> list[Step] | Iterator[Step]:
        key = (set_name, config.ipc, config.seed, config.train.batch, count)
        if self._last[0] != key:
            made = list(live_steps(images, self.data, self.teachers(count), config))
            self._last = (key, made)
        return self._last[1]


def _aligned(ipc: int) -> int:
    """|T(IPC)|."""
    return 1 if ipc < 10 else 2


def _batch(arm: str) -> int | None:
    found = re.search(r"batch-(\d+)$", arm)
    return int(found[1]) if found else None


def objective(arm: str) -> OTDistillationLoss:
    """The loss of an arm on soft labels."""
    train = TrainConfig()
    settings = {"tau": train.tau, "eps": 0.1, "beta_2": train.beta_2, "share": None}
    if changed := re.fullmatch(r"(tau|eps|beta_2|share)-([\d.]+)", arm):
        settings[changed[1]] = float(changed[2])
    if "no-otm" in arm:
        settings["beta_2"] = 0.0
    beta_2 = settings["beta_2"] if settings["share"] is None else None
    ot = OTLogitLoss(tau=settings["tau"], eps=settings["eps"])
    return OTDistillationLoss(
        train.kappa_1, train.kappa_2, beta_2, beta_2_share=settings["share"], ot=ot
    )


class Watched:
    """A loss that remembers its first and last batch."""

    def __init__(self, loss: OTDistillationLoss) -> None:
        self.loss, self.seen = loss, []

    def __call__(
        self, logits: Tensor, mixed: Tensor, base: Tensor, teacher: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen[1:] = [(logits.detach(), teacher, base)]
        return self.loss(logits, teacher, base, parts=True)

    def shares(self) -> list[float]:
        """|beta_2 grad OT| over |grad of the other terms| in the first and the last step."""
        if self.loss.beta_2_share is not None:
            return [self.loss.beta_2_share] * 2
        others, shares = OTDistillationLoss(self.loss.kappa_1, self.loss.kappa_2, 0.0), []
        for logits, teacher, base in self.seen:
            logits = logits.requires_grad_()
            rest = torch.autograd.grad(others(logits, teacher, base), logits)[0]
            ot = torch.autograd.grad(self.loss.ot(logits, teacher), logits)[0]
            shares.append(round(float(self.loss.beta_2 * ot.norm() / rest.norm()), 5))
        return shares


if __name__ == "__main__":
    main()
