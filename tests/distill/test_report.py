"""`report`: structure, escaping, runs that are not finished, damaged files, what it replaces."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from distill.finished_run import DATA, settings, written_set
from distill.toy_run import NAMES, toy_run

from otdd import cli, load, tools
from otdd.distill import prepare
from otdd.distill.codec import PixelCodec
from otdd.distill.config import ConfigError
from otdd.distill.export import export
from otdd.distill.geometry import transport_problem
from otdd.distill.report import report
from otdd.distill.report.figures import class_title
from otdd.distill.report.gather import gather
from otdd.distill.report.html import Markup, join, table, tag, tree
from otdd.distill.report.transport import MARKS, convergence, principal_axes, transports
from otdd.distill.store import Store, StoreError
from otdd.ops import sinkhorn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return report(run, tmp_path_factory.mktemp("reports") / "whole")


@pytest.fixture(scope="module")
def sampled(run, tmp_path_factory):
    """The run as it was before labels: its report has few figures, and takes less."""
    later = shutil.ignore_patterns("labels", "results", "logs", "geometry", "metrics.json")
    return shutil.copytree(run, tmp_path_factory.mktemp("runs") / "sampled", ignore=later)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


class Seen(HTMLParser):
    """Elements of a page, and those that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.wrong, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("img", "source", "meta", "link"):
            self.open.append(name)

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.wrong.append(name)

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def of(self, name):
        return [attributes for kind, attributes in self.elements if kind == name]


def test_structure(page):
    seen = Seen(page.read_text(encoding="utf-8"))
    assert (seen.open, seen.wrong) == ([], [])
    assert page.read_text(encoding="utf-8").count("<title>photos, 2 images per class ") == 1
    assert [s["id"] for s in seen.of("section")] == [
        *("accuracy", "images", "transport", "maps", "labels", "time", "settings"),
    ]
    assert {a["href"] for a in seen.of("a")} == {f"#{s['id']}" for s in seen.of("section")}
    assert len(seen.of("h1")) == 1
    assert all(image["alt"] for image in seen.of("img"))
    assert not seen.of("script")
    assert len({id for _, a in seen.elements if (id := a.get("id"))}) == len(seen.of("section"))
    for words in ("arXiv 2512.00308", "they are not the paper's", "2 seeds a row", "5 classes"):
        assert words in seen.text
    assert "Not there yet" not in seen.text


def test_the_page_needs_nothing_else(page):
    seen = Seen(page.read_text(encoding="utf-8"))
    urls = [a[k] for _, a in seen.elements for k in ("src", "srcset", "href") if k in a]
    assert all(url.startswith(("data:", "#")) for url in urls)
    assert len(seen.of("source")) == len([u for u in urls if u.startswith("data:image")]) - len(
        seen.of("img")
    )
    assert "http" not in re.sub(r"http-equiv", "", page.read_text(encoding="utf-8"))


def test_figures_lie_beside_the_page(page):
    names = sorted(p.name for p in page.parent.iterdir())
    maps = [f"map-{k:05d}.png" for k in range(5)]
    figures = ["convergence.png", "cost.png", "entropy.png", "grid.png"]
    near = ["accuracy-00000.png", "accuracy-near-00000.png"]
    assert names == [*near, *figures, "index.html", *maps, "time.png"]
    assert all((page.parent / n).read_bytes().startswith(b"\x89PNG") for n in names if "png" in n)


def test_what_users_named_stands_escaped(page):
    text = page.read_text(encoding="utf-8")
    seen = Seen(text)
    assert "<script" not in text
    assert [n for n in NAMES if f"{n}: 6 real images" not in seen.text] == []
    alts = [image["alt"] for image in seen.of("img")]
    assert [n for n in NAMES if f"2 images of class {n} in the set random" not in alts] == []


def test_the_same_folder_gives_the_same_bytes(run, page, tmp_path):
    first = {p.name: p.read_bytes() for p in page.parent.iterdir()}
    again = report(run, tmp_path / "again").parent
    assert {p.name: p.read_bytes() for p in again.iterdir()} == first


def test_numbers_are_those_of_metrics(run, page):
    metrics = json.loads((run / "metrics.json").read_text())
    text = Seen(page.read_text(encoding="utf-8")).text
    for row in metrics["accuracy"]:
        assert f"{row['mean']:.1f} ± {row['std']:.1f}best {row['best_mean']:.1f}" in text
    for cost in metrics["ot_cost"].values():
        assert f"{cost:.4g}" in text
    (teacher,) = metrics["teachers"]
    assert f"the teachers ({teacher['name']} {teacher['accuracy']:.1f} %)" in text


def test_costs_by_class_have_the_mean_of_metrics(run):
    found = gather(run)
    data, codec = prepare.real_images(found.config, found.data["sha256"])
    made = transports(found.sets, data, codec, range(5))
    for name, cost in found.metrics.ot_cost.items():
        mean = sum(entry.sets[name].cost for entry in made.classes) / 5
        assert mean == pytest.approx(cost, abs=1e-4)
    assert made.space == "pixels"


def test_convergence_is_that_of_one_solve():
    x, y = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 40))
    C, eps = transport_problem(x.double(), y.double())
    errors = convergence(C, eps)
    assert len(errors) == len(MARKS)
    for mark in (1, 5, 12, 100):
        alone = sinkhorn(C, eps=eps, max_iter=mark).marginal_error
        assert float(errors[MARKS.index(mark)]) == pytest.approx(float(alone), rel=1e-4, abs=1e-9)


def test_maps_are_principal_components_with_a_fixed_sign():
    y = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    y[:, 3] *= 9
    origin, axes, explained = principal_axes(y)
    assert axes[3, 0] > 0.98
    values = torch.linalg.eigvalsh((y - origin).T @ (y - origin)).flip(0)
    assert explained == pytest.approx(float(values[:2].sum() / values.sum()))
    torch.testing.assert_close(axes.T @ axes, torch.eye(2).double())
    lonely = principal_axes(y[:1])
    assert lonely[1].shape == (6, 2)
    assert lonely[2] == 1.0


def test_lines_end_where_the_plan_sends_a_point():
    images = torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 255.0)]).to(torch.uint8)
    sets = {"random": (images, torch.zeros(2, dtype=torch.int64))}
    entry = transports(sets, DATA, PixelCodec(), [0]).classes[0]
    solve = entry.sets["random"]
    low, high = solve.points.min(0).values, solve.points.max(0).values
    assert ((solve.images >= low - 1e-9) & (solve.images <= high + 1e-9)).all()
    one = transports(
        {"random": (images[:1], torch.zeros(1, dtype=torch.int64))}, DATA, PixelCodec(), [0]
    )
    solve = one.classes[0].sets["random"]
    torch.testing.assert_close(solve.images, solve.points.expand_as(solve.images))


def test_first_classes_of_many_are_said_to_be_so(sampled, tmp_path):
    page = report(sampled, tmp_path / "two.html", classes=2)
    text = Seen(page.read_text(encoding="utf-8")).text
    assert text.count("The first 2 of 5 classes.") == 2
    assert NAMES[1] in text
    assert f"{NAMES[2]}: 6 real" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["two.html"]


def test_unfinished_runs_say_what_is_missing(tmp_path):
    out = tmp_path / "it's"
    with Store.open(out, {"data": "toy"}) as store:
        config = {k: v for k, v in _settings("photos").items() if k != "out"}
        store.write_json("config.json", config)
        about = {"name": "toy", "classes": ["a", "b"], "image_shape": [3, 8, 8], "sha256": "0"}
        store.write_json("data.json", about | {"mean": [0.5] * 3, "std": [0.5] * 3})
    seen = Seen(report(out).read_text(encoding="utf-8"))
    assert f"images of random, kmeans: otdd sample --out '{tmp_path}/it'\"'\"'s'" in seen.text
    assert [s["id"] for s in seen.of("section")] == ["settings"]

    written_set(tmp_path / "sampled", ["<b>", "ö"], name="random")
    seen = Seen(report(tmp_path / "sampled").read_text(encoding="utf-8"))
    commands = re.findall(r"otdd (\w+) --out", seen.text)
    assert commands == ["sample", "relabel", "train", "evaluate"]
    assert "No maps, and no costs by class: data 'toy' is no folder" in seen.text
    assert "/home/me" not in seen.text
    assert [s["id"] for s in seen.of("section")] == ["images", "transport", "settings"]


def _settings(data):
    from otdd.distill.settings import to_dict

    return to_dict(settings("x", data=data))


def test_missing_students_labels_and_table(copy):
    (copy / "metrics.json").unlink()
    shutil.rmtree(copy / "results/random")
    (copy / "sets/kmeans/labels/00002.safetensors").unlink()
    text = Seen(report(copy, classes=1).read_text(encoding="utf-8")).text
    assert "soft labels of kmeans: otdd relabel" in text
    assert "students of random: otdd train" in text
    assert "the table and the transport costs: otdd evaluate" in text


def test_images_that_changed_are_not_compared(copy, run):
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["teachers"] = [{"name": "convnet=/home/me/t.pt", "accuracy": 50.0}]
    (copy / "metrics.json").write_text(json.dumps(metrics))
    about = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(about | {"sha256": "0"}))
    (copy / "SHA256SUMS").unlink()
    text = Seen(report(copy).read_text(encoding="utf-8")).text
    assert "No maps, and no costs by class: data: " in text
    assert "has other images than when the run was made" in text
    assert "the teachers (convnet=t.pt 50.0 %)" in text
    assert "mean cost" in text


def _broken(folder, name, change):
    path = folder / name
    if isinstance(change, bytes):
        path.write_bytes(change)
        return
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("metrics.json", b"{", "metrics.json cannot be read"),
        ("metrics.json", b"[]", "metrics.json is damaged"),
        ("metrics.json", lambda v: v["accuracy"][0].pop("std"), "metrics.json is damaged: KeyErr"),
        ("metrics.json", lambda v: v["accuracy"][0].update(runs=[]), "at a row without runs"),
        ("metrics.json", lambda v: v["accuracy"][0].update(set="<b>"), "at '<b>', expected one"),
        ("metrics.json", lambda v: v["timings"].update(a="b"), "at 'b', expected a number"),
        ("metrics.json", lambda v: v["ot_cost"].update(otg=float("nan")), "expected a number"),
        ("config.json", b"\xff", "config.json cannot be read"),
        ("config.json", b"3", "config.json is damaged"),
        ("config.json", lambda v: v.update(ipc=0), "config.json is damaged: ipc: 0 is not accep"),
        ("config.json", lambda v: v.update(new=1), "config.json is damaged: new: unknown setting"),
        ("data.json", b"{}", "data.json is damaged: expected name"),
        ("data.json", lambda v: v["classes"].append(3), "data.json is damaged"),
        ("data.json", lambda v: v.update(skipped=3), "data.json is damaged"),
        ("data.json", lambda v: v["classes"].pop(), "is damaged: expected uint8 images of the cl"),
        ("otdd.json", b"[]", "otdd.json is damaged: it was not written by otdd"),
        ("otdd.json", lambda v: v.update(format=7), "otdd.json is damaged"),
        ("sets/random/images.safetensors", b"\0" * 99, "images.safetensors cannot be read"),
        ("sets/random/labels/00001.safetensors", b"\0" * 9, "00001.safetensors cannot be read"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(copy, name, change, message):
    _broken(copy, name, change)
    (copy / "SHA256SUMS").unlink()  # which would have named the file before it is read
    with pytest.raises(StoreError) as caught:
        report(copy)
    assert message in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (copy / "report").exists()


def test_tensors_of_others(copy):
    store = Store(copy)
    tensors = store.read_images("random")
    for wrong in ({"images": tensors["images"]}, {**tensors, "images": tensors["images"].float()}):
        store.write_tensors("sets/random/images.safetensors", wrong)
        with pytest.raises(StoreError, match=r"images\.safetensors is damaged"):
            report(copy)
    store.write_tensors("sets/random/images.safetensors", tensors)
    name = "sets/random/labels/00000.safetensors"
    tensors, meta = store.read_tensors(name), store.read_meta(name)
    tensors["logits"][:] = torch.nan
    store.write_tensors(name, tensors, meta)
    with pytest.raises(StoreError, match="soft labels that are no finite numbers"):
        report(copy)


def test_what_is_no_run(run, tmp_path):
    (tmp_path / "file").write_text("")
    export(run, "imagefolder", tmp_path / "exported", set="random")
    Store.open(tmp_path / "latents", {"latents": {}}).close()
    Store.open(tmp_path / "surrogate", {"surrogate": {}}).close()
    for name, message in (
        ("none", "no such folder"),
        ("file", "a file, no folder of a run"),
        (".", "no folder of a run: there is no otdd.json in it"),
        ("exported", "is an exported set; a report is of the folder of a run"),
        ("latents", "is of `otdd encode`, no folder of a run"),
        ("surrogate", "is of `otdd fit-surrogate`, no folder of a run"),
    ):
        with pytest.raises(StoreError, match=message):
            report(tmp_path / name, tmp_path / "out")
        if name in ("latents", "surrogate"):
            with pytest.raises(StoreError, match=message):
                load(tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_only_reports_are_replaced(sampled, page, tmp_path):
    letter, folder = tmp_path / "letter.html", tmp_path / "folder"
    letter.write_text("<!doctype html>\n<p>dear")
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html>\n<p>dear")
    mixed = shutil.copytree(page.parent, tmp_path / "mixed")
    (mixed / "thesis.tex").write_text("")
    (tmp_path / "plain").write_text("")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for out, message in (
        (letter, "letter.html is no report of otdd; choose another --out"),
        (folder, "folder is not empty and no report of otdd .*'index.html'"),
        (mixed, "mixed is not empty and no report of otdd .*'thesis.tex'"),
        (tmp_path / "plain", "plain is a file that does not end in .html"),
    ):
        with pytest.raises(StoreError, match=message):
            report(sampled, out)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (mixed / "thesis.tex").unlink()
    (mixed / "map-00007.png").write_bytes(b"of an earlier report")
    report(sampled, mixed, classes=1)
    names = {p.name for p in mixed.iterdir()}
    assert "map-00000.png" in names
    assert not names & {"map-00001.png", "map-00007.png"}


def test_a_report_is_there_whole_or_not(sampled, page, tmp_path, monkeypatch):
    kept = shutil.copytree(page.parent, tmp_path / "kept")
    before = {p.name: p.read_bytes() for p in kept.iterdir()}
    write = Store.write_bytes

    def full(self, name, data):
        if name == "map-00000.png":
            raise StoreError("no space left")
        write(self, name, data)

    monkeypatch.setattr(Store, "write_bytes", full)
    for name in ("kept", "new"):
        with pytest.raises(StoreError, match="no space left"):
            report(sampled, tmp_path / name, classes=1)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert before == {p.name: p.read_bytes() for p in kept.iterdir()}


def test_pdf(run, tmp_path):
    folder = report(run, tmp_path / "print", classes=1, pdf=True).parent
    files = [p for p in folder.iterdir() if p.suffix == ".pdf"]
    assert len(files) == 7
    assert all(p.read_bytes().startswith(b"%PDF") for p in files)
    assert b"CreationDate" not in files[0].read_bytes()
    with pytest.raises(ConfigError, match="pdf: True is not accepted"):
        report(run, tmp_path / "x.html", pdf=True)


def test_command(sampled, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["report", str(sampled), "--classes", "1", "--quiet", "--out", str(tmp_path / "r")]
        )
    assert not end.value.code
    assert capsys.readouterr().out == f"written to {tmp_path / 'r' / 'index.html'}\n"


def test_help_imports_neither_torch_nor_matplotlib():
    code = "import sys\nfrom otdd import cli\ntry: cli.main(['report', '--help'])\n"
    code += "except SystemExit: pass\nassert not {'torch', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--classes INT" in done.stdout


def test_html_escapes_what_is_not_markup():
    made = tag("p", "<b>", tag("i", "a&b"), class_='"x"', hidden=None)
    assert made == '<p class="&quot;x&quot;">&lt;b&gt;<i>a&amp;b</i></p>'
    assert join(["<", Markup("<br>"), "a\0b"]) == "&lt;<br>a b"
    assert '<th scope="col">&lt;</th>' in table(["<"], [["<b>"]])
    assert "<td>none, on, 0.5</td>" in tree({"a": {"<k>": [None, True, 0.5]}})
    assert "<summary>a</summary>" in tree({"a": {"<k>": 1}})


def test_class_names_in_figures():
    assert class_title("été chat", 3) == "été chat"
    assert class_title("漢字", 3) == "class 3"
    assert class_title("a\nb", 3) == "a b"
    assert class_title("x" * 40, 3) == "x" * 21 + "…"


def test_the_shell_completes_its_flags(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--print-completion", "bash"])
    assert not end.value.code
    assert "report" in capsys.readouterr().out
    assert tools.flags_class("report") is tools.ReportFlags
