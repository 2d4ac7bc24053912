"""The benchmarks keep working: a tiny problem of each kind, by all contenders installed."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import ablation
import ablation_guidance
import ablation_labels
import ablation_report
import cases
import digits
import fit_textures
import floors
import guidance_share
import label_formats
import measure
import order
import pytest
import report
import student_step
import torch
from contender import DISAGREES
from distill import tiny
from peers import CONTENDERS

from otdd.distill.config import RelabelConfig
from otdd.distill.fit import FitConfig, fit
from otdd.distill.relabel import Plan, Teacher
from otdd.distill.training import Step

TINY = [
    cases.Case("given", "given", 2, 6, 5, iterations=4),
    cases.Case("ragged", "given", 2, 8, 7, iterations=4, masked=True),
    cases.Case("l1", "points", 2, 6, 5, 3, "l1", iterations=4),
    cases.Case("sqeuclidean", "points", 1, 6, 5, 3, "sqeuclidean", iterations=4),
    cases.Case("logits", "logits", 1, 6, 6, 5, "l1", iterations=4),
    cases.Case("row", "row", 1, 6, 5, 3, "l1", iterations=4),
    cases.Case("metric", "metric", 1, 6, 5, 3, "l1", iterations=1),
]
SLOW_TO_START = ("torch.compile", "KeOps", "OTT")
BUDGET = measure.Budget(seconds=1e-4, call=1.0, rounds=2)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_contenders_agree_with_the_oracle_or_say_why_not(case, contender):
    if any(name in contender.name for name in SLOW_TO_START):
        pytest.skip("compiles")
    if reason := contender.missing():
        pytest.skip(reason)
    data = cases.make(case, torch.float64)
    for direction in case.directions:
        row, run, _ = measure.prepare(contender, case, data, "float64", direction, BUDGET)
        if contender.name == "otdd":
            assert run is not None, row
        starts_alike = not (case.masked and "POT" in contender.name)  # it starts at masked ones too
        if starts_alike and contender.name.startswith(("otdd", "torch", "POT log", "SinKD")):
            assert row.get("reason") != DISAGREES, row
            assert "Error" not in row.get("reason", ""), row


def test_rows_have_times_and_ratios(monkeypatch):
    names = {"otdd", "torch loop"}
    monkeypatch.setattr(measure, "CONTENDERS", [c for c in CONTENDERS if c.name in names])
    row = measure.measure(TINY[0], "float32", "forward+backward", quick=True)
    for contender in row["contenders"].values():
        assert 0 < contender["min_ms"] <= contender["median_ms"]
        assert contender["ratio"] > 0
        assert len(contender["times_ms"]) == contender["rounds"]
    assert row["contenders"]["otdd"]["ratio"] == pytest.approx(1)


def test_report_of_a_result_file(tmp_path):
    contenders = {
        "otdd": {"median_ms": 2.0, "ratio": 1.0},
        "torch loop": {"median_ms": 30.0, "ratio": 15.0},
    }
    row = {"dtype": "float32", "direction": "forward", "contenders": contenders, "iterations": 20}
    row |= {"fastest_safe_peer": "torch loop", "ratio_to_it": 15.0, "ratio_to_pot_exp": None}
    row |= {"floor_ms": 0.5, "of_floor": 0.25}
    rows = [row | {"case": c, "threads": t} for c in ("small", "scaling-64") for t in (1, 2)]
    text = report.table({"rows": rows})
    line = "| 2.0 ms | 15.0x torch loop | - | 25 % "
    assert text.splitlines()[2:] == [f"| small, forward {line * 2}|"]
    readme = tmp_path / "README.md"
    readme.write_text("a\n" + "\nold\n".join(report.MARKERS) + "\nz\n")
    report.into_readme(readme, text)
    assert readme.read_text() == "a\n" + f"\n{text}\n".join(report.MARKERS) + "\nz\n"
    pytest.importorskip("matplotlib")
    report.plot({"rows": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_readme_has_the_table_of_the_digits():
    first, last = digits.MARKERS
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.is_file():
        pytest.skip("not run from the sources")
    text = digits.table(digits.results())
    assert f"{first}\n{text}\n{last}" in readme.read_text(encoding="utf-8")


def test_pages_have_the_tables_of_the_ablations():
    root = Path(__file__).parents[1]
    if not (root / "README.md").is_file():
        pytest.skip("not run from the sources")
    files = map(ablation_report.cells, ("labels", "chance", "today"))
    for name, (page, text) in ablation_report.pages(*files).items():
        shown = (root / page).read_text(encoding="utf-8")
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in shown, f"{page}: {name}"


def test_every_contender_takes_part_in_turn():
    seen = []
    runs = {name: lambda name=name: seen.append(name) for name in "ab"}
    budget = measure.Budget(seconds=1.0, call=1.0, rounds=3)
    times = measure.interleaved(runs, {"a": 0.01, "b": 0.01}, budget)
    assert [len(t) for t in times.values()] == [3, 3]
    assert seen == ["a", "a", "b", "b"] * 3  # each an untimed call, then a timed one


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_floors_are_positive_and_gradients_add_work(case):
    rates = dict.fromkeys(("copy_near", "copy_far", "gemm", "fma", "exp"), 1e9)
    forward, backward = (
        floors.floor_ms(cases.work(case, direction, 4, 1 << 20), rates)
        for direction in ("forward", "backward" if case.kind == "metric" else "forward+backward")
    )
    assert 0 < forward < backward < math.inf


def test_parts_are_cut_to_what_an_oracle_can_do():
    for case in cases.CASES:
        piece = cases.part(case)
        assert piece.B * piece.N * piece.M * max(piece.D, 1) <= 2**27
        assert min(piece.B, piece.N, piece.M) >= 1


def test_step_of_a_student_is_measured():
    row = student_step.measure(batch=2, size=32, classes=10, rounds=2)
    assert len(row["median_ms"]) == 6
    assert row["median_ms"]["loss with"] < row["median_ms"]["step without"]


@pytest.mark.parametrize("batch", [1, 3])
def test_share_of_guidance_in_a_step_is_measured(monkeypatch, batch):
    monkeypatch.setitem(guidance_share.MODELS, "tiny", (1, 2))
    row = guidance_share.measure("tiny", batch, "default", references=8, rounds=3)
    times = row["median_ms"]
    assert 0 < times["of it sinkhorn"] < times["guidance"]
    assert row["share_of_unguided_step"] > 0


def test_orders_of_sampling_are_measured():
    row = order.measure("digits", classes=2, ipc=3, steps=2, rounds=1)
    assert (row["joint"]["batch"], row["sequential"]["batch"]) == (6, 2)
    for found in (row["joint"], row["sequential"]):
        assert 0 < found["share_of_denoiser"] < 1
        assert found["images_per_second"] > 0


def cells(monkeypatch, module, out, *flags):
    """The cells of a file after a command of one epoch at one image per class."""
    monkeypatch.setattr(sys, "argv", [
        "prog", "--ipc", "1", "--epochs", "1", "--out", str(out), *flags
    ])  # fmt: skip
    module.main()
    return json.loads(out.read_text())["cells"]


def test_guidance_ablation_goes_on_and_its_variants_differ(monkeypatch, tmp_path):
    out = tmp_path / "cells.json"
    names = ["default", "target-z_t", "kmeans", "cfg-2", "unguided", "unguided-cfg-2"]
    few = ["--variants", *names, "--seeds"]
    first = cells(monkeypatch, ablation_guidance, out, *few, "3")
    both = cells(monkeypatch, ablation_guidance, out, *few, "3", "4")
    assert both[:6] == first
    assert [row["seed"] for row in both] == [3] * 6 + [4] * 6
    for part in (both[:6], both[6:]):
        assert len({row["digest"] for row in part}) == 6
    assert ablation_report.guidance_table(both, range(10)).count("\n") == 7


def test_label_ablation_goes_on_and_its_arms_differ(monkeypatch, tmp_path):
    monkeypatch.setattr("otdd.distill.relabel.TEACHER_STEPS", 1)
    monkeypatch.setattr("otdd.distill.relabel.TEACHER_EPOCHS", 1)
    out, work = tmp_path / "cells.json", ["--work", str(tmp_path / "work"), "--archs", "convnet"]
    some = [*work, "--seeds", "0", "1", "--arms", "full", "no-otm"]
    first = cells(monkeypatch, ablation_labels, out, *some, "no-lia", "batch-10")
    assert len(first) == 4  # no-lia and batch-10 are `full` itself at IPC 1
    rows = cells(monkeypatch, ablation_labels, out, *some, "no-otg", "hard-no-otg", "share-0.3")
    assert rows[:4] == first
    by_arm = {row["arm"]: row for row in rows if row["seed"] == 0}
    assert set(by_arm) == {"full", "no-otm", "no-otg", "hard-no-otg", "share-0.3"}
    assert len({row["student"] for row in by_arm.values()}) == 5
    sets = {arm: row["digest"] for arm, row in by_arm.items()}
    assert sets["full"] == sets["no-otm"] == sets["share-0.3"]
    assert sets["full"] != sets["no-otg"] == sets["hard-no-otg"]
    assert by_arm["full"]["shares"][0] > 0 == by_arm["no-otm"]["shares"][0]
    text = ablation_report.labels_table(rows, ["no-lia", "no-otg"], lambda arm: "full")
    assert text.splitlines()[3] == "| `no-lia` | the same |"
    third = [{**row, "seed": 2} for row in rows if row["seed"] == 1]  # of two none is drawn
    ablation_report.plot_arms(rows + third, tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 1000


def test_formats_of_labels_are_compared_on_the_same_steps(monkeypatch, tmp_path):
    monkeypatch.setattr("otdd.distill.relabel.TEACHER_STEPS", 1)
    monkeypatch.setattr("otdd.distill.relabel.TEACHER_EPOCHS", 1)
    out, some = tmp_path / "cells.json", ["--work", str(tmp_path / "work"), "--losses", "otm"]
    first = cells(monkeypatch, label_formats, out, *some, "--seeds", "0", "--formats", "fp16")
    few = ["--seeds", "0", "--formats", "fp16", "q8", "topk-1"]
    rows = cells(monkeypatch, label_formats, out, *some, *few)
    assert rows[:1] == first
    assert [row["labels"] for row in rows] == ["fp16", "q8", "topk-1"]
    assert len({row["student"] for row in rows}) == 3
    assert len({row["digest"] for row in rows}) == 1
    text = ablation_report.formats_table(rows)
    assert text.splitlines()[0] == "| labels | digits, IPC 1, `otm` |"
    assert len(text.splitlines()) == 5


def test_steps_with_few_labels_come_again_as_in_training():
    campaign = ablation_labels.Campaign("digits", None, ["convnet"], Path("unused"), 5)
    config = label_formats.settings(campaign, 6, 0)  # 60 images: two batches an epoch
    relabel = RelabelConfig(label_format="q8", label_epochs=2)
    plan = Plan.of(dataclasses.replace(config, relabel=relabel), campaign.data, 60)
    drawn = [batch for epoch in range(5) for batch in plan.epoch(epoch)]
    logits = torch.randn(10, 50, 10).half()
    steps = [Step(batch, rows.float()) for batch, rows in zip(drawn, logits, strict=True)]
    got = list(label_formats.recoded(steps, plan, campaign))
    assert [step.batch for step in got] == (drawn[:4] * 3)[:10]
    apart = (got[5].teacher - logits[1].float()).abs()
    assert 0 < apart.max() <= (logits[1].max() - logits[1].min()).float() / 2 / 255 + 1e-3


def test_arms_of_the_sweep_change_what_they_name():
    usual = ablation_labels.objective("full")
    assert (usual.ot.tau, usual.ot.eps, usual.beta_2) == (2.0, 0.1, 0.08)
    for arm, value in {"tau-4": 4.0, "eps-0.02": 0.02, "beta_2-8": 8.0}.items():
        made = ablation_labels.objective(arm)
        seen = {"tau": made.ot.tau, "eps": made.ot.eps, "beta_2": made.beta_2}
        assert seen == {"tau": 2.0, "eps": 0.1, "beta_2": 0.08} | {arm.split("-")[0]: value}
    assert ablation_labels.objective("no-otm-batch-10").beta_2 == 0
    assert ablation_labels.objective("share-0.3").beta_2_share == 0.3


def test_intervals_are_paired_by_seed():
    got = ablation.paired({1: 91.0, 2: 72.0, 3: 53.0, 7: 0.0}, {3: 50.0, 2: 70.0, 1: 90.0})
    assert got["n"] == 3
    assert got["mean"] == pytest.approx(2)
    # The 97.5 % quantile of Student's t with two degrees of freedom is 4.3027.
    assert got["high"] - 2 == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert 2 - got["low"] == pytest.approx(got["high"] - 2)
    same = dict.fromkeys(range(3), 1.0)
    assert ablation_report.difference(same, same, 3) == "+0.0 ± 0.0"
    assert ablation_report.difference({1: 3.0, 2: 2.0}, same, 3) == "+1.5 (2)"


def test_a_continued_fit_forgets_what_it_does_again(tmp_path):
    report = fit_textures.Report(tmp_path / "fit.json", {"data": "toy"})
    report.begin(0)
    for step, right in ((10, 50.0), (20, 85.0), (30, 90.0)):
        seen = {"right": {"1": right - 15, "2": right}}
        report.add({"step": step, "cpu_minutes": step / 10, "wall_minutes": 1.0, **seen})
    again = fit_textures.Report(tmp_path / "fit.json", {"data": "toy"})
    again.begin(20)
    assert [row["step"] for row in again.rows] == [10, 20]
    spent = again.spent()
    assert 2.0 <= spent["cpu_minutes"] < 2.5
    again.add({"step": 30, **spent, "right": {"1": 79.9, "2": 70.0}})
    content = json.loads((tmp_path / "fit.json").read_text())
    assert content["cpu_minutes_to_80"] == {"1": None, "2": 2.0}


def test_samples_are_judged_by_class(tmp_path):
    data = tiny.images()
    config = FitConfig(width=32, layers=1, steps=1, batch=4, grid_every=0)
    made = fit(data, config, tmp_path / "g.safetensors")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    torch.nn.init.zeros_(network[1].weight)
    network[1].bias.data = torch.tensor([0.0, 1.0, 0.0])  # says c1 of everything
    teacher = Teacher("toy", network, "", 0.0)
    seen = fit_textures.judged(made, teacher, 2, (1.0, 2.5))
    wanted = {"c0": 0.0, "c1": 100.0, "c2": 0.0}
    assert seen["by_class"] == {"1": wanted, "2.5": wanted}
    assert seen["images"] == 6
    assert seen["right"] == pytest.approx(dict.fromkeys(("1", "2.5"), 33.33))
