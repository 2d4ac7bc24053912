"""Logs of students in TensorBoard, and the curves of a run."""

import io
import json

import pytest
from distill.finished_run import finished_run, settings
from PIL import Image

from otdd.distill import curves, logs
from otdd.distill.config import ConfigError
from otdd.distill.evaluate import Student
from otdd.distill.logs import read_log
from otdd.distill.prepare import prepare
from otdd.distill.store import Store

TRAIN = {"epochs": 3, "batch": 8, "losses": ["ce", "kl"], "tensorboard": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("logs") / "run"
    finished_run(out, train=TRAIN)
    return out


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_rows_of_the_csv(folder):
    student = Student("convnet", "kl", 0)
    log = read_log(Store(folder), student.file("logs", "random"))
    seen = scalars(folder / student.file("logs/tensorboard", "random"))
    assert set(seen) == set(log) - {"epoch"}
    assert [event.step for event in seen["loss"]] == log["epoch"] == [1, 2, 3]
    assert [event.value for event in seen["loss"]] == pytest.approx(log["loss"], rel=1e-4)


def test_a_resumed_student_goes_on_in_tensorboard(tmp_path):
    columns = ("epoch", "loss")
    board = logs.Board(Store(tmp_path), "b", 0)
    for epoch in (1, 2, 3):
        board.add(columns, [epoch, 10.0 * epoch])
    board.close()
    again = logs.Board(Store(tmp_path), "b", 1)  # the checkpoint was that of the first epoch
    for epoch in (2, 3):
        again.add(columns, [epoch, 100.0 * epoch])
    again.close()
    seen = [(event.step, event.value) for event in scalars(tmp_path / "b")["loss"]]
    assert seen == [(1, 10.0), (2, 200.0), (3, 300.0)]


def test_without_its_package_tensorboard_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.tensorboard: .* pip install tensorboard"):
        prepare(settings(tmp_path / "run", train=TRAIN))
    assert not (tmp_path / "run").exists()
    prepare(settings(tmp_path / "run", train={**TRAIN, "tensorboard": False}))


def test_curves_of_a_run_are_a_picture_of_its_logs(folder):
    written = (folder / "curves.png").read_bytes()
    with Image.open(io.BytesIO(written)) as picture:
        assert picture.size[0] > picture.size[1] > 200  # two panels
        assert len(picture.getcolors(10**6)) > 100
    made = {
        ("convnet", loss): {
            name: [
                read_log(Store(folder), Student("convnet", loss, 0).file("logs", name))[
                    "train_accuracy"
                ]
            ]
            for name in ("random", "kmeans")
        }
        for loss in ("ce", "kl")
    }
    assert curves.curves(made) == written
    made["convnet", "ce"]["random"][0][1] += 20
    assert curves.curves(made) != written
    assert json.loads((folder / "metrics.json").read_text())["config"]["train"]["tensorboard"]
