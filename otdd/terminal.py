"""What a person sees in the terminal: progress bars and the table at the end."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from otdd.distill.config import HEADINGS
from otdd.distill.words import averaged, counted
from otdd.flags import Log
from otdd.joblog import JsonLog

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

NARROW = 60  # columns of a terminal that has no room for bars beside names and counts


def shown(log: Log, quiet: bool, units: dict[str, str] | None = None) -> Bars | Pace | JsonLog:
    """What tells of progress; a context manager, called as progress(text, done, total).

    Args:
        log: `--log`.
        quiet: `--quiet`, which is stronger.
        units: of long tasks that are counted in lines, by name, rather than shown as bars.
    """
    log = "quiet" if quiet else log
    if log == "json":
        return JsonLog()
    if units is not None and log != "bars":
        return Pace(units, log == "quiet")
    return Bars(log)


class Bars:
    """Progress bars with the time left on a terminal; elsewhere a line for each finished task.

    Call it as progress(text, done, total); one bar per text, which becomes a line when it is full.
    """

    def __init__(self, log: Log = "auto") -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        console = Console(stderr=True, force_terminal=True if log == "bars" else None)
        bars = log == "bars" or (log == "auto" and console.is_terminal)
        self._quiet, self._shown = log == "quiet", bars and not console.is_dumb_terminal
        text = Column(no_wrap=True, overflow="ellipsis", ratio=3)
        bar = BarColumn(bar_width=None, table_column=Column(ratio=4))
        self._bars = Progress(
            TextColumn("{task.description}", table_column=text),
            *([bar] if console.width >= NARROW else []),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=console,
            disable=not self._shown,
            expand=True,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._since: dict[str, float] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, text: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` steps are finished; a note has no room here."""
        if self._quiet:
            return
        self._since.setdefault(text, time.perf_counter())
        if not self._shown:
            if done >= total > 1:
                spent = time.perf_counter() - self._since.pop(text)
                print(f"done  {text}  {spent:.1f} s", file=sys.stderr, flush=True)
            return
        if text not in self._tasks:
            self._tasks[text] = self._bars.add_task(text, total=total)
        self._bars.update(self._tasks[text], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(text))
            spent = time.perf_counter() - self._since.pop(text)
            self._bars.console.print(f"[green]done[/]  {text}  [dim]{spent:.1f} s[/]")


class Pace:
    """Lines that say how far a long task is, how fast, and how long it will still take.

    Call it as progress(text, done, total); a line at most every `interval` seconds and at the end,
    with a note such as a loss.
    """

    def __init__(self, units: dict[str, str], quiet: bool = False, interval: float = 10.0) -> None:
        self._units, self._quiet, self._interval = units, quiet, interval
        self._since: dict[str, tuple[float, int]] = {}
        self._last = 0.0

    def __enter__(self) -> Pace:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, text: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are finished."""
        now = time.perf_counter()
        if text not in self._since:
            self._since[text] = (now, done)  # what an earlier command did counts for nothing
        elif now - self._last < self._interval and done < total:
            return
        self._last = now
        if not self._quiet and (done or total > 1):
            line = self._line(text, done, total, now) + f", {note}" * bool(note)
            print(line, file=sys.stderr, flush=True)

    def _line(self, text: str, done: int, total: int, now: float) -> str:
        start, before = self._since[text]
        unit = self._units.get(text, "steps")
        line = f"{text}: {done} of {total} {unit} ({100 * done / total:.1f} %)"
        if done > before and now > start:
            rate = (done - before) / (now - start)
            line += f", {rate:.1f} {unit}/s"
            if done < total:
                line += f", {_duration((total - done) / rate)} left"
        return line


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.0f} s"


def print_metrics(metrics: dict[str, Any], out: str) -> None:
    """Print the accuracies of a run as a table, and where its files are."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    # Captured: when its reader goes away, rich would end the program as failed.
    with console.capture() as text:
        _tell_metrics(console, metrics)
    sys.stdout.write(f"{text.get()}written to {out}\n")


def _tell_metrics(console: Console, metrics: dict[str, Any]) -> None:
    from rich.table import Table

    from otdd.distill.inputs.spec import published

    rows, costs, config = metrics["accuracy"], metrics["ot_cost"], metrics["config"]
    archs = list(dict.fromkeys(row["arch"] for row in rows)) or [""]
    losses = [loss for loss in HEADINGS if any(row["loss"] == loss for row in rows)]
    sets = list(dict.fromkeys([*(row["set"] for row in rows), *costs]))
    spread = "±" if "utf" in console.encoding else "+-"
    students = counted(max((len(row["runs"]) for row in rows), default=0), "student")
    for arch in archs:
        title = f"{published(config['data'])}, {counted(config['ipc'], 'image')} per class"
        if rows:
            title += f": test accuracy of {arch} in %, mean {spread} std of {students}"
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        table = Table()
        table.add_column("set")
        for loss in losses:
            table.add_column(HEADINGS[loss], justify="right")
        table.add_column("OT cost", justify="right")
        for name in sets:
            cells = [_cell(rows, name, arch, loss).replace("±", spread) for loss in losses]
            cost = f"{costs[name]:.4g}" if name in costs else ""
            table.add_row(name, *cells, cost)
        console.print(table)
        found = [c for c in metrics["comparisons"] if c["arch"] == arch]
        if any(c["seeds"] >= 2 for c in found):
            what = "points, 95 % interval, p (paired t test by seed, Holm)"
            title = f"{found[0]['set']} less another set: {what}"
            console.print(title, markup=False, highlight=False, soft_wrap=True)
            console.print(_compared(found, losses))
        elif found:
            console.print(f"{arch}: to compare sets takes two seeds that they share")


def _compared(found: list[dict[str, Any]], losses: list[str]) -> Table:
    """The first set less each other one, with the interval and p of each difference."""
    from rich.table import Table

    table = Table()
    table.add_column("against")
    for loss in losses:
        table.add_column(HEADINGS[loss], justify="right")
    for name in dict.fromkeys(c["against"] for c in found):
        cells = {c["loss"]: _difference(c) for c in found if c["against"] == name}
        table.add_row(name, *(cells.get(loss, "") for loss in losses))
    return table


def _difference(comparison: dict[str, Any]) -> str:
    if comparison["seeds"] < 2:
        return str(comparison["note"])
    text = f"{comparison['difference']:+.1f}"
    if comparison["ci95"] is None:
        return f"{text}\n{comparison['note']}"
    low, high = comparison["ci95"]
    return f"{text} [{low:+.1f}, {high:+.1f}]\np {comparison['p_holm']:.2g}"


def _cell(rows: list[dict[str, Any]], name: str, arch: str, loss: str) -> str:
    for row in rows:
        if (row["set"], row["arch"], row["loss"]) == (name, arch, loss):
            return averaged(row["mean"], row["std"], len(row["runs"]))
    return ""
