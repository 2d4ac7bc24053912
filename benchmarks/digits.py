"""Digits distilled with the settings of `otdd run`, and the README's table of them.

python benchmarks/digits.py                      # `otdd run --data digits --ipc K`, K = 1, 5, 10
python benchmarks/digits.py --readme README.md   # the table between its markers; nothing is run
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import into_readme

from otdd.distill.config import SETS

MARKERS = "<!-- digits -->", "<!-- /digits -->"
RESULTS = Path(__file__).parent / "results"
IPCS = (1, 5, 10)
LOSSES = {"hard": "ce", "soft": "otm"}


def measure(ipc: int) -> dict[str, Any]:
    """Content of `metrics.json` of a run, with the command, the commit and the machine."""
    command = ["otdd", "run", "--data", "digits", "--ipc", str(ipc)]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"digits-ipc{ipc}"
        python = [sys.executable, "-m", *command, "--out", str(out), "--quiet"]
        subprocess.run(python, check=True, stdout=subprocess.DEVNULL)
        found = json.loads((out / "metrics.json").read_text())
    found["config"]["out"] = f"runs/digits-ipc{ipc}"
    about = {
        "command": " ".join([*command, "--out", found["config"]["out"]]),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()} CPU",
    }
    return about | found


def table(results: dict[int, dict[str, Any]]) -> str:
    """One line per set; accuracy on hard labels, transport cost, accuracy on soft labels."""
    head = ["set", *(f"IPC {ipc} {labels}" for ipc in results for labels in LOSSES)]
    lines = [head, ["---"] * len(head)]
    for name in SETS:
        line = [f"`{name}`"]
        for found in results.values():
            for labels, loss in LOSSES.items():
                rows = [r for r in found["accuracy"] if (r["set"], r["loss"]) == (name, loss)]
                cost = f" [{found['ot_cost'][name]:.1f}]" if labels == "hard" else ""
                line += [f"{row['mean']:.1f} ± {row['std']:.1f}{cost}" for row in rows]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results() -> dict[int, dict[str, Any]]:
    """The committed results, by images per class."""
    return {k: json.loads((RESULTS / f"digits_ipc{k}.json").read_text()) for k in IPCS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    for number in () if arguments.readme else IPCS:
        file = RESULTS / f"digits_ipc{number}.json"
        file.write_text(json.dumps(measure(number), indent=2) + "\n")
        print(file, flush=True)
    print(table(results()))
    if arguments.readme:
        into_readme(arguments.readme, table(results()), MARKERS)
