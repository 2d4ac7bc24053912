"""Tables and figures of the ablations, and of the formats of labels, from their result files.

python benchmarks/ablation_report.py            # tables, printed
python benchmarks/ablation_report.py --write    # and put between the markers of the pages
python benchmarks/ablation_report.py --plots    # PNG files into benchmarks/results

Differences are paired by seed; behind them stand the half width of their 95 % t interval and, where
it is not that of the heading, the number of seeds. None is corrected for the number of comparisons.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ablation import paired
from report import into_readme

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ALL, FRESH = range(10**9), range(100, 10**9)  # seeds; the latter chose no setting
CHECKED = ("no-otm", "full", "beta_2-0.8")  # what the sweep found best, on fresh seeds
DETAIL = ("run-no-otg", "full", "no-otg", "random", "kmeans", "hard-run", "hard-run-no-otg")
TODAY = ("run-no-otg", "random", "kmeans", "hard-run", "hard-run-no-otg")
BEFORE = ("run-before", "hard-run-before")
ARMS = {
    "full": "full",
    "no-otg": "without transport in sampling",
    "no-lia": "one teacher at every IPC",
    "all-teachers": "four teachers at every IPC",
    "no-otm": "without transport of logits",
    "hard-otg": "hard labels",
    "hard-no-otg": "hard labels, without transport in sampling",
}
Rows = list[dict[str, Any]]
Runs = dict[int, float]


def cells(name: str) -> Rows:
    """Those of a result file."""
    return json.loads((RESULTS / f"ablation_{name}.json").read_text())["cells"]


def runs(rows: Rows, measure: str = "accuracy", **key: Any) -> Runs:
    """Seed -> accuracy of the cells that this names."""
    return {r["seed"]: r[measure] for r in rows if all(r[k] == v for k, v in key.items())}


def value(found: Runs) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(found.values()):.1f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found.values()):.1f}{spread}" if found else "-"


def difference(these: Runs, others: Runs, usual: int | None = None) -> str:
    """Mean difference ± half width of its interval."""
    d = paired(these, others)
    if d["n"] < 2:
        return "-"
    count = "" if d["n"] == usual else f" ({d['n']})"
    half = f" ± {(d['high'] - d['low']) / 2:.1f}" if d["n"] > 2 else ""  # of two it says nothing
    return f"{d['mean']:+.1f}{half}{count}"


def lines(head: list[str], body: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def groups(rows: Rows, *names: str) -> list[dict[str, Any]]:
    """The combinations of these parts of the key that there are, in order."""
    found = {tuple(row[name] for name in names): None for row in rows}
    return [dict(zip(names, values, strict=True)) for values in sorted(found)]


def labels_table(
    rows: Rows,
    arms: Iterable[str],
    base: Callable[[str], str],
    top: str = "full",
    measure: str = "accuracy",
) -> str:
    """Accuracy of the arm `top`, then a line per arm: its difference from its base."""
    columns = groups(rows, "data", "arch", "epochs", "ipc")
    sizes = [len(runs(rows, arm=top, **c)) for c in columns]
    pairs = list(zip(columns, sizes, strict=True))
    head = ["arm", *(f"{c['data']}, {c['arch']}, IPC {c['ipc']}, n={n}" for c, n in pairs)]
    body = [[f"`{top}`", *(value(runs(rows, measure, arm=top, **c)) for c in columns)]]
    for arm in arms:
        line = []
        for c, n in pairs:
            if arm == "no-lia" and c["ipc"] < 10:
                line.append("the same")
                continue
            these, others = (runs(rows, measure, arm=a, **c) for a in (arm, base(arm)))
            line.append(difference(these, others, n))
        body.append([f"`{arm}`", *line])
    return lines(head, body)


def arms_table(labels: Rows) -> str:
    """The source's ablation, of all rows of its file."""
    rows = _of_arms(labels)
    arms = [arm for arm in list(ARMS)[1:] if any(row["arm"] == arm for row in rows)]
    return labels_table(rows, arms, lambda arm: "hard-otg" if arm == "hard-no-otg" else "full")


def detail_table(labels: Rows, seeds: range = range(100), measure: str = "accuracy") -> str:
    """What `otdd run` sampled with `detail`, until it left out what chance keeps, and before."""
    key = ("data", "arch", "epochs", "ipc", "seed")  # sets of other seeds cannot be compared
    rows = [r for r in labels if r["seed"] in seeds and measure in r]
    there = [tuple(c.values()) for c in groups([r for r in rows if r["arm"] == "run"], *key)]
    rows = [r for r in rows if tuple(r[k] for k in key) in there]
    arms = [arm for arm in DETAIL if any(r["arm"] == arm for r in rows)]
    return labels_table(rows, arms, _base_run, "run", measure)


def today_table(rows: Rows, measure: str = "accuracy") -> str:
    """What `otdd run` samples, beside other sets and hard labels."""
    rows = [r for r in rows if measure in r]
    return labels_table(rows, TODAY, _base_run, "run", measure)


def change_table(rows: Rows, measure: str = "accuracy") -> str:
    """What `otdd run` sampled after a change, `run`, and before it."""
    rows, key = [r for r in rows if measure in r], ("data", "arch", "epochs", "ipc")
    there = groups([r for r in rows if r["arm"] == "run-before"], *key)
    rows = [r for r in rows if {k: r[k] for k in key} in there]
    return labels_table(rows, BEFORE, _base_run, "run", measure)


def _base_run(arm: str) -> str:
    return "hard-run" if arm.startswith("hard-run-") else "run"


def pages(labels: Rows, chance: Rows, today: Rows) -> dict[str, tuple[str, str]]:
    """Name of a pair of markers -> the page that has them, and the table between them."""
    readme, page, seen = "README.md", "docs/ablations.md", "train_accuracy"
    return {
        "ablation": (readme, arms_table(labels)),
        "today": (readme, today_table(today)),
        "today, training images": (page, today_table(today, seen)),
        "contrast": (page, change_table(today)),
        "contrast, training images": (page, change_table(today, seen)),
        "chance": (page, change_table(chance)),
        "chance, training images": (page, change_table(chance, seen)),
        "detail": (page, detail_table(labels)),
        "detail, training images": (page, detail_table(labels, ALL, seen)),
        "detail, fresh seeds": (page, detail_table(labels, FRESH)),
    }


def formats_table(rows: Rows) -> str:
    """Accuracy on whole labels, then a line per format: its difference from them."""
    columns = groups(rows, "data", "ipc", "loss", "arch", "epochs")
    whole = [runs(rows, labels="fp16", **c) for c in columns]
    head = ["labels", *(f"{c['data']}, IPC {c['ipc']}, `{c['loss']}`" for c in columns)]
    body = [["`fp16`", *(f"{value(found)}, n={len(found)}" for found in whole)]]
    for name in dict.fromkeys(row["labels"] for row in rows if row["labels"] != "fp16"):
        these = [runs(rows, labels=name, **c) for c in columns]
        line = [difference(a, b, len(b)) for a, b in zip(these, whole, strict=True)]
        body.append([f"`{name}`", *line])
    return lines(head, body)


def guidance_table(rows: Rows, seeds: range) -> str:
    """A line per variant: accuracy, and its difference from its base on the same seeds.

    The base of `now-...` and `run...` is `now`, that of all others `default`.
    """
    rows = [row for row in rows if row["seed"] in seeds]
    columns = groups(rows, "data", "arch", "epochs", "ipc")
    head = ["variant"]
    for c in columns:
        head += [f"{c['data']}, IPC {c['ipc']}", "to its base"]
    body = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        line, base = [f"`{name}`"], "now" if name.startswith(("now", "run")) else "default"
        for c in columns:
            these, others = (runs(rows, variant=v, **c) for v in (name, base))
            line += [value(these), "" if name == base else difference(these, others, len(others))]
        body.append(line)
    return lines(head, body)


def speed(rows: Rows) -> str:
    """Images per second of sampling (CPU time), joint against sequential."""
    body = []
    for c in groups(rows, "data", "ipc"):
        times = {}
        for name in ("default", "sequential"):
            own = [r for r in rows if r["variant"] == name and r["sample_seconds"]]
            own = [r["sample_seconds"] for r in own if (r["data"], r["ipc"]) == tuple(c.values())]
            times[name] = statistics.median(own) if own else math.nan
        if not math.isnan(sum(times.values())):
            ratio = times["sequential"] / times["default"]
            text = [f"{times[name]:.2f} s" for name in ("default", "sequential")]
            body.append([c["data"], str(c["ipc"]), *text, f"{ratio:.1f}x"])
    return lines(["data", "IPC", "joint", "sequential", "ratio"], body)


def curve(rows: Rows, data: str, points: dict[float, str], name: str) -> dict[int, list[tuple]]:
    """IPC -> (x, mean, half width of the 95 % interval of the mean) of the variants at x."""
    from scipy.stats import t

    found: dict[int, list[tuple]] = {}
    for x, variant in sorted(points.items()):
        for ipc in sorted({row["ipc"] for row in rows}):
            got = list(runs(rows, **{name: variant}, data=data, ipc=ipc).values())
            if len(got) > 1:
                half = t.ppf(0.975, len(got) - 1) * statistics.stdev(got) / math.sqrt(len(got))
                found.setdefault(ipc, []).append((x, statistics.fmean(got), half))
    return found


Panel = tuple[str, str, dict[int, list[tuple]]]  # title, scale of the axis, curves


def curves_before(guidance: Rows, labels: Rows) -> list[Panel]:
    """Digits against beta_1 and lambda_1, from `default`, and against beta_2 of the labels."""
    labels = [r for r in labels if r["arch"] == "convnet" and r["seed"] < 100]
    weights = {v: f"beta_2-{v:g}" for v in (0.8, 8, 80)} | {0.08: "full", 0.008: "no-otm"}
    beta_2 = curve(labels, "digits", weights, "arm")
    return [*_guided(guidance, "digits"), ("beta_2, soft labels (leftmost: 0)", "log", beta_2)]


def curves_now(guidance: Rows) -> list[Panel]:
    """Textures against beta_1, lambda_1, detail and the classifier-free guidance, from `now`."""
    details = {v: f"now-detail-{v}" for v in (0.0, 0.25, 1.0)} | {0.5: "now"}
    scales = {1: "now-cfg-1", 2: "now", 4: "now-cfg-4"}
    return [
        *_guided(guidance, "textures", "now"),
        ("detail", "linear", curve(guidance, "textures", details, "variant")),
        ("classifier-free guidance", "linear", curve(guidance, "textures", scales, "variant")),
    ]


def _guided(rows: Rows, data: str, base: str = "default") -> list[Panel]:
    prefix = "" if base == "default" else f"{base}-"
    strength = {s: f"{prefix}strength-{s}" for s in (0.03, 0.1, 0.3, 1.0)} | {0.7: base}
    widths = {v: f"{prefix}lambda-{v}" for v in (0.03, 0.3, 1.0)} | {0.1: base}
    return [
        ("strength (beta_1), hard labels", "log", curve(rows, data, strength, "variant")),
        ("lambda_1, hard labels", "log", curve(rows, data, widths, "variant")),
    ]


def plot_curves(panels: list[Panel], data: str, path: Path) -> None:
    """Accuracy with 95 % intervals, a panel for each setting."""
    figure, axes = _figure(len(panels), 3.4)
    for axis, (title, scale, found) in zip(axes, panels, strict=True):
        for ipc, points in found.items():
            x, mean, half = zip(*points, strict=True)
            axis.errorbar(x, mean, half, marker="o", ms=3, lw=1.2, capsize=2, label=f"IPC {ipc}")
        axis.set(xscale=scale, xlabel=title)
        axis.grid(alpha=0.3, lw=0.5)
    axes[0].set_ylabel(f"test accuracy on {data}, %")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def plot_arms(labels: Rows, path: Path) -> None:
    """Differences of the arms from `full`, with 95 % intervals."""
    rows = [row for row in labels if row["arm"] in ARMS]
    arms = [arm for arm in list(ARMS)[1:] if any(row["arm"] == arm for row in rows)]
    columns = groups(rows, "data", "arch")
    figure, axes = _figure(len(columns), 3.6, 3)
    for axis, c in zip(axes, columns, strict=True):
        own = [r for r in rows if (r["data"], r["arch"]) == tuple(c.values())]
        sizes = sorted({row["ipc"] for row in own})
        for shift, ipc in enumerate(sizes):
            full = runs(own, arm="full", ipc=ipc)
            for place, arm in enumerate(arms):
                d = paired(runs(own, arm=arm, ipc=ipc), full)
                if d["n"] < 3:  # of two an interval says nothing
                    continue
                y = place + (shift - (len(sizes) - 1) / 2) * 0.22
                label = f"IPC {ipc}" if arm == "no-otm" else None
                axis.plot([d["low"], d["high"]], [y, y], color=f"C{shift}", lw=1.5)
                axis.plot(d["mean"], y, "o", ms=4, color=f"C{shift}", label=label)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=f"{c['data']}, {c['arch']}", xlabel="points against full")
        axis.set_yticks(range(len(arms)), [ARMS[arm] for arm in arms], fontsize=8)
        axis.grid(alpha=0.3, lw=0.5)
        axis.legend(fontsize=8)
        axis.set_ylim(len(arms) - 0.5, -0.5)
    figure.savefig(path, dpi=100)


def _figure(count: int, height: float, across: int = 4) -> tuple[Any, Any]:
    """A row of axes, or rows of at most `across`."""
    from matplotlib.figure import Figure

    rows, across = math.ceil(count / across), min(count, across)
    size = {"figsize": (4.2 * across + 1.2 * (count == 1), height * rows), "layout": "constrained"}
    figure = Figure(**size)
    axes = figure.subplots(rows, across, sharey="row", squeeze=False).flatten()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="tables into the pages that show them")
    parser.add_argument("--plots", action="store_true")
    args = parser.parse_args()
    labels, guidance, chance, today = map(cells, ("labels", "guidance", "chance", "today"))
    chosen = [row for row in labels if row["seed"] < 100]
    swept = [row for row in chosen if _swept(row) and "run" not in row["arm"]]
    shown = pages(labels, chance, today)
    for name, (_, text) in shown.items():
        print(f"{name}\n{text}", end="\n\n")
    print(labels_table(swept, _arms(swept, "no-otm"), _base, "no-otm"), end="\n\n")
    real = [row for row in labels if row["arm"].startswith("random")]
    print(labels_table(real, _arms(real, "random"), lambda arm: "random", "random"), end="\n\n")
    fresh = [r for r in labels if r["seed"] in FRESH and r["arm"] in CHECKED]
    text = labels_table(fresh, _arms(fresh, "no-otm"), lambda arm: "no-otm", "no-otm")
    print("fresh seeds\n" + text, end="\n\n")
    formats = json.loads((RESULTS / "label_formats.json").read_text())["cells"]
    print(formats_table(formats), end="\n\n")
    print(guidance_table(guidance, range(100)), end="\n\n")
    print("fresh seeds\n" + guidance_table(guidance, FRESH), end="\n\n")
    print(speed(guidance))
    if args.write:
        for name, (page, text) in shown.items():
            into_readme(ROOT / page, text, (f"<!-- {name} -->", f"<!-- /{name} -->"))
    if args.plots:
        plot_arms(_of_arms(labels), RESULTS / "ablation_labels.png")
        guidance = [row for row in guidance if row["seed"] < 100]
        plot_curves(curves_before(guidance, labels), "digits", RESULTS / "ablation_curves.png")
        plot_curves(curves_now(guidance), "textures", RESULTS / "ablation_curves_now.png")


def _of_arms(rows: Rows) -> Rows:
    """The rows of the source's ablation: not those of the sweep, of fresh seeds or of scenes."""
    rows = [r for r in rows if r["arm"] in ARMS and r["seed"] < 100 and not _swept(r)]
    return [r for r in rows if not r["data"].startswith("scenes")]


def _swept(row: dict[str, Any]) -> bool:
    return (row["data"], row["arch"]) == ("digits", "convnet")


def _arms(rows: Rows, but: str) -> list[str]:
    return [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != but]


def _base(arm: str) -> str:
    """What an arm of the sweep is compared with: no transport, at the same batch."""
    return f"no-otm-{arm}" if arm.startswith("batch") else "no-otm"


if __name__ == "__main__":
    main()
