"""Faults put into a tiny run of every stage, and what came of it: the README's table.

python benchmarks/faults.py --results benchmarks/results/faults.json   # all, half an hour
python benchmarks/faults.py --results FILE --only kill damage          # some; the others are kept
python benchmarks/faults.py --results FILE --only damage --every-way   # each file in all four ways
python benchmarks/faults.py --results FILE --readme README.md          # the table, nothing is run
"""

import argparse
import json
import platform
import tempfile
from collections import Counter
from pathlib import Path

from report import into_readme

MARKERS = "<!-- faults -->", "<!-- /faults -->"
SEED = 0
TITLES = {
    "kill": "`kill -9` at a random point",
    "interrupt": "Ctrl-C at a random point",
    "full": "disk full from a random write on (errors put in, file size limits, a small tmpfs)",
    "read-only": "read-only output (errors put in, a mount)",
    "places": "output that cannot be one (a file, too long, in the data, foreign files)",
    "locks": "second process; locks left behind",
    "damage": "a file of the run flipped, cut, emptied or deleted, and the command repeated",
    "consumed": "the same with latents, surrogate and generator, read by another run",
    "exported": "the same with an exported set, read by `otdd.load`",
    "hostile": "bombs, pipes, devices, loops, pickles, lying headers, YAML, class names",
    "fuzzed": "random settings, flags and image bytes",
}


def campaign(name: str, whole: Path, root: Path, every: bool) -> list:
    """The rows of one line of the table."""
    from distill import campaigns, hostile
    from distill.faults import contents

    files = list(contents(whole))
    # Pictures of a training on its way are for the eye; nothing reads them or makes them again.
    ours = [n for n in files if not n.startswith(("hf/", "g.safetensors.grids/"))]
    read = [n for n in ours if not n.startswith("run/")]
    if name == "kill":
        return campaigns.stops(whole, root, 20, SEED)
    if name == "interrupt":
        return campaigns.stops(whole, root, 8, SEED + 1, "interrupt")
    if name == "full":
        rows = campaigns.full_disks(whole, root, 8, SEED)
        rows += campaigns.file_limits(whole, root, [1000, 20_000])
        return rows + _mounted(lambda: campaigns.small_disks(whole, root, 4))
    if name == "read-only":
        rows = campaigns.read_only(whole, root, real=False)
        return rows + _mounted(lambda: campaigns.read_only(whole, root, real=True))
    if name == "places":
        return campaigns.places(whole, root)
    if name == "locks":
        return campaigns.second_runs(whole, root)
    if name == "damage":
        return _in_turn(lambda n, w: campaigns.damage(whole, root, [n], w), ours, every)
    if name == "consumed":
        return _in_turn(lambda n, w: campaigns.consumed(whole, root, [n], w), read, every)
    if name == "exported":
        return campaigns.loaded(whole, root, [n[3:] for n in files if n.startswith("hf/")])
    if name == "hostile":
        parts = ("bad_images", "class_names", "strange_folders", "bad_yaml")
        parts += ("bad_safetensors", "bad_pickles")
        return [row for part in parts for row in getattr(hostile, part)(_made(root / part))]
    fuzzed = hostile.fuzzed_settings(_made(root / "settings"), 300)
    fuzzed += hostile.fuzzed_flags(_made(root / "flags"), 300)
    return fuzzed + hostile.fuzzed_images(_made(root / "images"), 1000, SEED)


def _in_turn(rows, names: list[str], every: bool) -> list:
    """Each file in all ways, or in one, the ways taking turns."""
    from distill.campaigns import WAYS

    ways = [WAYS if every else (WAYS[k % len(WAYS)],) for k in range(len(names))]
    return [row for n, w in zip(names, ways, strict=True) for row in rows(n, w)]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _mounted(rows) -> list:
    try:
        return rows()
    except OSError as error:
        print(f"not mounted here: {error}")
        return []


def measure(name: str, every: bool = False) -> dict:
    """Counts of one campaign over a run of its own."""
    from distill.faults import finished

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = campaign(name, finished(root / "whole"), root / "tried", every)
    counts = Counter((row.done, row.outcome) for row in rows)
    tries = [{"done": d, "outcome": o, "times": n} for (d, o), n in sorted(counts.items())]
    faults = [row._asdict() for row in rows if row.fault]
    return {"times": len(rows), "tries": tries, "faults": faults}


def table(results: dict) -> str:
    """One line per campaign: what was done, how often, what happened."""
    lines = ["| what was done | times | what happened |", "| --- | --- | --- |"]
    for name, title in TITLES.items():
        if name in results["campaigns"]:
            found = results["campaigns"][name]
            ends = Counter()
            for row in found["tries"]:
                ends[row["outcome"]] += row["times"]
            happened = "; ".join(f"{n} {what}" for what, n in ends.most_common())
            lines.append(f"| {title} | {found['times']} | {happened} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(TITLES))
    parser.add_argument("--every-way", action="store_true")
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    if not arguments.readme:
        import sys

        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        for name in arguments.only or TITLES:
            found = measure(name, arguments.every_way)
            kept = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
            kept |= {"python": platform.python_version(), "seed": SEED}
            kept["campaigns"] = {**kept.get("campaigns", {}), name: found}
            arguments.results.write_text(json.dumps(kept, indent=2) + "\n")
            print(name, found["times"], "tries,", len(found["faults"]), "faults", flush=True)
    results = json.loads(arguments.results.read_text())
    print(table(results))
    if arguments.readme:
        into_readme(arguments.readme, table(results), MARKERS)
