"""Teachers and soft labels: counts, replay, resume, live and stored alike."""

import dataclasses

import pytest
import torch

from otdd.distill import relabel as stage
from otdd.distill.config import ConfigError
from otdd.distill.data import load_data
from otdd.distill.settings import resolve
from otdd.distill.store import Store

DATA = load_data("digits")
CONFIG = resolve(
    {
        "data": "digits",
        "ipc": 1,
        "out": "unused",
        "relabel": {"teacher_epochs": 1},
        "train": {"epochs": 3, "batch": 4},
    }
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store.open(tmp_path_factory.mktemp("store"), {})
    first = [int((DATA.train.labels == k).nonzero()[0]) for k in range(10)]
    store.write_images("random", DATA.train.images[first], torch.arange(10))
    return store


@pytest.fixture(scope="module")
def teachers(store):
    return stage.make_teachers(store, DATA, CONFIG)


@pytest.mark.parametrize(("ipc", "count"), [(1, 1), (9, 1), (10, 2), (50, 4), (100, 8), (500, 8)])
def test_auto_follows_the_images_per_class(ipc, count):
    names = stage.teacher_names(dataclasses.replace(CONFIG, ipc=ipc))
    assert len(names) == count
    assert names[0] == "convnet"


def test_teachers_learn_and_are_kept(store, teachers):
    assert teachers[0].accuracy > 50
    file = store.path / "teachers/convnet-0.safetensors"
    written = file.stat().st_mtime_ns
    again = stage.make_teachers(store, DATA, CONFIG)
    assert again[0].digest == teachers[0].digest
    assert file.stat().st_mtime_ns == written


def test_two_teachers_of_one_architecture_differ_and_labels_are_mean_logits(store):
    both = dataclasses.replace(CONFIG.relabel, teachers=("convnet", "convnet"))
    made = stage.make_teachers(store, DATA, dataclasses.replace(CONFIG, relabel=both))
    assert made[0].digest != made[1].digest
    x = DATA.test.images[:5].float() / 255
    mean = (made[0].network(x) + made[1].network(x)) / 2
    assert torch.equal(stage.soft_labels(made, x), mean.half())


def test_checkpoint_as_teacher(store, teachers):
    file = store.path / "teachers/convnet-0.safetensors"
    settings = dataclasses.replace(CONFIG.relabel, teachers=(f"convnet={file}",))
    made = stage.make_teachers(store, DATA, dataclasses.replace(CONFIG, relabel=settings))
    assert made[0].digest == teachers[0].digest


def test_unavailable_timm_teacher_is_a_clear_error(store):
    settings = dataclasses.replace(CONFIG.relabel, teachers=("timm:no_such_model",))
    with pytest.raises(ConfigError, match="timm:no_such_model cannot be had"):
        stage.make_teachers(store, DATA, dataclasses.replace(CONFIG, relabel=settings))


def test_stored_labels_are_those_of_the_crops_the_student_sees(store, teachers):
    stage.relabel(store, DATA, teachers, CONFIG, "random")
    assert stage.relabelled(store, DATA, CONFIG, "random")
    images = store.read_images("random")["images"]
    stored = list(stage.stored_steps(store, DATA, CONFIG, "random"))
    live = list(stage.live_steps(images, DATA, teachers, CONFIG))
    assert len(stored) == len(live) == 3 * 3
    for one, other in zip(stored, live, strict=True):
        seen = one.batch.apply(images)
        assert torch.equal(seen, other.batch.apply(images))
        assert torch.equal(one.teacher, other.teacher)
        assert torch.equal(one.teacher, stage.soft_labels(teachers, seen).float())


def test_shards_resume_to_the_same_bytes(store, teachers, monkeypatch):
    monkeypatch.setattr(stage, "SHARD_BYTES", 1)
    images = store.read_images("random")
    store.write_images("kmeans", images["images"], images["labels"])
    seen = []
    stage.relabel(store, DATA, teachers, CONFIG, "kmeans", lambda *a: seen.append(a))
    assert seen == [("relabel kmeans", n, 3) for n in (0, 1, 2, 3)]
    shards = [store.path / stage.shard_name("kmeans", i) for i in range(3)]
    before = [s.read_bytes() for s in shards]
    shards[1].unlink()
    assert not stage.relabelled(store, DATA, CONFIG, "kmeans")
    stage.relabel(store, DATA, teachers, CONFIG, "kmeans")
    assert [s.read_bytes() for s in shards] == before
    assert len(list(stage.stored_steps(store, DATA, CONFIG, "kmeans"))) == 9


def test_hard_steps_differ_by_seed():
    one, other = (list(stage.hard_steps(10, DATA, CONFIG, seed)) for seed in (0, 1))
    assert all(step.teacher is None for step in one)
    assert not torch.equal(one[0].batch.theta, other[0].batch.theta)
