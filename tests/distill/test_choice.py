"""How many teachers: by a table, named, or measured on real images that no student has seen."""

import dataclasses
import json

import pytest
import torch
from distill.finished_run import DATA, finished_run, settings

from otdd.distill import choice
from otdd.distill.config import ConfigError
from otdd.distill.prepare import prepare
from otdd.distill.relabel import Teacher, make_teachers, teacher_names
from otdd.distill.store import Store


class Knows(torch.nn.Module):
    """Right about the real images that it was shown, `error` of them aside."""

    def __init__(self, error, seed):
        super().__init__()
        self.error, self.seed = error, seed

    def forward(self, x):
        rng = torch.Generator().manual_seed(self.seed)
        wrong = torch.rand(len(x), generator=rng) < self.error
        real = DATA.train.images.float().flatten(1) / 255
        labels = DATA.train.labels[torch.cdist(x.flatten(1), real).argmin(1)]
        labels = torch.where(wrong, (labels + 1) % 10, labels)
        return 8 * torch.nn.functional.one_hot(labels, 10).float()


def teachers(errors):
    made = [Knows(error, seed) for seed, error in enumerate(errors)]
    return [Teacher(f"t{n}", net, str(n), 0.0) for n, net in enumerate(made)]


def config(out="x", epochs=12, **relabel):
    given = {"teachers": ["auto:measured"], "teacher_epochs": 1, **relabel}
    train = {"epochs": epochs, "batch": 20, "losses": ["ce", "kl"]}
    return settings(out, ipc=5, sets=["random"], relabel=given, train=train)


def test_held_out_images_are_real_ones_that_no_student_learns_from():
    learnt, held = choice._split(DATA, config())
    assert learnt.labels.bincount().tolist() == [5] * 10
    assert held.labels.bincount().tolist() == [100] * 10
    every = [set(map(bytes, part.images.flatten(1).numpy())) for part in (learnt, held)]
    real = set(map(bytes, DATA.train.images.flatten(1).numpy()))
    assert every[0] | every[1] <= real
    assert len(every[0] & every[1]) == 0


def test_more_teachers_are_taken_where_they_help(tmp_path):
    store = Store.open(tmp_path, {})
    noisy = teachers([0.45] * 4)  # each wrong about others: the mean is better than any
    chosen = choice.choose(store, DATA, config(), noisy)
    said = store.read_json("teachers.json")
    assert [one["count"] for one in said["candidates"]] == [1, 2, 4]
    assert said["candidates"][2]["mean"] > said["candidates"][0]["mean"] + 3
    assert [t.name for t in chosen] == ["t0", "t1", "t2", "t3"]
    assert said["rule"] == "measured"
    assert said["why"].startswith("4 of 4 teachers: validation accuracy ")
    alike = teachers([0.0] * 4)
    one = choice.choose(Store.open(tmp_path / "b", {}), DATA, config(epochs=6), alike)
    assert [t.name for t in one] == ["t0"]


def test_a_choice_is_kept(tmp_path, monkeypatch):
    store = Store.open(tmp_path, {})
    store.write_json("teachers.json", {"teachers": [1, 2]})
    monkeypatch.setattr(choice, "measure", None)
    kept = choice.choose(store, DATA, config(), teachers([0.0] * 4))
    assert [t.name for t in kept] == ["t0", "t1"]


def test_smallest_within_one_standard_error_of_the_best():
    def found(*means):
        return [
            {"count": 2**n, "mean": mean, "standard_error": 0.5} for n, mean in enumerate(means)
        ]

    assert choice.smallest_good(found(90.0, 91.6, 92.0, 91.0))[0] == 2
    assert choice.smallest_good(found(90.0, 91.4, 92.0, 91.0))[0] == 4
    assert choice.smallest_good(found(92.0))[0] == 1


def test_reasons_of_the_other_rules(tmp_path):
    out = tmp_path / "run"
    finished_run(out, sets=["random"])
    said = json.loads((out / "teachers.json").read_text())
    assert said["rule"] == "table"
    assert "2 images per class" in said["why"]
    assert said["why"].endswith("has 1")
    metrics = json.loads((out / "metrics.json").read_text())
    kept = [{k: t[k] for k in ("name", "accuracy")} for t in said["teachers"]]
    assert metrics["teachers"] == kept
    store, named = Store(out), settings(out, relabel={"teachers": ["convnet"], "teacher_epochs": 1})
    choice.choose(Store(tmp_path / "named"), DATA, named, make_teachers(store, DATA, named))
    assert json.loads((tmp_path / "named/teachers.json").read_text())["rule"] == "named"


def test_measured_needs_images_to_hold_out_and_stands_alone(tmp_path):
    measured = config(tmp_path / "o")
    assert len(teacher_names(measured)) == 8
    with pytest.raises(
        ConfigError, match=r"ipc: 121 is not accepted; expected fewer than the 121 "
    ):
        prepare(dataclasses.replace(measured, ipc=121))
    with pytest.raises(ConfigError, match=r"relabel\.teachers: .* auto:measured alone"):
        config(teachers=["auto:measured", "convnet"])


def test_auto_stands_once():
    """`auto auto` was a number of teachers that no table has, and a reason that told another."""
    with pytest.raises(ConfigError, match=r"relabel\.teachers: .* expected auto once"):
        config(teachers=["auto", "auto"])
    assert teacher_names(config(teachers=["auto", "convnet"])) == ["convnet", "convnet"]
