"""Several runs on one page: what stands there, what differs, and what is refused."""

import re
import shutil

import pytest
from distill.finished_run import finished_run, written_set
from distill.test_report import Seen

from otdd import cli, tools
from otdd.distill.config import ConfigError
from otdd.distill.report import report_several
from otdd.distill.report.gather import gather
from otdd.distill.report.several import grows, named
from otdd.distill.store import StoreError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two that differ in the images per class, and a third that has another strength."""
    root = tmp_path_factory.mktemp("runs")
    finished_run(root / "one <b>", ipc=1, train={"epochs": 2, "losses": ["ce"]})
    finished_run(root / "$two$", ipc=2, train={"epochs": 2, "losses": ["ce"]})
    changes = {"train": {"epochs": 2, "losses": ["ce"], "lr": 0.5}}
    finished_run(root / "again", ipc=2, sets=["random"], **changes)
    return root


def read(page):
    seen = Seen(page.read_text(encoding="utf-8"))
    assert (seen.open, seen.wrong) == ([], [])
    return seen


def cells(page, section, row):
    """Texts of the row of a table in a section."""
    text = page.read_text(encoding="utf-8").split(f'<section id="{section}">')[1]
    text = text.split("</section>")[0]
    rows = [line for line in re.findall(r"<tr>(.*?)</tr>", text) if re.search(row, line)]
    assert rows, f"no row {row} in {section}"
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", rows[0])]


def test_images_per_class(runs, tmp_path):
    page = report_several([runs / "one <b>", runs / "$two$"], tmp_path / "page")
    seen = read(page)
    assert [s["id"] for s in seen.of("section")] == ["accuracy", "transport", "images", "settings"]
    text = page.read_text(encoding="utf-8")
    assert "<title>digits, 2 runs" in text
    assert "one &lt;b&gt;" in text
    assert "Not there yet" not in seen.text
    wanted = {name: gather(runs / name) for name in ("one <b>", "$two$")}
    for row in wanted["$two$"].metrics.rows:
        shown = cells(page, "accuracy", f">{'</span>'}{row.set}</th>")
        assert shown[1] == f"{row.mean:.1f}"  # of one student
    costs = [f"{found.metrics.ot_cost['random']:.4g}" for found in wanted.values()]
    assert cells(page, "transport", "random</th>") == costs
    assert cells(page, "settings", ">ipc</th>") == ["1", "2"]
    assert "train.epochs" not in seen.text  # the same in both
    assert sorted(p.name for p in page.parent.iterdir()) == ["index.html", "runs-00000.png"]
    alts = [image["alt"] for image in seen.of("img")]
    assert alts.count("2 images of class 3 in the set random") == 1
    assert alts.count("1 image of class 3 in the set random") == 1
    again = report_several([runs / "one <b>", runs / "$two$"], tmp_path / "again", pdf=True)
    assert again.read_bytes() == page.read_bytes()
    assert (again.parent / "runs-00000.pdf").is_file()
    report_several([runs / "$two$", runs / "one <b>"], tmp_path / "again")  # replaces it
    assert not (again.parent / "runs-00000.pdf").exists()


def test_other_settings(runs, tmp_path):
    page = report_several([runs / "$two$", runs / "again"], tmp_path / "page.html", classes=3)
    seen = read(page)
    assert list(tmp_path.iterdir()) == [page]
    assert cells(page, "settings", "train.lr</th>")[1] == "0.5"
    assert cells(page, "settings", ">sets</th>") == ["random, kmeans", "random"]
    assert cells(page, "accuracy", "kmeans</th>")[1] == ""
    assert "The first 3 of 10 classes." in seen.text
    assert "by run, hard, CE" in seen.text


def test_lines_need_images_per_class_that_differ(runs):
    one, two, again = (gather(runs / name) for name in ("one <b>", "$two$", "again"))
    assert grows(named([one, two]))
    assert not grows(named([one, two, again]))


def test_runs_called_alike_are_numbered(runs, tmp_path):
    copy = shutil.copytree(runs / "$two$", tmp_path / "$two$")
    found = named([gather(runs / "$two$"), gather(copy), gather(runs / "again")])
    assert list(found) == ["$two$", "$two$ (2)", "again"]


def test_a_run_that_is_not_finished(runs, tmp_path):
    copy = shutil.copytree(runs / "$two$", tmp_path / "half")
    (copy / "metrics.json").unlink()
    seen = read(report_several([runs / "one <b>", copy], tmp_path / "page"))
    assert "half: the table and the transport costs: otdd evaluate" in seen.text


def test_what_is_refused(runs, tmp_path):
    written_set(tmp_path / "photos", ["a", "b", "c"])
    one = runs / "one <b>"
    with pytest.raises(StoreError, match=r"photos \(toy: 3 .* is of other data than .*10"):
        report_several([one, tmp_path / "photos"], tmp_path / "page")
    with pytest.raises(ConfigError, match="one <b>' is not accepted; expected every folder once"):
        report_several([one, f"{one}/."], tmp_path / "page")
    with pytest.raises(ConfigError, match="two folders of runs or more"):
        report_several([one], tmp_path / "page")
    with pytest.raises(StoreError, match="no such folder"):
        report_several([one, tmp_path / "gone"], tmp_path / "page")
    with pytest.raises(StoreError, match="no report of otdd"):
        report_several([one, runs / "again"], one)
    assert not (tmp_path / "page").exists()


def test_command(runs, tmp_path, capsys):
    folders = [str(runs / "one <b>"), str(runs / "$two$")]
    assert tools.report([*folders, "--out", str(tmp_path / "page"), "--quiet"]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'page' / 'index.html'}\n"
    assert tools.report(["--dir", *folders, "--out", str(tmp_path / "page"), "--quiet"]) == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *folders])
    assert stop.value.code == 2
    assert "--out: give a folder or a .html file" in capsys.readouterr().err
