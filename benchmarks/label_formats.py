"""Do compact soft labels cost accuracy? Students of one set on the labels of each format.

For every data set, number of images per class and format an `otdd run` on random real images, in
which teachers, images, augmentation and the seeds of the students are the same. Differences are
taken student by student. Rows that are in the results are not made again:

    python benchmarks/label_formats.py --data digits textures --ipc 1 5 --seeds 5
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "label_formats.json"
FORMATS: dict[str, list[str]] = {
    "fp16": [],
    "q8": ["--relabel.label-format", "q8"],
    "topk-4": ["--relabel.label-format", "topk", "--relabel.top-k", "4"],
    "topk-1": ["--relabel.label-format", "topk", "--relabel.top-k", "1"],
    "fp16, 7 epochs": ["--relabel.label-epochs", "7"],
    "q8, 14 epochs": ["--relabel.label-format", "q8", "--relabel.label-epochs", "14"],
}


def accuracies(data: str, ipc: int, seeds: int, flags: list[str]) -> dict[str, list[float]]:
    """Loss -> test accuracy of every student."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "otdd", "run", "--quiet", "--sets", "random"]
        command += ["--train.losses", "kl", "otm", "--data", data, "--ipc", str(ipc)]
        command += ["--seeds", str(seeds), "--out", f"{folder}/run", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(Path(folder, "run/metrics.json").read_text())["accuracy"]
    return {row["loss"]: row["runs"] for row in rows}


def compared(runs: list[float], whole: list[float]) -> dict[str, Any]:
    """Mean difference from float16 labels of the same students, with its standard error."""
    apart = [a - b for a, b in zip(runs, whole, strict=True)]
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    return {
        "runs": runs,
        "mean": round(statistics.fmean(runs), 2),
        "difference": round(statistics.fmean(apart), 2),
        "standard_error": round(error, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=["digits"])
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--commit", default="", help="the commit that is measured")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    results["machine"] = f"{platform.machine()} CPU, {torch.get_num_threads()} thread"
    results["torch"] = torch.__version__
    known = {(r["data"], r["ipc"], r["seeds"], r["labels"]) for r in results["rows"]}
    for data in arguments.data:
        for ipc in arguments.ipc:
            whole: dict[str, list[float]] = {}
            for name, flags in FORMATS.items():
                key = {"data": data, "ipc": ipc, "seeds": arguments.seeds, "labels": name}
                left = [n for n in FORMATS if (data, ipc, arguments.seeds, n) not in known]
                if name not in (left and ["fp16", *left]):
                    continue
                made = accuracies(data, ipc, arguments.seeds, flags)
                whole = whole or made
                if tuple(key.values()) in known:
                    continue
                rows = {loss: compared(runs, whole[loss]) for loss, runs in made.items()}
                results["rows"].append({**key, "commit": arguments.commit, **rows})
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(key, {k: (v["mean"], v["difference"]) for k, v in rows.items()}, flush=True)


if __name__ == "__main__":
    main()
