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


def test_logits_beyond_float16_are_refused(store, teachers):
    """They were stored as infinite, and a student said that its learning rate was too large."""
    large = dataclasses.replace(teachers[0], name="large", network=Scaled(teachers[0].network))
    with pytest.raises(
        ConfigError, match=r"relabel\.teachers: large gives logits that are not fin"
    ):
        stage.relabel(store, DATA, [teachers[0], large], CONFIG, "random")
    assert not store.has("sets/random/labels")


class Scaled(torch.nn.Module):
    """A teacher of large logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return 1e6 * self.network(x)


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


FORMATS = {
    "topk": {"label_format": "topk", "top_k": 3},
    "q8": {"label_format": "q8"},
    "q4": {"label_format": "q4"},
}


def labelled(store, teachers, name, **settings):
    """A copy of the set, labelled in a format, and the configuration of it."""
    relabel = dataclasses.replace(CONFIG.relabel, **settings)
    config = dataclasses.replace(CONFIG, relabel=relabel)
    images = store.read_images("random")
    store.write_images(name, images["images"], images["labels"])
    stage.relabel(store, DATA, teachers, config, name)
    return config


@pytest.mark.parametrize("kind", FORMATS)
def test_compact_labels_replay_bit_for_bit(store, teachers, kind):
    config = labelled(store, teachers, kind, **FORMATS[kind])
    images = store.read_images(kind)["images"]
    stored = list(stage.stored_steps(store, DATA, config, kind))
    live = list(stage.live_steps(images, DATA, teachers, config))
    assert len(stored) == len(live) == 9
    for one, other in zip(stored, live, strict=True):
        assert torch.equal(one.batch.apply(images), other.batch.apply(images))
        assert torch.equal(one.teacher, other.teacher)
        assert one.batch.targets(torch.arange(10), 10, (8, 8)).shape == (4, 10)


@pytest.mark.parametrize("kind", FORMATS)
def test_error_of_compact_labels(store, teachers, kind):
    """Against float16, on the labels of a teacher of digits."""
    whole = list(stage.stored_steps(store, DATA, labelled(store, teachers, "f"), "f"))
    config = labelled(store, teachers, f"{kind}-error", **FORMATS[kind])
    small = list(stage.stored_steps(store, DATA, config, f"{kind}-error"))
    want = torch.cat([step.teacher for step in whole])
    got = torch.cat([step.teacher for step in small])
    apart = (got.softmax(1) - want.softmax(1)).abs().sum(1) / 2
    if kind in ("q8", "q4"):
        level = (want.amax(1) - want.amin(1)) / {"q8": 255, "q4": 15}[kind]
        assert ((got - want).abs().amax(1) <= 0.5001 * level).all()
        assert apart.max() < {"q8": 0.01, "q4": 0.15}[kind]
    else:
        assert torch.equal(got.argmax(1), want.argmax(1))
        top = want.topk(3).indices
        assert torch.equal(got.gather(1, top), want.gather(1, top))
        kept = [t.softmax(1).gather(1, top) for t in (got, want)]
        torch.testing.assert_close(*kept, rtol=2e-3, atol=2e-4)
        assert apart.mean() < 0.1  # soft, after one epoch


def test_labels_of_another_format_are_refused(store, teachers):
    made = labelled(store, teachers, "other", **FORMATS["topk"])
    says = "relabel.label_format: 'fp16' is not accepted; expected 'topk' with relabel.top_k 3, as"
    for use in (
        lambda: stage.relabel(store, DATA, teachers, CONFIG, "other"),
        lambda: next(stage.stored_steps(store, DATA, CONFIG, "other")),
    ):
        with pytest.raises(ConfigError, match=says):
            use()
    assert stage.relabelled(store, DATA, made, "other")


def test_hard_steps_differ_by_seed():
    one, other = (list(stage.hard_steps(10, DATA, CONFIG, seed)) for seed in (0, 1))
    assert all(step.teacher is None for step in one)
    assert not torch.equal(one[0].batch.theta, other[0].batch.theta)


def test_plain_steps_are_the_images_in_the_order_of_the_augmented_ones():
    plain, drawn = (list(stage.hard_steps(10, DATA, CONFIG, 0, plain=p)) for p in (True, False))
    images = DATA.train.images[:10]
    for one, other in zip(plain, drawn, strict=True):
        assert torch.equal(one.batch.index, other.batch.index)
        torch.testing.assert_close(one.batch.apply(images), images[one.batch.index].float() / 255)
        assert not torch.equal(other.batch.apply(images), one.batch.apply(images))


@pytest.mark.parametrize("shard_bytes", [1, stage.SHARD_BYTES])
def test_few_labelled_epochs_come_again_and_again(store, teachers, monkeypatch, shard_bytes):
    monkeypatch.setattr(stage, "SHARD_BYTES", shard_bytes)
    few = dataclasses.replace(CONFIG.relabel, label_epochs=2)
    train = dataclasses.replace(CONFIG.train, epochs=5)
    config = dataclasses.replace(CONFIG, relabel=few, train=train)
    name = f"few-{shard_bytes}"
    images = store.read_images("random")
    store.write_images(name, images["images"], images["labels"])
    stage.relabel(store, DATA, teachers, config, name)
    assert stage.relabelled(store, DATA, config, name)
    shards = sorted(p.name for p in (store.path / f"sets/{name}/labels").iterdir())
    assert len(shards) == (2 if shard_bytes == 1 else 1)
    stored = list(stage.stored_steps(store, DATA, config, name))
    live = list(stage.live_steps(images["images"], DATA, teachers, config))
    assert len(stored) == len(live) == 5 * 3
    for number, (one, other) in enumerate(zip(stored, live, strict=True)):
        assert torch.equal(one.batch.theta, other.batch.theta)
        assert torch.equal(one.teacher, other.teacher)
        assert torch.equal(one.teacher, stored[number % 6].teacher)
    assert not torch.equal(stored[0].teacher, stored[3].teacher)
    rest = list(stage.stored_steps(store, DATA, config, name, 3))
    assert all(torch.equal(a.teacher, b.teacher) for a, b in zip(rest, stored[9:], strict=True))


@pytest.mark.parametrize("make", ["hard", "stored", "live"])
def test_steps_from_an_epoch_on_are_those_of_the_whole(store, teachers, make):
    stage.relabel(store, DATA, teachers, CONFIG, "random")
    images = store.read_images("random")["images"]
    made = {
        "hard": lambda first: stage.hard_steps(10, DATA, CONFIG, 1, first),
        "stored": lambda first: stage.stored_steps(store, DATA, CONFIG, "random", first),
        "live": lambda first: stage.live_steps(images, DATA, teachers, CONFIG, first),
    }[make]
    rest = list(made(2))
    assert len(rest) == 3
    for one, other in zip(rest, list(made(0))[6:], strict=True):
        assert torch.equal(one.batch.theta, other.batch.theta)
        assert torch.equal(one.batch.index, other.batch.index)
