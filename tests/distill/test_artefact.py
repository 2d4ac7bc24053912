"""otdd.load: what a finished folder gives, replay to the bit, and clear refusals."""

import json
import pickle
import shutil

import pytest
import torch
from distill.finished_run import DATA, LABELLED, finished_run, same, seen_in_training, settings
from distill.surroundings import SURROUNDINGS
from torch.utils.data import DataLoader

import otdd
from otdd.distill import relabel
from otdd.distill.config import ConfigError
from otdd.distill.export import export
from otdd.distill.match import make_loss, reproducible, train_student
from otdd.distill.store import Store, StoreError
from otdd.distill.students import make_network
from otdd.distill.training import Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "digits"
    finished_run(path)
    return path


@pytest.fixture(autouse=True)
def shards_of_one_epoch(monkeypatch):
    monkeypatch.setattr(relabel, "SHARD_BYTES", 1)


def test_images_labels_and_names(folder):
    loaded = otdd.load(folder, set="random")
    stored = Store(folder).read_images("random")
    assert torch.equal(loaded.images, stored["images"])
    assert torch.equal(loaded.labels, stored["labels"])
    assert loaded.classes == DATA.classes
    assert (loaded.mean, loaded.std) == (DATA.mean, DATA.std)
    image, label = loaded[3]
    assert label == 1
    assert torch.equal(image, stored["images"][3].float() / 255)
    assert len(loaded) == 20
    assert "20 images of 1x8x8, 10 classes" in repr(loaded)


def test_a_relative_path_is_that_of_the_time_of_loading(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    loaded = otdd.load(folder.name, set="random")
    monkeypatch.chdir(tmp_path)
    expected = list(otdd.load(folder, set="random").replay())
    assert all(same(*pair) for pair in zip(expected, loaded.replay(), strict=True))


def test_it_is_a_data_set_of_torch(folder):
    loaded = otdd.load(folder, set="random", transform=lambda image: image.mean())
    means, labels = next(iter(DataLoader(loaded, batch_size=20)))
    assert means.shape == (20,)
    assert torch.equal(labels, loaded.labels)


def test_normalise_is_that_of_the_students(folder):
    loaded = otdd.load(folder, set="random")
    network = make_network("convnet", DATA, 0)
    x = loaded.images.float() / 255
    assert torch.equal(loaded.normalise(loaded.images), (x - network.mean) / network.std)
    assert torch.equal(loaded.normalise(loaded.images), loaded.normalise(x))
    with pytest.raises(ConfigError, match=r"images: torch.int64 is not accepted; expected uint8"):
        loaded.normalise(loaded.images.long())  # which gave NaN


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_replay_is_what_training_sees_to_the_bit(folder, workers):
    loader = otdd.load(folder, set="random").replay(workers=workers)
    expected = list(seen_in_training(Store(folder), settings(folder), "random"))
    assert len(loader) == len(expected) == 3 * 3
    for seen, batch in zip(expected, loader, strict=True):
        assert same(seen, batch)
        assert batch.logits.dtype == torch.float32


KEPT = [
    {"label_format": "q8"},
    {"label_format": "q4"},
    {"label_format": "topk", "top_k": 3},
    {"mixup": 0.8, "patch_shuffle": 2},
    {"mixup": 0.8, "cutmix": 0.2, "patch_shuffle": 4, "label_format": "q8"},
]


@pytest.mark.parametrize("kept", KEPT)
def test_replay_of_other_labels(tmp_path, kept):
    config = finished_run(tmp_path / "run", 1, LABELLED, relabel={"teacher_epochs": 1, **kept})
    loaded = otdd.load(tmp_path / "run", set="random")
    expected = list(seen_in_training(Store(tmp_path / "run"), config, "random"))
    for seen, batch in zip(expected, loaded.replay(), strict=True):
        assert same(seen, batch)
    assert loaded.soft_labels.shape == (20, 10)
    stored = Store(tmp_path / "run").read_tensors("sets/random/labels/00000.safetensors")
    more = {"blend", "patches"}
    assert more & set(stored) == (more if "mixup" in kept else set())
    export(tmp_path / "run", "imagefolder", tmp_path / "out", set="random")
    again = otdd.load(tmp_path / "out")
    assert torch.equal(again.soft_labels, loaded.soft_labels)


def test_a_student_trained_on_the_replay_has_the_weights_of_ours(folder):
    loaded, config = otdd.load(folder, set="random"), settings(folder, train={"ema": 0.0})
    ours, theirs = (make_network("convnet", DATA, 0) for _ in range(2))
    loss = make_loss("kl", config.train)
    steps = relabel.stored_steps(Store(folder), DATA, settings(folder), "random")
    with reproducible((1, 8, 8)):
        training = Training(ours, loss, config.train, 9)
        train_student(training, loaded.images, loaded.labels, steps)
        optimizer = torch.optim.AdamW(
            theirs.parameters(), config.train.lr, weight_decay=0.01, fused=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        for batch in loaded.replay():
            optimizer.zero_grad()
            value, _ = loss(theirs(batch.images), batch.targets, batch.labels, batch.logits)
            value.backward()
            optimizer.step()
            schedule.step()
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_replay_of_some_epochs(folder):
    loaded = otdd.load(folder, set="random")
    assert loaded.epochs == 3
    every = list(loaded.replay())
    some = list(loaded.replay(start=1, stop=2))
    assert len(some) == 3
    assert all(same(a, b) for a, b in zip(every[3:6], some, strict=True))
    with pytest.raises(ConfigError, match=r"start, stop: \(2, 9\) .* epochs of 0 to 3"):
        loaded.replay(start=2, stop=9)
    with pytest.raises(ConfigError, match=r"start, stop: \(0\.5, 3\) is not accepted"):
        loaded.replay(start=0.5)
    with pytest.raises(ConfigError, match="workers: '2' is not accepted; expected an integer"):
        loaded.replay(workers="2")


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_whatever_is_set_around_it_the_replay_is_the_same(folder, name):
    """Batches made inside autocast were others than those that the teachers labelled."""
    loaded = otdd.load(folder, set="random")
    wanted = list(loaded.replay(stop=1).dataset)[:3]
    with SURROUNDINGS[name]():
        got = [loaded.replay(stop=1).dataset[number] for number in range(3)]
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


def test_soft_labels_are_mean_logits_of_unmixed_views(folder):
    loaded = otdd.load(folder, set="random")
    views = [[] for _ in range(20)]
    for step in relabel.stored_steps(Store(folder), DATA, settings(folder), "random"):
        if int(step.batch.box.sum()) == 0:
            for index, logits in zip(step.batch.index, step.teacher, strict=True):
                views[index].append(logits)
    for image, found in enumerate(views):
        if found:
            mean = torch.stack(found).mean(0)
            torch.testing.assert_close(loaded.soft_labels[image], mean, rtol=1e-5, atol=1e-5)
    assert any(views)
    assert loaded.soft_labels.shape == (20, 10)
    assert torch.isfinite(loaded.soft_labels).all()


def test_it_can_be_pickled(folder):
    loaded = otdd.load(folder, set="random")
    assert loaded.has_soft_labels
    assert same(
        next(iter(pickle.loads(pickle.dumps(loaded)).replay())), next(iter(loaded.replay()))
    )


def test_no_such_folder_set_or_file(folder, tmp_path):
    with pytest.raises(StoreError, match="nowhere: no such folder"):
        otdd.load(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"is no otdd folder: there is no otdd.json"):
        otdd.load(tmp_path)
    with pytest.raises(StoreError, match=r"has no set 'otg'; there: kmeans, random"):
        otdd.load(folder)
    with pytest.raises(StoreError, match=r"has no set '\.\./random'"):
        otdd.load(folder, set="../random")
    (tmp_path / "otdd.json").write_text("[]")
    with pytest.raises(StoreError, match="was not written by otdd"):
        otdd.load(tmp_path)


def test_folder_of_an_earlier_version_says_what_to_do(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "data.json").unlink()
    with pytest.raises(StoreError, match=r"otdd evaluate --out .* adds it"):
        otdd.load(copy, set="random")


def test_missing_incomplete_and_foreign_labels(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    labels = copy / "sets/random/labels"
    (labels / "00002.safetensors").unlink()
    with pytest.raises(StoreError, match="soft labels of 2 epochs out of 3; run `otdd relabel`"):
        otdd.load(copy, set="random", verify=False).replay()
    shutil.copy(labels / "00001.safetensors", labels / "00000.safetensors")
    with pytest.raises(StoreError, match=r"00000\.safetensors does not belong to this set"):
        otdd.load(copy, set="random", verify=False).replay()
    (labels / "00000.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(StoreError, match=r"00000\.safetensors cannot be read"):
        otdd.load(copy, set="random", verify=False).replay()
    shutil.rmtree(labels)
    loaded = otdd.load(copy, set="random", verify=False)
    assert loaded.soft_labels is None
    with pytest.raises(StoreError, match=r"set random has no soft labels; run `otdd relabel`"):
        loaded.replay()


@pytest.mark.parametrize("meta", [None, [], {}, {"epochs": 3}, {"epochs": [0, 0], "classes": []}])
@pytest.mark.parametrize("whole", [True, False])
def test_tensors_of_others_are_no_soft_labels(folder, tmp_path, meta, whole):
    copy = shutil.copytree(folder, tmp_path / "copy")
    name = "sets/random/labels/00000.safetensors"
    tensors = Store(copy).read_tensors(name) if whole else {"logits": torch.zeros(3)}
    Store(copy).write_tensors(name, tensors, meta)
    with pytest.raises(StoreError, match=r"00000\.safetensors is damaged: no soft labels of otdd"):
        otdd.load(copy, set="random", verify=False).replay()


def test_labels_of_images_that_are_not_there(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    name = "sets/random/labels/00000.safetensors"
    tensors, meta = Store(copy).read_tensors(name), Store(copy).read_meta(name)
    tensors["index"][0, 0] = 20
    Store(copy).write_tensors(name, tensors, meta)
    loaded = otdd.load(copy, set="random", verify=False)
    with pytest.raises(StoreError, match="is of images that the set has not"):
        next(iter(loaded.replay()))
    with pytest.raises(StoreError, match="is of images that the set has not"):
        loaded.soft_labels  # noqa: B018


@pytest.mark.parametrize(
    "change",
    [{"classes": 3}, {"mean": None}, {"std": [0.5] * 9}, {"image_shape": [1, 8]}, {"name": []}, []],
)
def test_a_data_file_of_a_stranger_is_refused(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    about = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(about | change if change else change))
    with pytest.raises(StoreError, match=r"data\.json was not written by otdd"):
        otdd.load(copy, set="random", verify=False)


def test_data_file_says_what_the_set_takes_over(folder):
    about = json.loads((folder / "data.json").read_text())
    assert about["classes"] == DATA.classes
    assert about["sha256"] == DATA.fingerprint
    assert set(about) == {"name", "classes", "image_shape", "mean", "std", "sha256"}
