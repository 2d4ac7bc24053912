"""Several runs of the same data on one page, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from otdd.distill.config import HEADINGS, SETS, TITLES
from otdd.distill.report import figures
from otdd.distill.report.figures import Picture
from otdd.distill.report.gather import Found, Row
from otdd.distill.report.html import Markup, join, plain, table, tag
from otdd.distill.report.page import PAPER, document
from otdd.distill.report.sections import Section, card, count, set_name, span, strip
from otdd.distill.store import StoreError

Runs = Mapping[str, Found]  # name -> run
SHOWN = 5  # images of a class and set


def named(found: Sequence[Found]) -> Runs:
    """The runs by the names of their folders, numbered where two are called alike.

    Raises:
        StoreError: one is of other data than the first.
    """
    first, runs = found[0], dict[str, Found]()
    for run in found:
        if run.data["sha256"] != first.data["sha256"]:
            texts = [f"{r.store.path} ({_data(r)})" for r in (run, first)]
            raise StoreError(
                f"{texts[0]} is of other data than {texts[1]}; one page has runs of the same data "
                "at the same resolution and split: make one for each"
            )
        name = run.store.path.resolve().name
        same = [n for n in runs if n == name or n.startswith(f"{name} (")]
        runs[f"{name} ({len(same) + 1})" if same else name] = run
    return runs


def _data(run: Found) -> str:
    shape = "x".join(map(str, run.data["image_shape"]))
    classes = count(len(run.classes), "class", "es")
    return f"{run.data['name']}: {classes}, {shape}, hash {run.data['sha256'][:8]}"


def grows(runs: Runs) -> bool:
    """Whether the images per class tell the runs apart, so that lines can be drawn over them."""
    ipcs = {run.config.ipc for run in runs.values()}
    return len(ipcs) == len(runs)


def pictures(runs: Runs, *, pdf: bool) -> list[Picture]:
    """Accuracy of every architecture and loss."""
    made = []
    for number, (arch, loss) in enumerate(_kinds(runs)):
        found = {name: _rows(run, arch, loss) for name, run in runs.items()}
        teachers = {name: [a for _, a in run.metrics.teachers] for name, run in runs.items()}
        if grows(runs):
            ipcs = {name: run.config.ipc for name, run in runs.items()}
            drawn = figures.accuracy_lines(found, teachers, ipcs)
            alt = f"Test accuracy of {arch} by images per class, {HEADINGS[loss]}"
        else:
            drawn = figures.accuracy_dots(found)
            alt = f"Test accuracy of {arch} by run, {HEADINGS[loss]}"
        made.append(figures.picture(f"runs-{number:05d}", alt, *drawn, pdf=pdf))
    return made


def page(runs: Runs, drawn: Mapping[str, Picture], classes: int) -> str:
    """HTML of the page; `classes` is the most whose images are shown."""
    first = next(iter(runs.values()))
    shape = "x".join(map(str, first.data["image_shape"]))
    facts = (
        f"{count(len(first.classes), 'class', 'es')}, images of {shape} (channels, height, width). "
        f"{PAPER}Every figure here was measured in these runs."
    )
    sets = [name for name in SETS if any(name in run.sets for run in runs.values())]
    keys = [tag("li", set_name(n), f": {TITLES[n]}" * (TITLES[n] != n)) for n in sets]
    top = [tag("p", facts, class_="facts"), tag("ul", *keys, class_="key"), *_missing(runs)]
    parts = [
        *_accuracy(runs, drawn),
        *_costs(runs, sets),
        *_images(runs, sets, classes),
        *_settings(runs),
    ]
    return document(f"{first.data['name']}, {len(runs)} runs", top, parts)


def _missing(runs: Runs) -> Iterator[Markup]:
    rows = [
        tag("li", tag("bdi", name), ": ", what, ": ", tag("code", command))
        for name, run in runs.items()
        for what, command in run.missing
    ]
    if rows:
        yield tag("aside", tag("strong", "Not there yet"), tag("ul", *rows), class_="missing")


def _kinds(runs: Runs) -> list[tuple[str, str]]:
    """Architectures and losses that students were trained with."""
    rows = [row for run in runs.values() for row in run.metrics.rows]
    archs = dict.fromkeys(row.arch for row in rows)
    there = {(row.arch, row.loss) for row in rows}
    return [(arch, loss) for arch in archs for loss in HEADINGS if (arch, loss) in there]


def _rows(run: Found, arch: str, loss: str) -> dict[str, Row]:
    return {r.set: r for r in run.metrics.rows if (r.arch, r.loss) == (arch, loss)}


def _accuracy(runs: Runs, drawn: Mapping[str, Picture]) -> Iterator[Section]:
    kinds = _kinds(runs)
    if not kinds:
        return
    note = (
        "Students trained on a set and tested on the real test images, which are the same for all "
        "runs: mean after the last step ± one standard deviation over students. All sets but otg "
        "are baselines. IPC: images per class. "
    )
    if grows(runs):
        note += "Dashed: the teachers, on average; the axis is that of the results."
    else:
        note += "The axis is that of the results."
    seeds = {len(row.runs) for run in runs.values() for row in run.metrics.rows}
    note += f" {span(seeds).capitalize()} a row."
    several = len({arch for arch, _ in kinds}) > 1
    cards = []
    for picture, (arch, loss) in zip(drawn.values(), kinds, strict=True):
        found = [_rows(run, arch, loss) for run in runs.values()]
        names = [name for name in SETS if any(name in rows for rows in found)]
        lines = [
            (set_name(n), *(rows[n].text if n in rows else "" for rows in found)) for n in names
        ]
        title = f"{arch}, {HEADINGS[loss]}" if several else HEADINGS[loss]
        numbers = table(("set", *_heads(runs)), lines)
        cards.append(tag("div", tag("h3", title), card(picture, picture.alt), numbers))
    yield "accuracy", "Accuracy", join([tag("p", note), tag("div", *cards, class_="figures")])


def _heads(runs: Runs) -> list[Markup]:
    """Names of the runs, with the images per class."""
    return [
        join([tag("bdi", name), tag("small", f"IPC {run.config.ipc}")])
        for name, run in runs.items()
    ]


def _costs(runs: Runs, sets: Sequence[str]) -> Iterator[Section]:
    if not any(run.metrics.ot_cost for run in runs.values()):
        return
    costs = [run.metrics.ot_cost or {} for run in runs.values()]
    lines = [
        (set_name(name), *(f"{c[name]:.4g}" if name in c else "" for c in costs))
        for name in sets
        if any(name in c for c in costs)
    ]
    note = "Mean over the classes of the transport cost from a set to the real images. Less is "
    note += "closer; costs by another generator's codec are not of the same space."
    figure = tag("div", tag("div", table(("set", *_heads(runs)), lines)), class_="figures")
    yield "transport", "Transport to the real images", join([tag("p", note), figure])


def _images(runs: Runs, sets: Sequence[str], classes: int) -> Iterator[Section]:
    if not sets:
        return
    names = next(iter(runs.values())).classes
    cards = []
    for label, title in enumerate(names[:classes]):
        rows: list[Markup] = []
        for name, run in runs.items():
            own = {n: images[labels == label] for n, (images, labels) in run.sets.items()}
            strips = [strip(n, title, own[n][:SHOWN]) for n in sets if len(own.get(n, ()))]
            columns = f"grid-template-columns:repeat({len(sets)},minmax(0,1fr))"
            rows += [
                tag("p", tag("bdi", name), class_="note"),
                tag("div", *strips, class_="strips", style=columns),
            ]
        cards.append(tag("div", tag("h3", tag("bdi", title)), *rows, class_="card"))
    some = f"The first {classes} of {len(names)} classes. " if classes < len(names) else ""
    most = max(run.config.ipc for run in runs.values())
    few = f"Of {most} images per class, {SHOWN}." if most > SHOWN else ""
    note = f"The sets side by side, run by run. {some}{few}"
    least = f"{4.2 * len(sets) + 2:g}rem"
    layout = f"grid-template-columns:repeat(auto-fill,minmax(min(100%,{least}),1fr))"
    grids = tag("div", *cards, class_="grids", style=layout)
    yield "images", "Images", join([tag("p", note), grids])


def _settings(runs: Runs) -> Iterator[Section]:
    every = [_flat(run.settings) | _hashes(run) for run in runs.values()]
    keys = dict.fromkeys(key for settings in every for key in settings)
    lines = [
        (key, *(plain(s[key]) if key in s else "" for s in every))
        for key in keys
        if any(s.get(key) != every[0].get(key) for s in every)
    ]
    note = "Settings, versions and hashes in which the runs differ; all others are the same."
    body = (
        table(("setting", *_heads(runs)), lines)
        if lines
        else tag("p", "None: the runs were made alike.")
    )
    yield "settings", "Settings that differ", join([tag("p", note), body])


def _hashes(run: Found) -> dict[str, Any]:
    """Versions, and the hashes of what a run was made with."""
    versions = {f"version of {k}": v for k, v in (run.metrics.versions or {}).items()}
    kept = {k: v for k, v in run.identity.items() if k.endswith("_sha256")}
    return versions | {k: str(v)[:12] for k, v in kept.items() if v is not None}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
