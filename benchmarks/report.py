"""The README's table and the plot of times against sizes, from a result file of `test_cpu.py`.

python benchmarks/report.py benchmarks/results/cpu.json                  # the table, printed
python benchmarks/report.py benchmarks/results/cpu.json --readme README.md \
        --plot benchmarks/results/cpu_scaling.png
"""

import argparse
import json
import re
from pathlib import Path

MARKERS = "<!-- cpu.json -->", "<!-- /cpu.json -->"
CURVES = {  # of the plot: name in the results -> label and colour
    "otdd": ("otdd", "#c0392b"),
    "floor": ("floor of this machine", "black"),
    "OTT-JAX": ("OTT-JAX", "#2471a3"),
    "torch.compile, envelope": ("torch.compile", "#8e44ad"),
    "torch loop": ("torch loop", "#7f8c8d"),
    "POT log, detach": ("POT, log domain", "#27ae60"),
    "POT exp, detach": ("POT, exp domain", "#a9d18e"),
    "geomloss SamplesLoss": ("GeomLoss", "#e67e22"),
}


def milliseconds(ms: float) -> str:
    if ms < 1:
        return f"{1e3 * ms:.0f} us"
    return f"{ms:.1f} ms" if ms < 100 else f"{ms / 1e3:.2f} s"


def cell(row: dict | None) -> list[str]:
    """Time, lead over the fastest safe peer and over POT's exp domain, share of the floor."""
    if row is None or "median_ms" not in row["contenders"]["otdd"]:
        return ["-"] * 4
    lead, exp = row["ratio_to_it"], row["ratio_to_pot_exp"]
    return [
        milliseconds(row["contenders"]["otdd"]["median_ms"]),
        f"{lead:.1f}x {row['fastest_safe_peer']}" if lead else "no peer",
        f"{exp:.1f}x" if exp else "-",
        f"{100 * row['of_floor']:.0f} %",
    ]


def table(results: dict, dtype: str = "float32") -> str:
    """One line per case and direction; four columns per number of threads."""
    rows = [row for row in results["rows"] if row["dtype"] == dtype]
    rows = [row for row in rows if not row["case"].startswith("scaling")]
    threads = sorted({row["threads"] for row in rows})
    found = {(row["case"], row["direction"], row["threads"]): row for row in rows}
    head = ["case"]
    for t in threads:
        head += [f"{t} thread{'s' * (t > 1)}", "fastest safe peer", "POT exp", "of floor"]
    lines = [head, ["---"] * len(head)]
    for case, direction in dict.fromkeys(key[:2] for key in found):
        line = [f"{case}, {direction}"]
        for t in threads:
            line += cell(found.get((case, direction, t)))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def into_readme(readme: Path, text: str, markers: tuple[str, str] = MARKERS) -> None:
    """Replaces what stands between the two markers."""
    between = re.compile(f"({markers[0]}\n).*?({markers[1]})", re.DOTALL)
    content, count = between.subn(lambda m: f"{m[1]}{text}\n{m[2]}", readme.read_text())
    if count != 1:
        raise SystemExit(f"{readme}: has no single pair of {markers[0]} and {markers[1]}")
    readme.write_text(content)


def curves(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """(N, ns per element and iteration) of each contender, and of the floor."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}
    for row in rows:
        n = int(row["case"].split("-")[1])
        unit = 1e6 / (row["iterations"] * n * n)
        found["floor"].append((n, row["floor_ms"] * unit))
        for name, contender in row["contenders"].items():
            if name in found and "median_ms" in contender:
                found[name].append((n, contender["median_ms"] * unit))
    return {name: points for name, points in found.items() if points}


def plot(results: dict, path: Path) -> None:
    """Time per element and iteration against N = M, a panel per number of threads."""
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["case"].startswith("scaling")]
    threads = sorted({row["threads"] for row in rows})
    size = {"figsize": (4.4 * len(threads), 4), "layout": "constrained"}
    figure = Figure(**size)
    axes = figure.subplots(1, len(threads), sharey=True, squeeze=False)
    for axis, t in zip(axes[0], threads, strict=True):
        for name, points in curves([row for row in rows if row["threads"] == t]).items():
            label, colour = CURVES[name]
            style = {"ls": ":"} if name == "floor" else {"marker": "o", "ms": 3}
            width = 2.2 if name in ("otdd", "floor") else 1.1
            axis.plot(*zip(*points, strict=True), label=label, color=colour, lw=width, **style)
        axis.set(yscale="log", xlabel="N = M", title=f"{t} thread{'s' * (t > 1)}")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3, lw=0.5)
    axes[0][0].set_ylabel("ns per element and iteration")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--readme", type=Path, help=f"file to write into, between {MARKERS}")
    parser.add_argument("--plot", type=Path, help="PNG or SVG file to write")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    text = table(results, args.dtype)
    if args.readme:
        into_readme(args.readme, text)
    else:
        print(text)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
