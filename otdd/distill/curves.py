"""Training-accuracy curves of the students of a run as a picture (Figure 3 of the source paper)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from otdd.distill.config import COLOURS, TITLES

Curves = Mapping[tuple[str, str], Mapping[str, Sequence[Sequence[float]]]]


def curves(runs: Curves) -> bytes:
    """PNG with a panel for every architecture and loss, and in it a line for every set.

    A line is the mean over the students of a set and over the `window` epochs up to each, for a
    batch that CutMix mixed is harder than the next.

    Args:
        runs: (architecture, loss) -> set -> training accuracy in percent, epoch by epoch, of every
            student; those of a set are equally long.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    archs = list(dict.fromkeys(arch for arch, _ in runs))
    losses = list(dict.fromkeys(loss for _, loss in runs))
    size = (3.6 * len(losses) + 0.8, 2.8 * len(archs) + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(archs), len(losses), squeeze=False, sharey=True)
    lines = {}
    for (arch, loss), sets in runs.items():
        panel = axes[archs.index(arch)][losses.index(loss)]
        for name, rows in sets.items():
            values = np.asarray(rows)  # (students, epochs)
            epochs = np.arange(1, values.shape[1] + 1)
            colour = COLOURS.get(name, "#555555")
            (lines[name],) = panel.plot(epochs, _running(values.mean(0)), color=colour)
        panel.set_title(f"{arch}, {loss}", fontsize=10)
        panel.grid(alpha=0.25)
        panel.set_ylim(0, 102)
    for row in axes:
        row[0].set_ylabel("training accuracy, %")
    for panel in axes[-1]:
        panel.set_xlabel("epoch")
    titles = [TITLES.get(name, name) for name in lines]
    figure.legend(lines.values(), titles, loc="outside lower center", ncols=len(lines), fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def window(epochs: int) -> int:
    """Epochs that a point of a curve is the mean of: a fifteenth of all."""
    return max(1, epochs // 15)


def _running(values: np.ndarray) -> np.ndarray:
    """Mean over the window that ends at each epoch, shorter at the beginning."""
    width, sums = window(len(values)), np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
