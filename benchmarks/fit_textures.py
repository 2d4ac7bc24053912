"""Does `otdd fit` make images of the class that was asked for, and after how much work?

A teacher, a ConvNet of otdd's own trained on all real training images, labels samples of the
generator on its way: DDIM of 25 steps as in `otdd run`, without and with classifier-free guidance.
The scale of it was chosen beforehand, on short trainings, other noise and another judge. Counted is
the processor time of the training alone. What is there is kept; an interrupted run continues with
the same command:

    python benchmarks/fit_textures.py --out runs/fit-textures

The samples after the last step, beside real images, are results/fit_textures.png.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from otdd.distill.config import RelabelConfig, RunConfig, SampleConfig
from otdd.distill.data import ImageData, LabeledImages, load_data
from otdd.distill.fit import FitConfig, Pictures, fit
from otdd.distill.generator import Generator
from otdd.distill.match import accuracy
from otdd.distill.relabel import Teacher, make_teachers
from otdd.distill.sample import Batch, run_batch
from otdd.distill.store import Store
from otdd.distill.terms import rng

RESULTS = Path(__file__).parent / "results"
# The teachers of a run, for students, see mixed and enlarged images: they would need longer to be
# sure of whole ones.
TEACHER: dict[str, Any] = {
    "teachers": ("convnet",),
    "teacher_epochs": 16,
    "cutmix": 0.0,
    "crop_scale": (1.0, 1.0),
}
TARGET = 80.0


class Report:
    """The rows of the result file, and the time spent on training since the last of them."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.rows: list[dict[str, Any]] = (
            json.loads(path.read_text())["rows"] if path.exists() else []
        )
        self.wall = self.cpu = 0.0

    def begin(self, step: int) -> None:
        """Forget what was measured after this step of an earlier run; start the clocks."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self.resume()

    def resume(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        """Minutes of training so far, of the processor and by the clock."""
        last = self.rows[-1] if self.rows else {"cpu_minutes": 0.0, "wall_minutes": 0.0}
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        return {
            "cpu_minutes": round(last["cpu_minutes"] + cpu / 60, 2),
            "wall_minutes": round(last["wall_minutes"] + wall / 60, 2),
        }

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        minutes = {
            scale: next((r["cpu_minutes"] for r in self.rows if r["right"][scale] >= TARGET), None)
            for scale in row["right"]
        }
        content = {**self.head, f"cpu_minutes_to_{TARGET:.0f}": minutes, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n")
        print({k: v for k, v in row.items() if k != "by_class"}, flush=True)


def judged(
    generator: Generator, teacher: Teacher, count: int, scales: Sequence[float]
) -> dict[str, Any]:
    """Share of samples, in percent, that the teacher labels as the class asked for; by scale."""
    names = generator.classes
    labels = torch.arange(len(names)).repeat_interleave(count)
    right, by_class = {}, {}
    for scale in scales:
        streams = [rng(0, "image", name, n) for name in names for n in range(count)]
        batch = Batch(labels, labels, streams)
        latents = run_batch(generator, batch, SampleConfig(guidance_scale=scale))
        with torch.no_grad():
            answers = teacher.network(generator.codec.decode(latents).float() / 255).argmax(1)
        shares = (answers == labels).float().view(len(names), count).mean(1) * 100
        right[f"{scale:g}"] = round(shares.mean().item(), 2)
        by_class[f"{scale:g}"] = {
            name: round(v, 1) for name, v in zip(names, shares.tolist(), strict=True)
        }
    return {"right": right, "images": len(labels), "by_class": by_class}


def make_teacher(data: ImageData, folder: Path) -> tuple[Teacher, dict[str, Any]]:
    """The teacher and what is to be known of it."""
    config = RunConfig(data=data.name, ipc=1, out=str(folder), relabel=RelabelConfig(**TEACHER))
    (teacher,) = make_teachers(Store(folder), data, config)
    known = LabeledImages(data.train.images[::4], data.train.labels[::4])
    facts = {
        "test": teacher.accuracy,
        "every fourth training image": accuracy(teacher.network, known),
    }
    return teacher, {**TEACHER, "accuracy": {k: round(v, 2) for k, v in facts.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="textures")
    parser.add_argument("--resolution", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/fit-textures"))
    parser.add_argument("--steps", type=int, default=FitConfig.steps)
    parser.add_argument("--every", type=int, default=1000, help="steps between measurements")
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1.0, 2.0], help="classifier-free guidance"
    )
    parser.add_argument(
        "--count", type=int, default=25, help="images a class, four times at the end"
    )
    parser.add_argument("--commit", default="", help="the commit that is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(args.data, resolution=args.resolution)
    teacher, known = make_teacher(data, args.out)
    config = FitConfig(steps=args.steps, checkpoint_every=args.every, grid_every=args.every)
    report = Report(
        RESULTS / f"fit_{data.name}.json",
        {
            "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": "2-core x86-64 CPU, shared with other work; one thread",
            "commit": args.commit,
            "versions": {"python": platform.python_version()}
            | {name: metadata.version(name) for name in ("torch", "diffusers")},
            "teacher": known,
            "fit": dataclasses.asdict(config),
        },
    )
    pictures = Pictures(data, config.seed, args.scales)

    def picture(generator: Generator, step: int) -> bytes:
        spent, last = report.spent(), step == config.steps
        seen = judged(generator, teacher, args.count * (4 if last else 1), args.scales)
        report.add({"step": step, **spent, **seen})
        made = pictures(generator, step)
        (RESULTS / f"fit_{data.name}.png").write_bytes(made)
        report.resume()
        return made

    started = False

    def progress(_: str, step: int, *__: object) -> None:
        nonlocal started
        if not started:
            report.begin(step)
        started = True

    fit(data, config, args.out / "generator.safetensors", progress=progress, picture=picture)


if __name__ == "__main__":
    main()
