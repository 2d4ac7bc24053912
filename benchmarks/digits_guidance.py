"""Stage 1 on digits: which guidance makes the better training set?

For every variant and number of images per class: sets sampled with seeds 0, 1, ..., one ConvNet
student on hard labels per set, its test accuracy, and the transport cost of the set to the real
training data. Results are written after every row, and rows that are there are not made again:

    python benchmarks/digits_guidance.py --ipc 1 5 10 --seeds 5
    python benchmarks/digits_guidance.py --variants otg strength-0.3 --ipc 1

Seeds that no setting was chosen on are in results/digits_guidance_fresh.json (--first-seed 100).
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from otdd.distill import evaluate
from otdd.distill.baselines import BASELINES, baselines
from otdd.distill.config import PRESETS, GuidanceConfig, RunConfig, SampleConfig, TrainConfig
from otdd.distill.data import ImageData, load_data
from otdd.distill.generator import Generator, load_generator
from otdd.distill.sample import sample
from otdd.distill.settings import from_dict
from otdd.distill.store import Store

RESULTS = Path(__file__).parent / "results" / "digits_guidance.json"


def _guided(**settings: Any) -> dict[str, Any]:
    return {"starts": 1, "guidance": settings}


# Settings of `sample` laid over the defaults; `guidance` is nested. All but the first: one start.
VARIANTS: dict[str, dict[str, Any]] = {
    "otg": {},
    "starts-1": _guided(),
    **{f"strength-{s}": _guided(strength=s) for s in (0.1, 0.3, 1.0)},
    **{f"repulsion-{k}": _guided(repulsion=k) for k in (0.0, 0.5)},
    **{f"lambda-{v}": _guided(lambda_1=v) for v in (0.03, 0.3)},
    "l1": _guided(metric="l1"),
    "target-z_t": _guided(target="z_t"),
    "first-half": _guided(window=(0.0, 0.5)),
    "last-half": _guided(window=(0.5, 1.0)),
    "sequential": {"order": "sequential"},
    # The transport term alone, as when these figures were made: the preset has grown since.
    "paper": {
        **PRESETS["paper"]["sample"],
        "influence": {"strength": 0.0},
        "diversity": {"strength": 0.0},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*BASELINES, "unguided", *VARIANTS]
    parser.add_argument("--variants", nargs="+", default=names, choices=names)
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--generator", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(args.data)
    generator = load_generator(args.generator, data)
    report = _open_report(args.out)
    done = {(row["variant"], row["ipc"]) for row in report["rows"]}
    for ipc in args.ipc:
        for name in args.variants:
            if (name, ipc) in done:
                continue
            row = measure(data, generator, name, ipc, args.seeds, args.first_seed)
            report["rows"].append(row)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(
                f"{name:28} ipc {ipc:3}  hard {row['hard']:5.1f} +- {row['hard_std']:.1f}"
                f"  ot_cost {row['ot_cost']:.2f}  {row['seconds']:.0f} s",
                flush=True,
            )


def measure(
    data: ImageData, generator: Generator, name: str, ipc: int, seeds: int, first: int = 0
) -> dict[str, Any]:
    """One row: mean and deviation over seeds of accuracy and transport cost."""
    runs, costs, start = [], [], time.perf_counter()
    settings = from_dict(SampleConfig, VARIANTS.get(name, {}))
    for seed in range(first, first + seeds):
        with tempfile.TemporaryDirectory() as folder:
            accuracy, cost = _one(data, generator, name, ipc, seed, settings, folder)
        runs.append(accuracy)
        costs.append(cost)
    return {
        "variant": name,
        "ipc": ipc,
        "settings": VARIANTS.get(name, {}),
        "hard": round(statistics.fmean(runs), 2),
        "hard_std": round(statistics.pstdev(runs), 2),
        "runs": [round(r, 2) for r in runs],
        "ot_cost": round(statistics.fmean(costs), 3),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _one(
    data: ImageData,
    generator: Generator,
    name: str,
    ipc: int,
    seed: int,
    settings: SampleConfig,
    folder: str,
) -> tuple[float, float]:
    config = RunConfig(
        data=data.name,
        ipc=ipc,
        out=folder,
        seed=seed,
        sample=settings,
        train=dataclasses.replace(TrainConfig(), losses=("ce",)),
    )
    store = Store(folder)
    set_name = name if name in (*BASELINES, "unguided") else "otg"
    if set_name in BASELINES:
        baselines(store, data, config, set_name, codec=generator.codec)
    else:
        sample(store, data, generator, config, set_name=set_name)
    made = store.read_images(set_name)
    accuracy = student_accuracy(made["images"], made["labels"], data, config, seed)
    cost = evaluate.transport_cost(made["images"], made["labels"], data, generator.codec)
    return accuracy, cost


def student_accuracy(
    images: torch.Tensor, labels: torch.Tensor, data: ImageData, config: RunConfig, seed: int
) -> float:
    """Test accuracy of one ConvNet trained on hard labels, as `otdd train` does it."""
    from otdd.distill.match import make_loss, reproducible, train_student
    from otdd.distill.relabel import Plan, hard_steps
    from otdd.distill.students import make_network
    from otdd.distill.training import Training

    total = Plan.of(config, data, len(images)).total
    with reproducible(data.image_shape):
        student = make_network("convnet", data, seed)
        steps = hard_steps(len(images), data, config, seed)
        loss = make_loss("ce", config.train)
        training = Training(student, loss, config.train, total, seed=seed)
        outcome = train_student(training, images, labels, steps, test=data.test)
    return outcome.accuracy


def _open_report(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    packages = ("torch", "diffusers", "numpy", "scikit-learn")
    return {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": "2-core x86-64 CPU",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "defaults": dataclasses.asdict(SampleConfig(guidance=GuidanceConfig())),
        "rows": [],
    }


if __name__ == "__main__":
    main()
