"""The geometry report: values worked out by hand, and what a run writes."""

import json
import math
import warnings

import pytest
import torch
from distill.finished_run import DATA, LABELLED, finished_run, settings

from otdd.distill import geometry
from otdd.distill.augment import Augmentation
from otdd.distill.codec import PixelCodec
from otdd.distill.data import ImageData, LabeledImages
from otdd.distill.inputs.problems import DataWarning
from otdd.distill.pipeline import Run, run_stages
from otdd.distill.store import Store
from otdd.distill.training import Step


def test_transport_class_by_class():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    images[2:] = 255
    part = LabeledImages(images, torch.tensor([0, 0, 1, 1]))
    data = ImageData("toy", ["black", "white"], part, part)
    costs = geometry.class_costs(images[:2], torch.tensor([0, 1]), data, PixelCodec())
    assert costs == {0: pytest.approx(0, abs=1e-6), 1: pytest.approx(4 * 2.0**2)}


def test_entropy_of_labels(tmp_path):
    store = Store.open(tmp_path, {})
    logits = torch.zeros(1, 2, 4, dtype=torch.float16)  # one step, two images, four classes
    logits[0, 1, 0] = 40  # certain
    store.write_tensors("s.safetensors", {"logits": logits}, {})
    assert geometry.label_entropy(store, "s.safetensors", 4) == pytest.approx(math.log(4) / 2)


def test_agreement_and_transport_to_the_labels():
    batch = Augmentation().draw(4, 4, (2, 2), seed=0, epoch=0, step=0)
    images = torch.zeros(4, 1, 2, 2)
    labels = torch.eye(4) * 60

    class Says(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, x):
            return self.logits

    def against(logits):
        return geometry.against_labels(Says(logits), images, [Step(batch, labels)], tau=1.0)

    assert against(labels) == {"agreement": 100.0, "transport": pytest.approx(0, abs=1e-6)}
    # The same answers to other images: never right, and no distance between the distributions.
    assert against(labels.roll(1, 0)) == {"agreement": 0.0, "transport": pytest.approx(0, abs=1e-6)}
    # Always the first class: right once, and three of four have to move all of their mass.
    always = against(torch.tensor([[60.0, 0, 0, 0]]).repeat(4, 1))
    assert always == {"agreement": 25.0, "transport": pytest.approx(1.5)}
    with pytest.raises(ValueError, match="without soft labels"):
        geometry.against_labels(Says(labels), images, [Step(batch)], tau=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("geometry") / "run"
    return out, finished_run(out)


def test_a_run_reports_every_term(run):
    out, _ = run
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["geometry"]) == ["random", "kmeans"]
    for name, report in metrics["geometry"].items():
        assert list(report["class_transport"]) == DATA.classes
        mean = sum(report["class_transport"].values()) / 10
        assert metrics["ot_cost"][name] == pytest.approx(mean, abs=1e-4)
        assert 0 < report["label_entropy"] <= math.log(10)
        share = report["label_entropy"] / math.log(10)
        assert report["label_entropy_share"] == pytest.approx(share, abs=1e-3)
        (students,) = report["students"]
        assert [students[k] for k in ("arch", "loss", "students")] == ["convnet", "kl", 1]
        assert 0 <= students["agreement"] <= 100
        assert 0 < students["output_transport"] < 2


def test_what_is_known_is_not_computed_again(run, monkeypatch):
    out, config = run
    before = json.loads((out / "metrics.json").read_text())
    monkeypatch.setattr(geometry, "class_costs", None)
    monkeypatch.setattr(geometry, "label_entropy", None)
    for stage in ("evaluate", "train"):
        made = run_stages(config, (stage,))
        assert made["geometry"] == before["geometry"]
        assert made["ot_cost"] == before["ot_cost"]


@pytest.mark.parametrize("entropy", [0.68144, 0.68136, 0.68145001, 2.30254])
def test_a_report_made_again_of_what_it_said_is_the_same(entropy):
    made = geometry.report({"a": 1.0}, entropy, 2, [])
    assert geometry.report({"a": 1.0}, made["label_entropy"], 2, []) == made


def test_teachers_who_see_other_classes_are_told(tmp_path):
    """On images of other classes; labels of most of them contradict the set."""
    config = settings(tmp_path / "run", sets=["random"], relabel={"teacher_epochs": 12})
    run = Run.open(config)
    with run.store:
        run.sample()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run.relabel()  # nothing to tell
        labels = run.store.read_images("random")["labels"]
        shard = "sets/random/labels/00000.safetensors"
        assert geometry.label_accuracy(run.store, shard, labels, 10) > 70
        shifted = (labels + 1) % 10
        assert geometry.label_accuracy(run.store, shard, shifted, 10) < 20
        run.store.remove("sets/random/labels")
        tensors = dict(run.store.read_images("random"))
        images = tensors.pop("images").roll(2, 0)
        run.store.remove("sets/random")
        run.store.write_images("random", images, tensors["labels"])
        told = r"set random: the teachers see the class of an image in \d+ % of its views, but in"
        with pytest.warns(DataWarning, match=told):
            run.relabel()


def test_views_that_are_all_mixed_tell_nothing(tmp_path):
    given = {"teacher_epochs": 1, "cutmix": 1.0}
    finished_run(tmp_path / "run", 1, LABELLED, sets=["random"], relabel=given)
    store = Store(tmp_path / "run")
    labels = store.read_images("random")["labels"]
    shard = "sets/random/labels/00000.safetensors"
    assert geometry.label_accuracy(store, shard, labels, 10) is None
