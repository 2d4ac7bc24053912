"""Stage 1: which guidance makes the better training set? One setting at a time around a default.

For every seed, number of images per class and variant: one set sampled with that seed, one ConvNet
student of that seed on its hard labels, its test accuracy, the transport cost of the set to the
real training data, and how long sampling took. The figures and tables of `ablation_report.py` are
made of the file.

    python benchmarks/ablation_guidance.py --seeds 0 1 2 3 4
    python benchmarks/ablation_guidance.py --data textures --generator FILE --epochs 100

Variants (settings laid over those of `otdd sample`): `default` is the guidance that was its default
when most of this was measured, from one start of the noise and without classifier-free guidance or
`detail`; most others change it in one place. `now` is today's default, but from one start, and
`now-NAME` changes that in the same place as NAME does `default`. `starts-4` is what `otdd run` did
then, `run` what it does now for hard labels, and `run-unguided` its set `unguided`. `detail-1` and
so on hold the blur of projections back. `target-through` carries the
correction of x0_hat through the denoiser, `target-q_sample` compares z_t with noised real latents.
Windows are parts of the schedule from noise to image; `window-paper` is steps 30 to 45 of 50 of the
source. `gradient-K` is the L1 gradient of the source in place of our projection, on x0_hat at every
step, with K for beta_1 in units of rho_t; `paper` is its transport term with all its inferred
settings. `cfg-2` has classifier-free guidance of scale 2 in place of 1, as `unguided-cfg-2` has
without transport. What `SET+...` does is in `refine.py`. Seeds from 100 on chose no setting.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ablation
import torch
from ablation import Cells, digest
from refine import REFINED, refine

from otdd.distill import evaluate
from otdd.distill.baselines import BASELINES, baselines
from otdd.distill.config import PRESETS, RunConfig, SampleConfig, TrainConfig
from otdd.distill.data import ImageData, load_data
from otdd.distill.generator import Generator, load_generator
from otdd.distill.match import make_loss
from otdd.distill.relabel import Teacher, hard_steps
from otdd.distill.sample import sample
from otdd.distill.settings import from_dict
from otdd.distill.store import Store

RESULTS = Path(__file__).parent / "results" / "ablation_guidance.json"
KEY = ("data", "ipc", "variant", "seed", "arch", "epochs")


# One setting at a time; `guidance` is nested.
CHANGES: dict[str, dict[str, Any]] = {
    **{f"strength-{s}": {"guidance": {"strength": s}} for s in (0.03, 0.1, 0.3, 1.0)},
    **{f"lambda-{v}": {"guidance": {"lambda_1": v}} for v in (0.03, 0.3, 1.0)},
    **{f"target-{t}": {"guidance": {"target": t}} for t in ("z_t", "through", "q_sample")},
    "window-noisy": {"guidance": {"window": (0.0, 0.5)}},
    "window-clear": {"guidance": {"window": (0.5, 1.0)}},
    "window-paper": {"guidance": {"window": (0.08, 0.4)}},
    "sequential": {"order": "sequential"},
    **{f"metric-{m}": {"guidance": {"metric": m}} for m in ("l1", "l2", "cosine")},
    **{f"repulsion-{k}": {"guidance": {"repulsion": k}} for k in (0.0, 0.5)},
    **{f"detail-{d}": {"guidance": {"detail": d}} for d in (0.0, 0.25, 0.5, 1.0)},
    **{f"cfg-{s:g}": {"guidance_scale": s} for s in (1.0, 2.0, 4.0)},
    "starts-4": {"starts": 4},
}


def _over(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    guidance = {**base.get("guidance", {}), **change.get("guidance", {})}
    return {**base, **change, "guidance": guidance}


def _gradient(strength: float) -> dict[str, Any]:
    change = {"form": "gradient", "metric": "l1", "repulsion": 0.0, "strength": strength}
    return _over(BEFORE, {"guidance": change})


# Both from one start of the noise.
BEFORE = {"starts": 1, "guidance_scale": 1.0, "guidance": {"detail": 0.0}}
NOW = {"starts": 1}

# Settings of `sample` laid over its defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": BEFORE,
    **{name: _over(BEFORE, change) for name, change in CHANGES.items()},
    **{f"gradient-{k:g}": _gradient(k) for k in (5.0, 50.0, 500.0)},
    "now": NOW,
    **{f"now-{name}": _over(NOW, change) for name, change in CHANGES.items()},
    "run": {},
    **{f"run-{name}": CHANGES[name] for name in ("strength-0.3", "detail-1.0")},
    "run-unguided": {},
    "unguided": {"guidance_scale": 1.0},
    "unguided-cfg-2": {"guidance_scale": 2.0},
    # The transport term alone: the preset has influence and diversity too.
    "paper": {
        **PRESETS["paper"]["sample"],
        "influence": {"strength": 0.0},
        "diversity": {"strength": 0.0},
    },
}
NAMES = (*BASELINES, *VARIANTS, *REFINED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--generator", help="of `otdd fit`; by default the one shipped")
    parser.add_argument("--variants", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--arch", default="convnet")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(args.data)
    generator = load_generator(args.generator, data)
    defaults = dataclasses.asdict(SampleConfig())
    cells = Cells(args.out, KEY, {"defaults": defaults, "variants": VARIANTS})
    train = TrainConfig(losses=("ce",), archs=(args.arch,), epochs=args.epochs)
    for seed in args.seeds:
        for ipc in args.ipc:
            for name in args.variants:
                key = {"data": args.data, "ipc": ipc, "variant": name, "seed": seed}
                key |= {"arch": args.arch, "epochs": args.epochs}
                if not cells.has(**key):
                    cells.add(**key, **measure(data, generator, name, ipc, seed, train))


def measure(
    data: ImageData, generator: Generator, name: str, ipc: int, seed: int, train: TrainConfig
) -> dict[str, Any]:
    """One cell: accuracy, transport cost, seconds of sampling."""
    start_from, how = REFINED.get(name, (name, None))
    settings = from_dict(SampleConfig, VARIANTS.get(start_from, {}))
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(data.name, ipc, folder, seed=seed, sample=settings, train=train)
        store, start = Store(folder), time.process_time()
        set_name = make_set(store, data, generator, config, start_from)
        seconds = time.process_time() - start
        made = store.read_images(set_name)
    images, labels = made["images"], made["labels"]
    if how is not None:
        images = refine(how, made["latents"], labels, data, generator, f"runs/ablation/{data.name}")
    steps = hard_steps(len(images), data, config, seed)
    loss = make_loss("ce", train)
    arch = train.archs[0]
    return {
        **ablation.train(images, labels, steps, loss, data, config, arch),
        "ot_cost": round(evaluate.transport_cost(images, labels, data, generator.codec), 4),
        "sample_seconds": round(seconds, 3),
        "digest": digest(images),
    }


def make_set(
    store: Store,
    data: ImageData,
    generator: Generator,
    config: RunConfig,
    name: str,
    teachers: Sequence[Teacher] = (),
) -> str:
    """Makes the set of a variant or baseline; returns its name in the store."""
    if name in BASELINES:
        baselines(store, data, config, name, codec=generator.codec)
        return name
    set_name = "unguided" if "unguided" in name else "otg"
    sample(store, data, generator, config, set_name=set_name, teachers=teachers)
    return set_name


if __name__ == "__main__":
    main()
