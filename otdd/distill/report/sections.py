"""Sections of the page: what was measured and made, each only where the run has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from otdd.distill import plots
from otdd.distill.config import COLOURS, HEADINGS
from otdd.distill.geometry import MAX_ITER, TOL
from otdd.distill.report.figures import Picture
from otdd.distill.report.gather import Found, Row
from otdd.distill.report.html import Markup, image_url, join, table, tag
from otdd.distill.report.transport import POINTS, ClassTransport, Transports

SMALL, FEW, MANY = 32, 5, 10  # images of a class that are shown: more if they are small

Section = tuple[str, str, Markup]  # anchor, heading, content


def accuracy(found: Found, pictures: Mapping[str, Picture]) -> Iterator[Section]:
    rows = found.metrics.rows
    if not rows:
        return
    teachers = "".join(f"{name} {value:.1f} %, " for name, value in found.metrics.teachers)
    note = (
        "Students trained on a set and tested on the real test images. A bar is the mean after the "
        "last step, its whisker one standard deviation over students, a dot one student; a thick "
        "stroke (in the table: best) is the mean at the best check of each, which looks at the "
        "test images and is no fair figure. Augmentation and protocol are the same for all sets; "
        f"all but otg are baselines. {span({len(row.runs) for row in rows}).capitalize()} a row."
    )
    if teachers:
        note += f" Dashed: the teachers ({teachers[:-2]})."
    cards = [card(p, p.alt) for name, p in pictures.items() if name.startswith("accuracy")]
    tables = [
        tag("div", tag("h3", arch), _accuracy_table([row for row in rows if row.arch == arch]))
        for arch in dict.fromkeys(row.arch for row in rows)
    ]
    figures = tag("div", *cards, *tables, class_="figures")
    yield "accuracy", "Accuracy", join([tag("p", note), figures])


def _accuracy_table(rows: Sequence[Row]) -> Markup:
    losses = [loss for loss in HEADINGS if any(row.loss == loss for row in rows)]
    cells: dict[str, list[object]] = {}
    for name in dict.fromkeys(row.set for row in rows):
        cells[name] = []
        for loss in losses:
            found = [row for row in rows if (row.set, row.loss) == (name, loss)]
            mean = [row.text for row in found]
            best = [f"best {row.best_mean:.1f}{_students(row, rows)}" for row in found]
            cells[name].append(join([*mean, *(tag("small", text) for text in best)]))
    lines = [(set_name(name), *line) for name, line in cells.items()]
    return table(("set", *(HEADINGS[loss] for loss in losses)), lines)


def _students(row: Row, rows: Sequence[Row]) -> str:
    """The number of students where it is not that of all rows."""
    return f", n = {len(row.runs)}" if len({len(r.runs) for r in rows}) > 1 else ""


def images(found: Found, shown: Sequence[int]) -> Iterator[Section]:
    if not found.sets:
        return
    limit = MANY if max(found.data["image_shape"][1:]) <= SMALL else FEW
    most = max(int(labels.bincount().max()) for _, labels in found.sets.values())
    note = "The sets side by side, class by class. "
    note += _some(found, shown) + (f"Of {most} images per class, {limit}." if most > limit else "")
    cards = []
    for label in shown:
        strips = [
            strip(name, found.classes[label], images[labels == label][:limit])
            for name, (images, labels) in found.sets.items()
            if bool((labels == label).any())
        ]
        columns = f"grid-template-columns:repeat({max(1, len(strips))},minmax(0,1fr))"
        name = tag("h3", tag("bdi", found.classes[label]))
        cards.append(
            tag("div", name, tag("div", *strips, class_="strips", style=columns), class_="card")
        )
    least = f"{4.2 * len(found.sets) + 2:g}rem"
    layout = f"grid-template-columns:repeat(auto-fill,minmax(min(100%,{least}),1fr))"
    content = [
        tag("p", note),
        tag("div", *cards, class_="grids", style=layout),
    ]
    yield "images", "Images", join(content)


def strip(name: str, class_name: str, images: Tensor) -> Markup:
    data = plots.strip(images)
    alt = f"{count(len(images), 'image')} of class {class_name} in the set {name}"
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    image = tag("img", src=image_url(data), alt=alt, width=width, height=height)
    bar = f"border-top:3px solid {COLOURS[name]}"
    return tag("figure", tag("figcaption", name, style=bar), image)


def transport(
    found: Found, pictures: Mapping[str, Picture], made: Transports, shown: Sequence[int]
) -> Iterator[Section]:
    if not found.sets:
        return
    content, cards = [], []
    if made.absent is not None:
        content.append(tag("p", f"No maps, and no costs by class: {made.absent}", class_="missing"))
    if made.classes:
        note = (
            "Entropic optimal transport from the images of a set to the real ones of a class: "
            f"squared Euclidean costs between {made.space}, equal weights, eps 1 % of the mean "
            f"cost, at most {MAX_ITER} iterations or a marginal error of {TOL:g}. Less is closer; "
            f"the mean is over all classes. {_some(found, shown)}"
        )
        settled = "One image of a class takes all of it, in one iteration."
        content.append(tag("p", note, settled if found.config.ipc == 1 else ""))
    if found.metrics.ot_cost:
        cards.append(tag("div", _cost_table(found, made.classes)))
    curves = [pictures[name] for name in ("cost", "convergence") if name in pictures]
    cards += [card(picture, picture.alt) for picture in curves]
    content.append(tag("div", *cards, class_="figures"))
    if cards or made.absent is not None:
        yield "transport", "Transport to the real images", join(content)
    if made.classes:
        yield "maps", "Maps", _maps(found, pictures, made.classes)


def _cost_table(found: Found, classes: Sequence[ClassTransport]) -> Markup:
    costs, rows = found.metrics.ot_cost or {}, []
    for name in found.sets:
        solves = [entry.sets[name] for entry in classes if name in entry.sets]
        cost = f"{costs[name]:.4g}" if name in costs else ""
        late = f"{sum(not s.converged for s in solves)} of {len(solves)}" if solves else ""
        rows.append((set_name(name), cost, _range([s.n_iter for s in solves]), late))
    return table(("set", "mean cost", "iterations", "not converged"), rows)


def _maps(
    found: Found, pictures: Mapping[str, Picture], transport: Sequence[ClassTransport]
) -> Markup:
    note = (
        "The first two principal components of the real images of a class, the same for all of its "
        f"sets: at most {POINTS} real images as dots, the images of a set as its marks. A line "
        "goes from a real image to where the plan sends it: to one image of the set, or between "
        "those that share it. Distances that a map does not show count too."
    )
    cards = []
    for entry in transport:
        caption = (
            tag("bdi", found.classes[entry.label]),
            f": {count(entry.count, 'real image')}, {100 * entry.explained:.0f} % of their "
            "variance on the map",
        )
        cards.append(card(pictures[f"map-{entry.label:05d}"], *caption))
    return join([tag("p", note), tag("div", *cards, class_="figures")])


def labels(found: Found, pictures: Mapping[str, Picture]) -> Iterator[Section]:
    if not found.entropies:
        return
    note = (
        "Entropy of the teachers' labels: 0 is one class for certain. Filled: views of single "
        "images; outlined: views that CutMix or Mixup mixed."
    )
    rows = []
    for name, entropy in found.entropies.items():
        means = [f"{p.mean():.3f}" if len(p) else "" for p in (entropy.plain, entropy.mixed)]
        rows.append((set_name(name), *means, f"{entropy.steps} of {entropy.total}"))
    heads = ("set", "mean in nats", "mixed", "batches read")
    figure = tag(
        "div",
        card(pictures["entropy"], pictures["entropy"].alt),
        tag("div", table(heads, rows)),
        class_="figures",
    )
    yield "labels", "Soft labels", join([tag("p", note), figure])


def times(found: Found, pictures: Mapping[str, Picture]) -> Iterator[Section]:
    timings = found.metrics.timings
    if not timings:
        return
    rows = [(key, f"{seconds:.1f}") for key, seconds in timings.items()]
    rows.append(("in all", f"{sum(timings.values()):.1f}"))
    cards = tag(
        "div",
        card(pictures["time"], pictures["time"].alt),
        tag("div", table(("stage", "seconds"), rows)),
        class_="figures",
    )
    note = "Seconds of the stages, over all commands that worked on the folder."
    yield "time", "Run time", join([tag("p", note), cards])


def card(picture: Picture, *caption: object) -> Markup:
    width, height = int.from_bytes(picture.light[16:20]), int.from_bytes(picture.light[20:24])
    dark = tag("source", srcset=image_url(picture.dark), media="(prefers-color-scheme: dark)")
    light = tag(
        "img", src=image_url(picture.light), alt=picture.alt, width=width // 2, height=height // 2
    )
    return tag("figure", tag("picture", dark, light), tag("figcaption", *caption))


def set_name(name: str) -> Markup:
    colour = COLOURS.get(name, "#7f7f7f")
    return join([tag("span", class_="swatch", style=f"background:{colour}"), name])


def _some(found: Found, shown: Sequence[int]) -> str:
    total = len(found.classes)
    return f"The first {len(shown)} of {total} classes. " if len(shown) < total else ""


def span(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return count(low, "seed") if low == high else f"{low} to {high} seeds"


def _range(values: Sequence[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural * (number != 1)}"
