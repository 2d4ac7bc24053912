"""What mkdocs does with a page before it renders it: sections of the README, figures, formulas.

A line `<!-- readme: HEADING -->` becomes that section of the README, `<!-- figures: NAME -->` the
table that `TABLES` makes of committed files under benchmarks/results/. Formulas, written as GitHub
shows them (a block ```math, or $`...`$ in a line), become MathML, which browsers render themselves.
"""

from __future__ import annotations

import importlib
import json
import posixpath
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {  # links of the README -> pages of the site
    "benchmarks/NOTES.md": "notes.md",
    "#evaluation": "start.md#evaluation",
    "#train-a-student-on-soft-labels": "how-to/students.md",
}

Row = dict[str, Any]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    parts: dict[str, Callable[[str], str]] = {
        "readme": lambda name: relink(section(name), folder),
        "figures": lambda name: TABLES[name](),
    }

    def replaced(match: re.Match[str]) -> str:
        return parts[match[1]](match[2])

    markdown = re.sub(r"^<!-- (readme|figures): (.+) -->$", replaced, markdown, flags=re.M)
    return formulas(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The docstrings' `::` before a block that stands by itself, to a colon."""
    return html.replace("::</p>", ":</p>")


def section(heading: str) -> str:
    """The text under a heading of the README, down to the next of its level or above."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip("#") == f" {heading}"]
    if len(starts) != 1:
        raise ValueError(f"README.md has no single heading {heading!r}")
    level = len(lines[starts[0]]) - len(lines[starts[0]].lstrip("#"))
    taken: list[str] = []
    fenced = False
    for line in lines[starts[0] + 1 :]:
        fenced ^= line.startswith("```")
        if not fenced and re.match(rf"#{{1,{level}}} ", line):
            break
        taken.append(line)
    return "\n".join(taken).strip()


def relink(text: str, folder: str) -> str:
    """Links of the README, from a page in this folder of the site."""
    for link, target in PAGES.items():
        text = text.replace(f"]({link})", f"]({posixpath.relpath(target, folder or '.')})")
    return text


def formulas(markdown: str) -> str:
    # Imported here, so that the tests of this file do not need it.
    from latex2mathml.converter import convert

    def block(match: re.Match[str]) -> str:
        return "\n".join(
            f"<p>{convert(line, display='block')}</p>" for line in match[1].strip().splitlines()
        )

    def inline(match: re.Match[str]) -> str:
        # Markdown takes a line that begins with <math> for a block of HTML.
        return f"<span>{convert(match[1])}</span>"

    markdown = re.sub(r"^```math\n(.*?)^```$", block, markdown, flags=re.M | re.S)
    return re.sub(r"\$`([^`]+)`\$", inline, markdown)


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Iterable[str], body: Iterable[Iterable[Any]]) -> str:
    rows = [list(map(str, row)) for row in body]
    lines = [list(head), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def benchmark(module: str) -> ModuleType:
    """A script of benchmarks/, which makes the tables that the README has too."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:  # mkdocs restores the path once it has loaded this file
        sys.path.append(folder)
    return importlib.import_module(module)


def cpu(dtype: str) -> str:
    return benchmark("report").table(results("cpu"), dtype)


def digits() -> str:
    """Accuracy of every set, labels and number of images per class, and the transport cost."""
    body = []
    for ipc in (1, 5, 10):
        found = results(f"digits_ipc{ipc}")
        for row in found["accuracy"]:
            cost = found["ot_cost"][row["set"]]
            figure = f"{row['mean']:.1f} ± {row['std']:.1f}"
            runs = len(row["runs"])
            body.append([ipc, f"`{row['set']}`", f"`{row['loss']}`", figure, runs, f"{cost:.2f}"])
    return table(["IPC", "set", "loss", "accuracy, %", "students", "transport cost"], body)


def ablation(kind: str) -> str:
    ablation_report = benchmark("ablation_report")
    rows = results(f"ablation_{kind}")["cells"]
    if kind == "guidance":
        return ablation_report.guidance_table(rows, range(100))
    return ablation_report.arms_table(rows)


SOLVERS = ("plain", "schedule", "anderson", "schedule + anderson", "POT sinkhorn_log", "OTT")


def convergence() -> str:
    """Milliseconds of a cold solve to the marginal error that all are asked for."""
    body = []
    for case, settings in results("convergence")["cases"].items():
        for setting, found in settings.items():
            if setting.endswith(", cold"):
                cells = [_converged(found.get(name)) for name in SOLVERS]
                body.append([case, setting.removesuffix(", cold").removeprefix("eps/std "), *cells])
    return table(["case", "eps/std", *SOLVERS], body)


def _converged(found: Row | None) -> str:
    if found is None:
        return "not run"
    if not found["met"]:
        return "not met"
    return f"{found['ms']:.3g} ms, {found['iterations']:g}"


def label_formats() -> str:
    return benchmark("ablation_report").formats_table(results("label_formats")["cells"])


def student_step() -> str:
    body = []
    for row in results("student_step")["rows"]:
        times = row["median_ms"]
        size = f"{row['size']} x {row['size']}"
        extra = [times[f"loss {kind}"] - times["loss without"] for kind in ("with", "with share")]
        step = f"{times['step without']:.0f} ms"
        body.append([size, row["batch"], row["classes"], step, *(f"{ms:.1f} ms" for ms in extra)])
    return table(["images", "batch", "classes", "step", "transport", "with a share"], body)


def guidance_share() -> str:
    body = []
    for row in results("guidance_share")["rows"]:
        times = row["median_ms"]
        share, memory = row["share_of_unguided_step"], row["share_of_memory"]
        body.append([
            row["model"], row["batch"], row["references"], f"`{row['settings']}`",
            f"{times['step without guidance']:.0f} ms", f"{times['guidance']:.1f} ms",
            f"{share:.2%}", f"{memory:+.1%}",
        ])  # fmt: skip
    head = ["model", "images in the batch", "real latents of the class", "settings"]
    return table([*head, "step without", "guidance", "share of the step", "peak memory"], body)


def order() -> str:
    body = []
    for row in results("order")["rows"]:
        joint, other = row["joint"], row["sequential"]
        pairs = [f"{joint[key]:.3g} and {other[key]:.3g}" for key in (
            "batch", "images_per_second", "denoiser_ms"
        )]  # fmt: skip
        body.append([row["model"], row["classes"], row["ipc"], *pairs, f"{row['ratio']:.1f}x"])
    head = ["model", "classes in flight", "IPC", "batch, joint and sequential", "images a second"]
    return table([*head, "denoiser, ms an image and step", "joint is faster by"], body)


def precision() -> str:
    keys = ("N", "M", "D", "offset", "eps", "precision", "plan_error")
    return table(keys, ([row[key] for key in keys] for row in results("precision")["rows"]))


def resources() -> str:
    found = results("cuda_resources")
    columns = found["columns"]
    body = []
    for capability, kernels in found["kernels"].items():
        most = [max(values[i] for values in kernels.values()) for i in range(len(columns))]
        body.append([capability, len(kernels), *most])
    return table(["compute capability", "kernels", *(f"most {c}" for c in columns)], body)


def files() -> str:
    """Every committed result, and the command, commit and machine that it names."""
    body = []
    for path in sorted(RESULTS.glob("*.json")):
        found = results(path.stem)
        rows = found.get("rows") or found.get("cells") or [{}]
        facts = {**rows[0], **found}
        machine = facts.get("machine", "not recorded")
        if isinstance(machine, dict):
            facts = {**machine, **facts}
            machine = ", ".join(f"{k} {v}" for k, v in machine.items() if k != "commit")
        command = f"`{facts['command']}`" if "command" in facts else "not recorded"
        commit = facts.get("commit", "not recorded")
        body.append([f"`{path.name}`", command, commit, machine])
    return table(["file", "command", "commit", "machine"], body)


TABLES: dict[str, Callable[[], str]] = {
    "cpu float32": lambda: cpu("float32"),
    "cpu float64": lambda: cpu("float64"),
    "digits": digits,
    "ablation guidance": lambda: ablation("guidance"),
    "ablation labels": lambda: ablation("labels"),
    "convergence": convergence,
    "label formats": label_formats,
    "student step": student_step,
    "guidance share": guidance_share,
    "order": order,
    "precision": precision,
    "resources": resources,
    "files": files,
}
