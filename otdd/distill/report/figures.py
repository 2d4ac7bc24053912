"""Figures of a report, drawn by matplotlib: each for light and for dark pages, and for print."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from otdd.distill.config import COLOURS, HEADINGS
from otdd.distill.geometry import MAX_ITER, TOL
from otdd.distill.plots import shown_name
from otdd.distill.report.gather import Entropy, Metrics, Row
from otdd.distill.report.transport import MARKS, ClassTransport

MARKERS = {"otg": "o", "unguided": "s", "random": "^", "kmeans": "D", "kmeans-real": "v"}
WIDTH = 4.4  # inches: as wide as a narrow page, so that text is not made smaller there
DPI = 200  # twice the pixels of a page
LIGHT, DARK = ("#1c1e21", "#ffffff"), ("#e6e6e6", "#1b1e24")  # ink and paper
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Picture:
    """A figure as files.

    Attributes:
        name: of its files, without suffix.
        alt: what it shows, for those who do not see it.
        light: PNG for light pages and for print.
        dark: PNG for dark pages.
        pdf: vector file for print, if asked for.
    """

    name: str
    alt: str
    light: bytes
    dark: bytes
    pdf: bytes | None


Draw = Callable[[Figure, str], None]  # (figure, colour of ink)


def picture(name: str, alt: str, height: float, draw: Draw, *, pdf: bool = False) -> Picture:
    """Draw a figure of this height in inches; the same bytes for the same content."""
    files = [_save(height, draw, paper, "png") for paper in (LIGHT, DARK)]
    vector = _save(height, draw, LIGHT, "pdf") if pdf else None
    return Picture(name, alt, files[0], files[1], vector)


def _save(height: float, draw: Draw, paper: tuple[str, str], kind: str) -> bytes:
    ink, ground = paper
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    style: Any = STYLE | dict.fromkeys(inks, ink) | dict.fromkeys(grounds, ground)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc of the user says
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(WIDTH, height))
        draw(figure, ink)
        buffer = io.BytesIO()
        no_dates = {"Software": None} if kind == "png" else {"CreationDate": None, "Producer": None}
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=no_dates)
    return _small(buffer) if kind == "png" else buffer.getvalue()


def _small(file: io.BytesIO) -> bytes:
    """The PNG with a palette of 256 colours, a third of its size."""
    out = io.BytesIO()
    with Image.open(file) as full:
        few = full.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(out, format="PNG", optimize=True, dpi=(DPI, DPI))
    return out.getvalue()


def class_title(name: str, label: int, width: int = 22) -> str:
    """Name of a class as a figure can show it: on one line, short, with letters of its font."""
    shown = shown_name(name, label)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def accuracy(rows: Sequence[Row], metrics: Metrics, *, bars: bool) -> tuple[float, Draw]:
    """Students of one architecture, a panel per loss; returns height and how to draw it.

    Bars start at 0; without them the axis is that of the results.
    """
    losses = [loss for loss in HEADINGS if any(r.loss == loss for r in rows)]
    parts = {loss: [r for r in rows if r.loss == loss] for loss in losses}
    count = sum(len(part) for part in parts.values())

    def draw(figure: Figure, ink: str) -> None:
        ratios = [len(parts[loss]) + 0.9 for loss in losses]
        panels = figure.subplots(
            len(losses), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
        )[:, 0]
        for axes, loss in zip(panels, losses, strict=True):
            _students(axes, parts[loss], ink, bars)
            axes.set_title(HEADINGS[loss], loc="left", fontweight="bold")
        limits = (0.0, 100.0) if bars else panels[-1].get_xlim()
        for axes in panels:
            for _, teacher in metrics.teachers:
                axes.axvline(teacher, color=ink, linestyle="--", linewidth=0.9)
        panels[-1].set_xlim(limits)
        panels[-1].set_xlabel("test accuracy in %")

    return 0.27 * count + 0.42 * len(losses) + 0.5, draw


def _students(axes: Axes, rows: Sequence[Row], ink: str, bars: bool) -> None:
    for place, row in enumerate(rows):
        if bars:
            axes.barh(place, row.mean, 0.74, color=_colour(row.set))
        else:
            axes.scatter([row.mean], [place], s=60, zorder=2.5, **_mark(row.set, ink))
        axes.errorbar(row.mean, place, xerr=row.std, color=ink, capsize=2.5, linewidth=1.1)
        spread = np.linspace(-0.24, 0.24, len(row.runs)) if len(row.runs) > 1 else [0.0]
        dots: dict[str, Any] = {"color": "white", "edgecolors": "black", "linewidths": 0.4}
        axes.scatter(row.runs, place + np.asarray(spread), s=7, zorder=3, **dots)
        stroke: dict[str, Any] = {"marker": "|", "color": ink, "linewidths": 1.6}
        axes.scatter([row.best_mean], [place], s=60, zorder=4, **stroke)
        where: dict[str, Any] = {
            "transform": axes.get_yaxis_transform(),
            "va": "center",
            "ha": "left",
        }
        axes.text(1.02, place, row.text, **where)
    axes.set_yticks(range(len(rows)), [row.set for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def accuracy_lines(
    found: Mapping[str, Mapping[str, Row]],
    teachers: Mapping[str, Sequence[float]],
    ipcs: Mapping[str, int],
) -> tuple[float, Draw]:
    """Accuracy over images per class, a line per set, whiskers of one standard deviation.

    Args:
        found: run -> set -> its students, of one architecture and loss.
        teachers: run -> accuracies of its teachers.
        ipcs: run -> images per class.
    """
    runs = sorted(found, key=lambda run: ipcs[run])

    def draw(figure: Figure, ink: str) -> None:
        axes = figure.subplots()
        for shift, name in enumerate(COLOURS, start=-len(COLOURS) // 2):
            some = [(ipcs[run], found[run][name]) for run in runs if name in found[run]]
            if some:
                style: dict[str, Any] = {"marker": MARKERS[name], "markersize": 5, "capsize": 2.5}
                style |= {"markeredgecolor": ink, "markeredgewidth": 0.5, "linewidth": 1.4}
                means, stds = [row.mean for _, row in some], [row.std for _, row in some]
                places = [ipc * 1.015**shift for ipc, _ in some]  # apart, so that whiskers show
                axes.errorbar(places, means, stds, color=COLOURS[name], label=name, **style)
        taught = [(ipcs[run], float(np.mean(teachers[run]))) for run in runs if teachers[run]]
        if taught:
            dashed: dict[str, Any] = {"color": ink, "linestyle": "--", "linewidth": 0.9}
            axes.plot(*zip(*taught, strict=True), **dashed)
        every = [ipcs[run] for run in runs]
        axes.set_xscale("log")
        axes.set_xticks(every, list(map(str, every)))
        axes.set_xticks([], minor=True)
        axes.grid(axis="y", color=ink, alpha=0.15)
        axes.set(xlabel="images per class", ylabel="test accuracy in %")
        figure.legend(loc="outside upper center", ncols=3, columnspacing=1)

    return 3.3, draw


def accuracy_dots(found: Mapping[str, Mapping[str, Row]]) -> tuple[float, Draw]:
    """Accuracy by run, a mark per set, whiskers of one standard deviation.

    Args:
        found: run -> set -> its students, of one architecture and loss.
    """
    names = [name for name in COLOURS if any(name in rows for rows in found.values())]
    places = np.linspace(-0.3, 0.3, len(names)) if len(names) > 1 else [0.0]

    def draw(figure: Figure, ink: str) -> None:
        axes = figure.subplots()
        for name, shift in zip(names, places, strict=True):
            some = [(k, rows[name]) for k, rows in enumerate(found.values()) if name in rows]
            at = [k + float(shift) for k, _ in some]
            means, stds = [row.mean for _, row in some], [row.std for _, row in some]
            axes.errorbar(
                means, at, xerr=stds, fmt="none", ecolor=_colour(name), capsize=2, linewidth=1
            )
            axes.scatter(means, at, s=26, zorder=3, label=name, **_mark(name, ink))
        titles = [class_title(run, k + 1).replace("class ", "run ") for k, run in enumerate(found)]
        axes.set_yticks(range(len(found)), titles, parse_math=False)  # names may hold dollars
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="x", color=ink, alpha=0.15)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("test accuracy in %")
        figure.legend(loc="outside upper center", ncols=3, handletextpad=0.2, columnspacing=1)

    return (0.16 * len(names) + 0.25) * len(found) + 1.1, draw


def costs(found: Sequence[ClassTransport], titles: Sequence[str]) -> tuple[float, Draw]:
    """Transport cost per class and set."""
    names = _names(found)

    def draw(figure: Figure, ink: str) -> None:
        axes = figure.subplots()
        for name in names:
            some = [(e.sets[name].cost, k) for k, e in enumerate(found) if name in e.sets]
            axes.scatter(
                [cost for cost, _ in some],
                [k for _, k in some],
                s=26,
                **_mark(name, ink),
                label=name,
            )
        axes.set_yticks(range(len(found)), titles, parse_math=False)  # names may hold dollars
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="y", color=ink, alpha=0.15)
        axes.set_xlim(left=0)
        axes.set_xlabel("transport cost to the real images of the class")
        figure.legend(loc="outside upper center", ncols=3, handletextpad=0.2, columnspacing=1)

    return 0.23 * len(found) + 1.1, draw


def convergence(found: Sequence[ClassTransport]) -> tuple[float, Draw]:
    """Marginal error against iterations: median over classes, and their range."""
    names = _names(found)

    def draw(figure: Figure, ink: str) -> None:
        axes = figure.subplots()
        for name in names:
            some = [e.sets[name].errors.numpy() for e in found if name in e.sets]
            errors = np.maximum(np.stack(some), 1e-16)  # what is below is rounding
            axes.fill_between(MARKS, errors.min(0), errors.max(0), color=_colour(name), alpha=0.15)
            style: dict[str, Any] = {"marker": MARKERS[name], "markersize": 4, "markevery": 4}
            axes.plot(MARKS, np.median(errors, 0), color=COLOURS[name], label=name, **style)
        axes.axhline(TOL, color=ink, linestyle="--", linewidth=0.9)
        axes.annotate(f"tolerance {TOL:g}", (1.1, TOL * 1.2), va="bottom")
        axes.set(xscale="log", yscale="log", xlim=(1, MAX_ITER))
        axes.set(xlabel="iterations", ylabel="marginal error")
        figure.legend(loc="outside upper center", ncols=3, columnspacing=1)

    return 3.2, draw


def transport_map(entry: ClassTransport, title: str) -> tuple[float, Draw]:
    """One class: a panel per set, all on the same map, with the lines of the plan."""
    names = list(entry.sets)
    rows = math.ceil(len(names) / 2)
    every = np.concatenate([entry.real.numpy(), *(s.points.numpy() for s in entry.sets.values())])
    low, high = every.min(0), every.max(0)
    # One scale for both axes, panels a little wider than high.
    middle, (width, tall) = (low + high) / 2, high - low
    half = 0.55 * max(float(tall), 0.8 * float(width), 1e-6)

    def draw(figure: Figure, ink: str) -> None:
        panels = figure.subplots(rows, 2, squeeze=False).reshape(-1)
        for axes, name in zip(panels, names, strict=False):
            _panel(axes, entry, name, ink)
            axes.set(xlim=(middle[0] - half / 0.8, middle[0] + half / 0.8))
            axes.set(ylim=(middle[1] - half, middle[1] + half), box_aspect=0.8)
        for axes in panels[len(names) :]:
            axes.axis("off")
            text = "small dots: real images\nmarks: images of the set\nlines: transport"
            axes.text(0.04, 0.9, text, va="top", linespacing=1.5)
        figure.suptitle(title, fontsize=9.5, fontweight="bold", parse_math=False)

    return 1.95 * rows + 0.3, draw


def _panel(axes: Axes, entry: ClassTransport, name: str, ink: str) -> None:
    solve, real = entry.sets[name], entry.real.numpy()
    ends = np.stack([real, solve.images.numpy()], axis=1)
    axes.add_collection(
        LineCollection(list(ends), colors=_colour(name), linewidths=0.6, alpha=0.45)
    )
    axes.scatter(real[:, 0], real[:, 1], s=4, color=ink, alpha=0.6, linewidths=0)
    axes.scatter(solve.points[:, 0], solve.points[:, 1], s=42, zorder=3, **_mark(name, ink))
    axes.set_title(f"{name}, cost {solve.cost:.4g}")
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(True)


def entropies(found: Mapping[str, Entropy], classes: int) -> tuple[float, Draw]:
    """Histograms of the entropy of soft labels, a panel per set, on one axis."""
    bins = np.linspace(0, math.log(classes), 41)

    def draw(figure: Figure, ink: str) -> None:
        panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, entropy) in zip(panels, found.items(), strict=True):
            for values, style in (
                (entropy.plain, {"color": _colour(name)}),
                (entropy.mixed, {"histtype": "step", "color": ink, "linewidth": 0.9}),
            ):
                if len(values):
                    weights = np.full(len(values), 100 / len(values))
                    axes.hist(np.clip(values.numpy(), 0, bins[-1]), bins, weights=weights, **style)
            axes.set_title(name, loc="left")
            axes.set_ylabel("%")
        panels[-1].set_xlabel(f"entropy in nats (log {classes} = {bins[-1]:.2f} at most)")
        panels[-1].set_xlim(0, bins[-1])

    return 0.95 * len(found) + 0.5, draw


def times(timings: Mapping[str, float]) -> tuple[float, Draw]:
    """Seconds of each stage, split by set."""
    stages: dict[str, list[tuple[str, float]]] = {}
    for key, seconds in timings.items():
        stage, _, name = key.partition(" ")
        stages.setdefault(stage, []).append((name, seconds))

    def draw(figure: Figure, ink: str) -> None:
        axes, ground = figure.subplots(), matplotlib.rcParams["axes.facecolor"]
        for place, parts in enumerate(stages.values()):
            left = 0.0
            for name, seconds in parts:
                style = {"edgecolor": ground, "linewidth": 0.5}
                axes.barh(place, seconds, 0.7, left, color=_colour(name, ink), **style)
                left += seconds
            axes.annotate(f" {left:.3g} s", (left, place), va="center")
        axes.set_yticks(range(len(stages)), list(stages))
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds")

    return 0.32 * len(stages) + 0.6, draw


def _names(found: Sequence[ClassTransport]) -> list[str]:
    return list(dict.fromkeys(name for entry in found for name in entry.sets))


def _colour(name: str, default: str = "#7f7f7f") -> str:
    return COLOURS.get(name, default)


def _mark(name: str, ink: str) -> dict[str, Any]:
    return {
        "marker": MARKERS.get(name, "o"),
        "color": _colour(name),
        "edgecolors": ink,
        "linewidths": 0.5,
    }
