"""Joint order against sequential: images per second of guided sampling, on the CPU.

    python benchmarks/order.py --model digits --ipc 10 50 --classes 10 1
    python benchmarks/order.py --model DiT-S/2 --ipc 10 50 --classes 1 --steps 1

Jointly, all images of the classes in flight are one batch. One after the other, the n-th image of
every class in flight is: a batch of as many images as classes. `digits` is the generator that is
shipped, at the 25 steps of `otdd sample`; the others have random weights, as in
`guidance_share.py`, and times in proportion to their steps. Guidance is the default from one start,
towards 200 real latents a class. Both orders are run in turn, `--rounds` times.

Times are CPU times of the one thread that works, medians. `denoiser_ms` is that of the denoiser for
one image at one step; where it does not fall with the batch, the denoiser is bound by its
arithmetic at batch 1 already, and no order of images makes it faster.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from guidance_share import LATENT, MODELS, transformer
from torch import Tensor

from otdd.distill import Denoiser, GuidanceConfig, Guides, OTGuidance, denoise
from otdd.distill.codec import import_diffusers
from otdd.distill.data import load_data
from otdd.distill.generator import load_generator

RESULTS = Path(__file__).parent / "results" / "order.json"
REFERENCES, BATCH = 200, 64
KEY = ("model", "classes", "ipc")


class Sampling:
    """A model with the references of its guidance; samples a set in either order."""

    def __init__(self, name: str, classes: int, steps: int) -> None:
        self.classes, self.steps, self.inside = classes, steps, 0.0
        term = OTGuidance(GuidanceConfig(reference_size=REFERENCES))
        if name == "digits":
            data = load_data("digits")
            generator = load_generator(None, data)
            self.shape, self.clamp = generator.latent_shape, generator.codec.bounded
            model, config = generator.transformer, generator.scheduler_config
            own = data.train.labels < classes
            latents, labels = generator.codec.encode(data.train.images[own]), data.train.labels[own]
        else:
            self.shape, self.clamp = LATENT, False
            model, config = transformer(name), {}
            labels = torch.arange(classes).repeat_interleave(REFERENCES)
            latents = torch.randn(len(labels), *LATENT, generator=torch.Generator().manual_seed(1))
        term.set_reference(latents, labels)
        self.term, self.denoiser = term, Denoiser(model)
        self.scheduler_config = config

    def sample(self, order: str, ipc: int) -> Tensor:
        """Latents of a set, (classes * ipc, c, h, w)."""
        if order == "joint":
            return self._batch(ipc)
        done: list[Tensor] = []
        for _ in range(ipc):
            done.append(self._batch(1, done))
        return torch.stack(done, 1).flatten(0, 1)

    def _batch(self, each: int, done: list[Tensor] | None = None) -> Tensor:
        labels = torch.arange(self.classes).repeat_interleave(each)
        memory = None
        if done:
            memory = torch.cat(done), torch.arange(self.classes).repeat(len(done))

        def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            start = time.thread_time()
            predicted = self.denoiser.predict(z, t, labels, batch=BATCH)
            self.inside += time.thread_time() - start
            return predicted

        scheduler = import_diffusers().DDIMScheduler.from_config(self.scheduler_config)
        scheduler.set_timesteps(self.steps)
        noise = torch.randn(len(labels), *self.shape)
        guides = Guides([self.term], labels, memory)
        return denoise(predict, scheduler, noise, guides, clamp=self.clamp)


def measure(name: str, classes: int, ipc: int, steps: int, rounds: int) -> dict:
    """One row: both orders in turn, after a set of one image a class that is not counted."""
    sampling, images = Sampling(name, classes, steps), classes * ipc
    sampling.sample("joint", 1)
    wholes: dict[str, list[float]] = {"joint": [], "sequential": []}
    insides: dict[str, list[float]] = {"joint": [], "sequential": []}
    for _ in range(rounds):
        for order in wholes:
            sampling.inside, start = 0.0, time.thread_time()
            made = sampling.sample(order, ipc)
            wholes[order].append(time.thread_time() - start)
            insides[order].append(sampling.inside)
            assert len(made) == images
    row = {"model": name, "classes": classes, "ipc": ipc, "steps": steps, "rounds": rounds}
    for order, times in wholes.items():
        whole, inside = statistics.median(times), statistics.median(insides[order])
        row[order] = {
            "batch": min(BATCH, images if order == "joint" else classes),
            "seconds": round(whole, 3),
            "images_per_second": round(images / whole, 3),
            "denoiser_ms": round(1e3 * inside / images / steps, 3),
            "share_of_denoiser": round(inside / whole, 4),
        }
    row["ratio"] = round(row["sequential"]["seconds"] / row["joint"]["seconds"], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["digits", *MODELS], default="digits")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1])
    parser.add_argument("--ipc", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default="", help="the commit that is measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(given.results.read_text())["rows"] if given.results.exists() else []
    about = {"cores": os.cpu_count(), "torch": torch.__version__, "commit": given.commit}
    about["machine"] = f"{platform.machine()} CPU, 1 thread, shared with other work"
    for classes in given.classes:
        for ipc in given.ipc:
            row = measure(given.model, classes, ipc, given.steps, given.rounds) | about
            rows = [r for r in rows if any(r[k] != row[k] for k in KEY)] + [row]
            given.results.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
