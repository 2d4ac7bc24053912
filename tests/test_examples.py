"""The scripts of examples/ and the notebook, run as they are; what they print must be so."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

if not EXAMPLES.is_dir():
    pytest.skip("not run from the sources", allow_module_level=True)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "digits"


@pytest.fixture
def execute(monkeypatch):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_all_examples_are_here():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    names = {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert names
    assert names <= tests


def test_sinkhorn_batch(execute):
    seen = execute("sinkhorn_batch.py")
    assert seen["result"].converged.all()
    assert seen["masked"] == 0
    assert seen["after"] < seen["before"]
    assert seen["warm"].n_iter.max() < seen["result"].n_iter.max()


def test_point_clouds(execute):
    seen = execute("point_clouds.py")
    assert seen["losses"][-1] < 1e-3 * seen["losses"][0]
    assert abs(seen["radius"].mean() - 1) < 0.05
    assert seen["costs"][1.0] < 0.1 * seen["costs"][None]


def test_dataset_distance(execute):
    seen = execute("dataset_distance.py")
    itself, more, renamed, flipped, shuffled = (d.item() for d in seen["distances"].values())
    assert abs(itself) < 1e-3 < more
    assert renamed == pytest.approx(more, rel=1e-3)
    assert more < min(flipped, shuffled)
    assert seen["after"] < seen["before"]


def test_guide_a_diffusion_model(execute):
    seen = execute("guide_a_diffusion_model.py")
    assert (seen["costs"]["guided"] < seen["costs"]["unguided"]).all()
    assert len(seen["images"]) == len(seen["wanted"])


def test_distil_digits(execute, run_folder):
    seen = execute("distil_digits.py", "--out", run_folder, "--quick")
    costs = seen["metrics"]["ot_cost"]
    assert costs["otg"] < costs["random"]
    assert len(seen["distilled"]) == 10


def test_train_on_soft_labels(execute, run_folder):
    if not run_folder.exists():  # run alone, or by another process than the test above
        execute("distil_digits.py", "--out", run_folder, "--quick")
    seen = execute("train_on_soft_labels.py", run_folder)
    assert seen["losses"][-1] < seen["losses"][0]
    assert seen["accuracy"] > 20  # chance is 10


def test_tour(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.close("all")
    seen = {"__name__": "__main__"}
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), seen)
    assert seen["history"][-1] < 0.01 * seen["history"][0]
    assert seen["masses"][2.0] < seen["masses"][None]
    assert seen["same"] < seen["other"]
    assert seen["metrics"]["ot_cost"]["otg"] < seen["metrics"]["ot_cost"]["random"]
    assert len(pyplot.get_fignums()) == 4
    pyplot.close("all")
