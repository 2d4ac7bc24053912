"""The page: sections of text, tables and figures, without scripts and without the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources

from otdd.distill.config import TITLES
from otdd.distill.report import sections
from otdd.distill.report.figures import Picture
from otdd.distill.report.gather import Found
from otdd.distill.report.html import Markup, join, tag, tree
from otdd.distill.report.sections import Section, count, set_name, span
from otdd.distill.report.transport import Transports

GENERATOR = "otdd report"
HEAD = (
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    f'<meta name="generator" content="{GENERATOR}">\n'
)
# A page that a browser lets load nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PAPER = (
    "The method follows Cui, Qin, Zhou, Li and Li, “Optimizing Distributional Geometry Alignment "
    "with Optimal Transport for Generative Dataset Distillation” (NeurIPS 2025, arXiv 2512.00308). "
)


def page(
    found: Found,
    pictures: Mapping[str, Picture],
    transport: Transports,
    shown: Sequence[int],
) -> str:
    """HTML of a report.

    Args:
        found: the run.
        pictures: name -> figure.
        transport: of the classes that are shown.
        shown: labels of these classes.
    """
    parts = [
        *sections.accuracy(found, pictures),
        *sections.images(found, shown),
        *sections.transport(found, pictures, transport, shown),
        *sections.labels(found, pictures),
        *sections.times(found, pictures),
        *_settings(found),
    ]
    title = f"{found.data['name']}, {count(found.config.ipc, 'image')} per class"
    return document(title, [*_facts(found), *_missing(found)], parts)


def document(title: str, top: Sequence[Markup], parts: Sequence[Section]) -> str:
    """A whole page: its title, what stands above the contents, and its sections."""
    links = [tag("li", tag("a", heading, href=f"#{key}")) for key, heading, _ in parts]
    body = [
        tag("header", tag("h1", title), *top),
        tag("nav", tag("ul", *links), aria_label="Contents"),
        tag("main", *(tag("section", tag("h2", h), c, id=key) for key, h, c in parts)),
    ]
    style = (resources.files(__package__) / "style.css").read_text(encoding="utf-8")
    head = [
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} · otdd report"),
        tag("style", Markup(style)),
    ]
    page = join([*head, Markup("\n"), *(join([part, Markup("\n")]) for part in body)])
    return f"{HEAD}{page}</html>\n"


def _facts(found: Found) -> Iterator[Markup]:
    shape = "x".join(map(str, found.data["image_shape"]))
    students = {len(row.runs) for row in found.metrics.rows}
    seeds = f", students of {span(students)}" if students else ""
    # How many alone: a page that is passed on has no names of files.
    skipped = len(found.data.get("skipped", ()))
    left_out = f" {count(skipped, 'image')} that cannot be read left out." if skipped else ""
    yield tag(
        "p",
        f"{count(len(found.classes), 'class', 'es')}, images of {shape} (channels, height, "
        f"width); {count(len(found.sets), 'set')}{seeds}; seed {found.config.seed}.{left_out}",
        class_="facts",
    )
    made = (found.metrics.versions or {}).get("otdd")
    preset = found.config.preset
    by = f"Made by otdd {made}. " if made else "Made by otdd. "
    own = (
        f"Settings start from the preset {preset}: what systems before this one are known or "
        "inferred to use, which claims to reproduce no paper. "
        if preset
        else "Settings are otdd's own where none were given; they are not the paper's. "
    )
    yield tag("p", by + PAPER + own + "Every figure here was measured in this run.", class_="facts")
    keys = [
        tag("li", set_name(name), f": {TITLES[name]}" * (TITLES[name] != name))
        for name in found.sets
    ]
    yield tag("ul", *keys, class_="key")


def _missing(found: Found) -> Iterator[Markup]:
    if found.missing:
        rows = [tag("li", what, ": ", tag("code", command)) for what, command in found.missing]
        yield tag("aside", tag("strong", "Not there yet"), tag("ul", *rows), class_="missing")


def _settings(found: Found) -> Iterator[Section]:
    content = [tag("details", tag("summary", "Resolved settings"), tree(found.settings), open="")]
    if found.metrics.versions:
        content.append(tag("details", tag("summary", "Versions"), tree(found.metrics.versions)))
    last = found.config.seeds - 1
    students = f"students have 0 to {last}" if last else "the student has 0"
    seeds = f"seed {found.config.seed} of everything; {students}"
    known = {"seeds": seeds, "data": found.data["name"], "data_sha256": found.data["sha256"]}
    hashes = {k: v for k, v in found.identity.items() if k.endswith("_sha256") and v is not None}
    summary = tag("summary", "Seeds and hashes")
    content.append(tag("details", summary, tree(known | hashes), open=""))
    yield "settings", "Settings", join(content)
