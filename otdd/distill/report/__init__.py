"""`report`: a run as one HTML page that needs nothing else, with its figures as files.

From the folder to what it holds (`gather`), transport class by class (`transport`), figures
(`figures`) and the page (`page`). `report_several` puts runs of the same data beside each other
(`several`).
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from otdd.distill.config import ConfigError, require
from otdd.distill.store import TEMP, Store, StoreError
from otdd.distill.sums import unwritable

if TYPE_CHECKING:
    from otdd.distill.report.figures import Picture
    from otdd.distill.report.gather import Found
    from otdd.distill.report.transport import ClassTransport, Transports

PAGE = "index.html"
_OURS = re.compile(
    r"index\.html|grid\.png|(accuracy|accuracy-near|map|runs)-\d{5}\.(png|pdf)"
    r"|(cost|convergence|entropy|time)\.(png|pdf)"
)

Progress = Callable[[str, int, int], None]


def report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    classes: int = 20,
    pdf: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a report of the folder of a run, whole or not at all.

    Where the run is not finished, the page says what is missing and which command makes it. The
    same folder gives the same bytes.

    Args:
        folder: of a run.
        out: a folder for the page (`index.html`) and its figures as PNG files, by default
            `report` in the folder of the run; or a file that ends in `.html`, for the page alone.
            An earlier report is replaced, anything else is left alone.
        classes: most classes whose images, costs and maps are shown, the first ones.
        pdf: figures as PDF files too.
        progress: called as progress(text, done, total).

    Returns:
        The page.

    Raises:
        StoreError: `folder` is of no run, or damaged; or `out` is not a report, or not writable.
    """
    require(classes >= 1, "classes", classes, "an integer >= 1")
    target = Path(folder) / "report" if out is None else Path(out)
    single = target.suffix.lower() == ".html"
    require(not (single and pdf), "pdf", pdf, "off, for a single page; or a folder as out")
    _check_target(target, single)
    importlib.import_module("matplotlib")  # before any work
    from otdd.distill.report.gather import gather

    found = gather(folder)
    shown = range(min(classes, len(found.classes)))
    transport = _transport(found, shown, progress)
    pictures = _pictures(found, transport.classes, pdf)
    from otdd.distill.report.page import page

    named = {p.name: p for p in pictures}
    text = page(found, named, transport, shown)
    more = {}
    if found.sets and not single:
        from otdd.distill import plots

        more["grid.png"] = plots.grid(found.sets, found.classes, scale=2)
    return _write(target, single, text, pictures, more)


def report_several(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    classes: int = 20,
    pdf: bool = False,
) -> Path:
    """Write one page of several runs of the same data, side by side.

    Accuracies, over the images per class where these differ, transport costs, images, and the
    settings in which the runs differ. Of single runs `report` shows more.

    Args:
        folders: of the runs, at least two.
        out: as in `report`, but without a default.
        classes: most classes whose images are shown, the first ones.
        pdf: figures as PDF files too.

    Returns:
        The page.

    Raises:
        ConfigError: a folder is given twice.
        StoreError: a folder is of no run, damaged, or of other data than the first.
    """
    require(classes >= 1, "classes", classes, "an integer >= 1")
    require(len(folders) >= 2, "dir", tuple(map(str, folders)), "two folders of runs or more")
    real = [os.path.realpath(folder) for folder in folders]
    twice = next((f for f, r in zip(folders, real, strict=True) if real.count(r) > 1), None)
    require(twice is None, "dir", str(twice), "every folder once")
    target = Path(out)
    single = target.suffix.lower() == ".html"
    require(not (single and pdf), "pdf", pdf, "off, for a single page; or a folder as out")
    _check_target(target, single)
    importlib.import_module("matplotlib")  # before any work
    from otdd.distill.report import several
    from otdd.distill.report.gather import gather

    runs = several.named([gather(folder) for folder in folders])
    pictures = several.pictures(runs, pdf=pdf)
    text = several.page(runs, {p.name: p for p in pictures}, classes)
    return _write(target, single, text, pictures, {})


def _write(
    target: Path, single: bool, page: str, pictures: Sequence[Picture], more: dict[str, bytes]
) -> Path:
    """Write the page, and beside it the figures unless it stands alone; returns the page."""
    content = page.encode(errors="replace")
    if single:
        Store(target.parent).write_bytes(target.name, content)
        return target
    files = {PAGE: content, **more}
    for p in pictures:
        files |= {f"{p.name}.png": p.light} | ({f"{p.name}.pdf": p.pdf} if p.pdf else {})
    _write_folder(target, files)
    return target / PAGE


def _transport(found: Found, shown: Sequence[int], progress: Progress | None) -> Transports:
    """Transport of the shown classes, or why there is none."""
    from otdd.distill.data import DataError
    from otdd.distill.generator import GeneratorError
    from otdd.distill.prepare import real_images
    from otdd.distill.report.transport import Transports, transports

    if not found.sets:
        return Transports([])
    try:
        data, codec = real_images(found.config, found.data["sha256"])
    except (ConfigError, DataError, GeneratorError) as error:
        reason = str(error).splitlines()[0]
        for key in ("data", "generator"):  # a page that is passed on has no paths
            path = getattr(found.config, key)
            reason = reason.replace(path, found.settings[key]) if path else reason
        return Transports([], absent=reason)
    seed = found.config.seed
    return transports(found.sets, data, codec, shown, seed=seed, progress=progress)


def _pictures(found: Found, transport: Sequence[ClassTransport], pdf: bool) -> list[Picture]:
    from otdd.distill.report import figures

    metrics, made = found.metrics, []

    def add(name: str, alt: str, figure: tuple[float, figures.Draw]) -> None:
        made.append(figures.picture(name, alt, *figure, pdf=pdf))

    for number, arch in enumerate(dict.fromkeys(row.arch for row in metrics.rows)):
        rows = [row for row in metrics.rows if row.arch == arch]
        alt = f"Test accuracy of {arch} students by set and loss"
        for bars, name, note in ((True, "", ""), (False, "-near", ", on the axis of the results")):
            drawn = figures.accuracy(rows, metrics, bars=bars)
            add(f"accuracy{name}-{number:05d}", alt + note, drawn)
    if transport:
        titles = [figures.class_title(found.classes[e.label], e.label) for e in transport]
        add("cost", "Transport cost by class and set", figures.costs(transport, titles))
        if found.config.ipc > 1:  # one image takes one iteration
            alt = "Marginal error against iterations: median over classes, shaded their range"
            add("convergence", alt, figures.convergence(transport))
        for entry, title in zip(transport, titles, strict=True):
            alt = f"Map of class {found.classes[entry.label]}: its sets and lines of transport"
            add(f"map-{entry.label:05d}", alt, figures.transport_map(entry, title))
    if found.entropies:
        drawn = figures.entropies(found.entropies, len(found.classes))
        add("entropy", "Histogram of the entropy of soft labels by set", drawn)
    if metrics.timings:
        add("time", "Seconds of each stage by set", figures.times(metrics.timings))
    return made


def _check_target(target: Path, single: bool) -> None:
    """Refuse to replace what is no report."""
    if single:
        foreign = target.exists() and not _is_page(target)
        what = f"{target} is no report of otdd"
    elif target.is_dir():
        names = sorted(p.name for p in target.iterdir())
        others = [n for n in names if not _OURS.fullmatch(n)]
        foreign = bool(others) or (bool(names) and not _is_page(target / PAGE))
        held = (others or names or [""])[0]
        what = f"{target} is not empty and no report of otdd (it holds {held!r})"
    else:
        foreign, what = target.exists(), f"{target} is a file that does not end in .html"
    if foreign:
        raise StoreError(f"{what}; choose another --out")


def _is_page(path: Path) -> bool:
    from otdd.distill.report.page import HEAD

    try:
        with open(path, "rb") as file:
            return file.read(len(HEAD)) == HEAD.encode()
    except OSError:
        return False


def _write_folder(target: Path, files: dict[str, bytes]) -> None:
    """Write a folder aside, then give it its name; an earlier report makes room for it."""
    target = target.resolve()
    key = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    new, old = (target.parent / f"{TEMP}{key}-{kind}" for kind in ("new", "old"))
    store = Store(new)
    try:
        for name, data in files.items():
            store.write_bytes(name, data)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except OSError as error:
        raise unwritable(error)(f"cannot write {target} ({error.strerror or error})") from error
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
