"""The README's student in plain PyTorch reaches what a run reports."""

import json
import re
from pathlib import Path

import pytest
from distill.finished_run import DATA, settings

from otdd.distill.match import accuracy
from otdd.distill.pipeline import run

README = Path(__file__).parents[2] / "README.md"
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "run"
    given = {"relabel": {"teacher_epochs": 2}, "train": {"losses": ["kl"], "epochs": 80}}
    run(settings(out, ipc=1, seeds=len(SEEDS), sets=["random"], **given))
    return out


def test_student_of_the_readme_reaches_what_evaluate_reports(folder):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "distilled.replay()" in block]
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 20
    reached = []
    for seed in SEEDS:
        mine = code.replace(
            'otdd.load("runs/digits-ipc1")', f'otdd.load({str(folder)!r}, set="random")'
        )
        names = {}
        exec(mine.replace("manual_seed(0)", f"manual_seed({seed})"), names)
        assert mine != code
        average, normalise = names["average"], names["distilled"].normalise
        average.forward = lambda x, net=average.module, norm=normalise: net(norm(x))
        reached.append(accuracy(average, DATA.test))
    (row,) = json.loads((folder / "metrics.json").read_text())["accuracy"]
    assert reached == pytest.approx(row["runs"], abs=0.5)
