"""What optimal-transport guidance adds to a denoising step of a diffusion transformer, on the CPU.

A step is one call of a DiT of diffusers with random weights at the latents of 256x256 images
(4x32x32), without classifier-free guidance, which would double it, and one DDIM update. The batch
is one class; the references are `--references` real latents. Batch 1 is the last image of a
sequential class: 49 finished latents stand beside it, as at IPC 50.

    python benchmarks/guidance_share.py --model DiT-S/2 --batch 1 8 64 --rounds 5
    python benchmarks/guidance_share.py --model DiT-XL/2 --batch 1 --rounds 5

Times are CPU times of the one thread that works. The guidance is all that is done outside the
denoiser less what is done there without guidance; of it the Sinkhorn iterations. Memory is the peak
in use during the step, with and without guidance, each in a process of its own (Linux, glibc).
"""

import argparse
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from otdd.distill import Denoiser, GuidanceConfig, Guides, OTGuidance, denoise
from otdd.distill.codec import import_diffusers
from otdd.distill.presets import PRESETS
from otdd.ops import cost_matrix, sinkhorn

RESULTS = Path(__file__).parent / "results" / "guidance_share.json"
MODELS = {"DiT-S/2": (12, 6), "DiT-B/2": (12, 12), "DiT-XL/2": (28, 16)}  # layers, heads
HEAD = {"DiT-XL/2": 72}  # width of a head; 64 for the others
LATENT, DIM = (4, 32, 32), 4096
FINISHED = 49
SETTINGS = {
    "default": {},
    "paper": {**PRESETS["paper"]["sample"]["guidance"], "window": (0.0, 1.0)},
}


def transformer(name: str) -> torch.nn.Module:
    """Random weights of the size of the published model."""
    layers, heads = MODELS[name]
    torch.manual_seed(0)
    model = import_diffusers().DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD.get(name, 64),
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return model.eval().requires_grad_(False)


def guidance(settings: str, references: int) -> OTGuidance:
    config = GuidanceConfig(**{**SETTINGS[settings], "reference_size": references})
    made = OTGuidance(config)
    draws = torch.Generator().manual_seed(1)
    real = torch.randn(references, *LATENT, generator=draws)
    made.set_reference(real, torch.zeros(references, dtype=torch.int64))
    return made


class Step:
    """One denoising step from noise, as `otdd sample` makes it; `inside` is of the denoiser, ms."""

    def __init__(self, model: torch.nn.Module, batch: int, terms: list[OTGuidance]) -> None:
        draws = torch.Generator().manual_seed(2)
        self.noise = torch.randn(batch, *LATENT, generator=draws)
        self.labels = torch.zeros(batch, dtype=torch.int64)
        memory = None
        if batch == 1:
            finished = torch.randn(FINISHED, *LATENT, generator=draws)
            memory = finished, torch.zeros(FINISHED, dtype=torch.int64)
        self.guides = Guides(terms, self.labels, memory)
        self.denoiser = Denoiser(model)
        self.scheduler = import_diffusers().DDIMScheduler()
        self.scheduler.set_timesteps(50)
        self.scheduler.timesteps = self.scheduler.timesteps[25:26]
        self.inside = 0.0

    def __call__(self) -> Tensor:
        return denoise(self._predict, self.scheduler, self.noise, self.guides)

    def _predict(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        start = time.thread_time()
        predicted = self.denoiser.predict(z, t, self.labels, batch=64)
        self.inside = 1e3 * (time.thread_time() - start)
        return predicted


def clock(run: Callable[[], object]) -> float:
    """Milliseconds of CPU time."""
    start = time.thread_time()
    run()
    return 1e3 * (time.thread_time() - start)


def solver(term: OTGuidance, batch: int) -> Callable[[], object]:
    """The Sinkhorn iterations alone, on costs of the same shape."""
    rows = batch + FINISHED * (batch == 1)
    x, y = torch.randn(1, rows, DIM), torch.randn(1, term.config.reference_size, DIM)
    C = cost_matrix(x, y, term.config.metric)
    eps = term.config.lambda_1 * C.std()
    return lambda: sinkhorn(C, eps=eps, max_iter=term.config.max_iter)


def measure(name: str, batch: int, settings: str, references: int, rounds: int) -> dict:
    """Medians of interleaved rounds; the first is not counted."""
    term, model = guidance(settings, references), transformer(name)
    guided, unguided = Step(model, batch, [term]), Step(model, batch, [])
    solve = solver(term, batch)
    first = clock(guided) - guided.inside  # with what is done once: costs of finished latents
    clock(unguided)
    steps, beside, bare, solves = [], [], [], []
    for _ in range(rounds):
        beside.append(clock(guided) - guided.inside)
        steps.append(clock(unguided))
        bare.append(steps[-1] - unguided.inside)
        solves.append(clock(solve))
    without, step = statistics.median(bare), statistics.median(steps)
    added = statistics.median(beside) - without
    return {
        "model": name,
        "batch": batch,
        "settings": settings,
        "references": references,
        "rounds": rounds,
        "median_ms": {
            "step without guidance": round(step, 2),
            "guidance": round(added, 3),
            "of it sinkhorn": round(statistics.median(solves), 3),
            "guidance, first step": round(first - without, 3),
        },
        "spread_of_step": [round(min(steps), 2), round(max(steps), 2)],
        "share_of_unguided_step": round(added / step, 6),
    }


def peak_mib(name: str, batch: int, settings: str, references: int) -> float:
    """Peak resident memory of this process during one step, MiB; `none` is unguided."""
    terms = [] if settings == "none" else [guidance(settings, references)]
    step = Step(transformer(name), batch, terms)
    Path("/proc/self/clear_refs").write_text("5")
    step()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


@functools.cache
def peak(name: str, batch: int, settings: str, references: int) -> float:
    """`peak_mib` of a process of its own, which hands memory back as soon as it is freed.

    Otherwise, by default in glibc, gaps between what is in use come to more than guidance takes.
    """
    command = [sys.executable, __file__, "--model", name, "--batch", str(batch)]
    command += ["--references", str(references), "--peak", settings]
    handed_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return round(float(subprocess.check_output(command, text=True, env=handed_back)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="DiT-S/2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--references", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=["none", *SETTINGS], help=argparse.SUPPRESS)
    parser.add_argument("--commit", default="", help="the commit that is measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print(peak_mib(given.model, given.batch[0], given.peak, given.references))
        return
    rows = json.loads(given.results.read_text())["rows"] if given.results.exists() else []
    about = {"cores": os.cpu_count(), "torch": torch.__version__, "commit": given.commit}
    about["machine"] = f"{platform.machine()} CPU, 1 thread, shared with other work"
    identity = ("model", "batch", "settings", "references")
    for batch in given.batch:
        for settings in given.settings:
            case = given.model, batch, settings, given.references
            row = measure(*case, given.rounds)
            bare = peak(given.model, batch, "none", given.references)
            row["peak_mib"] = {"unguided": bare, "guided": peak(*case)}
            row["share_of_memory"] = round(row["peak_mib"]["guided"] / bare - 1, 5)
            row |= about
            rows = [r for r in rows if any(r[k] != row[k] for k in identity)] + [row]
            given.results.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
