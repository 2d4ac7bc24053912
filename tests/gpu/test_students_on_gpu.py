"""Teachers, students and surrogates on a device: they learn and label, and repeat to the bit."""

import dataclasses

import pytest
import torch

from otdd.distill.augment import generator
from otdd.distill.config import RelabelConfig, RunConfig, TrainConfig
from otdd.distill.data import ImageData, LabeledImages
from otdd.distill.evaluate import train
from otdd.distill.match import accuracy
from otdd.distill.relabel import make_teachers, relabel
from otdd.distill.store import Store
from otdd.distill.surrogate import SurrogateConfig, fit_surrogate, load_surrogates

pytestmark = pytest.mark.gpu


def bars(count=64):
    """Two classes that differ in which half is bright."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 100, (count, 1, 8, 8), dtype=torch.uint8, generator=generator("b"))
    images[labels == 1, :, :4] += 100
    images[labels == 0, :, 4:] += 100
    part = LabeledImages(images, labels)
    return ImageData("bars", ["down", "up"], part, part)


DATA = bars()
TRAIN = TrainConfig(epochs=15, batch=20, device="cuda", losses=("ce", "kl", "mse", "otm"))
RELABEL = RelabelConfig(flip="off", teacher_epochs=40, cutmix=0.0)
CONFIG = RunConfig("bars", 32, "unused", sets=("random",), seeds=1, train=TRAIN, relabel=RELABEL)


def trained(folder, config=CONFIG):
    """Accuracies of students, by loss; everything that was made is in the folder."""
    store = Store(folder)
    store.write_images("random", DATA.train.images, DATA.train.labels)
    teachers = make_teachers(store, DATA, config)
    assert all(p.is_cuda for t in teachers for p in t.network.parameters())
    assert min(t.accuracy for t in teachers) >= 95
    relabel(store, DATA, teachers, config, "random")
    train(store, DATA, config, "random", teachers=teachers)
    found = {
        path.stem: store.read_json(str(path.relative_to(store.path)))
        for path in sorted(store.path.glob("results/random/convnet/*.json"))
    }
    return {name: result["accuracy"] for name, result in found.items()}


def test_teachers_and_students(tmp_path):
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert len(one) == 4
    assert min(one.values()) >= 95
    assert one == two
    shard = "sets/random/labels/00000.safetensors"
    assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()


def test_live_labels_are_the_stored_ones(tmp_path):
    live = dataclasses.replace(CONFIG.relabel, store_labels=False)
    config = dataclasses.replace(CONFIG, relabel=live)
    assert trained(tmp_path / "stored") == trained(tmp_path / "live", config)


def test_surrogate(tmp_path):
    fit_surrogate(DATA, SurrogateConfig("convnet", 2, 10), tmp_path / "s", device="cuda")
    networks = load_surrogates(tmp_path / "s", DATA)
    assert accuracy(networks[-1], DATA.test) >= 95
    assert accuracy(networks[-1].to("cuda"), DATA.test) >= 95
