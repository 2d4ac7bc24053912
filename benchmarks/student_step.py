"""What the transport term costs in a step of a student: timm's ResNet-18, 1000 classes, CPU.

Steps (forward, loss, backward, AdamW) with and without the term take turns, and so do the losses
alone, forward and backward to the logits. Times are CPU times of the one thread that works, so
that other processes do not count; what they do to caches and clocks does. The steps differ by
less than their spread, so the share of the term is that of the losses alone in the step without:

    python benchmarks/student_step.py --size 64 --rounds 15
    python benchmarks/student_step.py --size 224 --rounds 5
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from otdd.distill.students import import_timm
from otdd.losses import OTDistillationLoss

RESULTS = Path(__file__).parent / "results" / "student_step.json"
LOSSES = {
    "without": OTDistillationLoss(beta_2=0.0),
    "with": OTDistillationLoss(),
    "with share": OTDistillationLoss(beta_2_share=0.1),
}
LOSS_CALLS = 10  # timed together: one takes milliseconds


def clock(run: Callable[[], None], calls: int = 1) -> float:
    """Milliseconds of CPU time a call."""
    start = time.thread_time()
    for _ in range(calls):
        run()
    return 1e3 * (time.thread_time() - start) / calls


def runs(batch: int, size: int, classes: int) -> tuple[dict[str, Callable[[], None]], ...]:
    """Whole steps, and the losses alone on the same logits, by name."""
    torch.manual_seed(0)
    student = import_timm().create_model("resnet18", num_classes=classes).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, classes, (batch,))
    teacher = 2 * torch.randn(batch, classes)
    teacher[torch.arange(batch), labels] += 12
    logits = torch.randn(batch, classes, requires_grad=True)

    def step(loss: OTDistillationLoss) -> None:
        value: Tensor = loss(student(images), teacher, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    def alone(loss: OTDistillationLoss) -> None:
        logits.grad = None
        loss(logits, teacher, labels).backward()

    steps = {name: lambda loss=loss: step(loss) for name, loss in LOSSES.items()}
    return steps, {name: lambda loss=loss: alone(loss) for name, loss in LOSSES.items()}


def measure(batch: int, size: int, classes: int, rounds: int) -> dict:
    """Medians of interleaved rounds; the first is not counted."""
    steps, alone = runs(batch, size, classes)
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for kind, calls, group in (("step", 1, steps), ("loss", LOSS_CALLS, alone)):
            first = number % len(group)  # whoever follows the other kind finds cold caches
            for name in [*list(group)[first:], *list(group)[:first]]:
                taken = clock(group[name], calls)
                if number:
                    times.setdefault(f"{kind} {name}", []).append(taken)
    medians = {name: round(statistics.median(t), 3) for name, t in times.items()}
    base = medians["step without"]
    extra = {n: medians[f"loss {n}"] - medians["loss without"] for n in ("with", "with share")}
    deciles = statistics.quantiles(times["step without"], n=10)
    return {
        "batch": batch,
        "classes": classes,
        "size": size,
        "rounds": rounds,
        "median_ms": medians,
        "spread_of_step_without": round((deciles[-1] - deciles[0]) / base, 4),
        "share_of_step": {n: round(v / base, 5) for n, v in extra.items()},
        "ratio_of_steps": {
            n: round(medians[f"step {n}"] / base, 4) for n in ("with", "with share")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--commit", default="", help="the commit that is measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(arguments.batch, arguments.size, arguments.classes, arguments.rounds)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    rows = [r for r in results.get("rows", []) if r["size"] != arguments.size]
    about = {"cores": os.cpu_count(), "torch": torch.__version__, "commit": arguments.commit}
    row |= {"machine": f"{platform.machine()} CPU, 1 thread, shared with other work", **about}
    results["rows"] = sorted([*rows, row], key=lambda r: r["size"])
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
