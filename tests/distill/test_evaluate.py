"""The table and the transport cost."""

import dataclasses
import io

import numpy as np
import torch
from PIL import Image

from otdd.distill import evaluate
from otdd.distill.codec import PixelCodec
from otdd.distill.compare import comparisons
from otdd.distill.data import ImageData, LabeledImages, load_data
from otdd.distill.plots import grid
from otdd.distill.settings import resolve
from otdd.distill.store import Store

CONFIG = resolve(
    {"data": "digits", "ipc": 1, "out": "x", "seeds": 2, "sets": ["otg"], "train": {"epochs": 2}}
)


def test_rows_and_resume(tmp_path):
    store = Store.open(tmp_path, {})
    name = evaluate.Student("convnet", "ce", 0).file("results", "otg")
    store.write_json(name, {"accuracy": 80.0, "best": 82.0})
    rows = evaluate.accuracy_rows(store, CONFIG)
    assert (rows[0]["runs"], rows[0]["ci95"]) == ([80.0], None)
    other = evaluate.Student("convnet", "ce", 1).file("results", "otg")
    store.write_json(other, {"accuracy": 90.0, "best": 90.0})
    assert evaluate.accuracy_rows(store, CONFIG) == [
        {
            "set": "otg",
            "labels": "hard",
            "loss": "ce",
            "arch": "convnet",
            "seeds": [0, 1],
            "runs": [80.0, 90.0],
            "mean": 85.0,
            "std": 5.0,
            "ci95": [21.47, 148.53],  # t of one degree of freedom: 12.706 * 5
            "best_mean": 86.0,
        }
    ]
    left = evaluate.missing(store, CONFIG, "otg")
    assert left == [("convnet", loss, seed) for loss in ("kl", "otm") for seed in (0, 1)]


def test_equal_means_differ_by_nothing(tmp_path):
    """Of 24 test images 10 and 13, and 11 and 12; rounded to hundredths they were apart."""
    config = dataclasses.replace(CONFIG, sets=("otg", "random"))
    store = Store.open(tmp_path, {})
    for name, right in (("otg", (10, 13)), ("random", (11, 12))):
        for seed, count in enumerate(right):
            file = evaluate.Student("convnet", "ce", seed).file("results", name)
            store.write_json(file, {"accuracy": 100 * count / 24, "best": 100 * count / 24})
    rows = evaluate.accuracy_rows(store, config)
    assert rows[0]["mean"] == rows[1]["mean"] == rows[0]["best_mean"] == 47.92
    (made,) = comparisons(rows)
    assert (made["difference"], made["p"]) == (0.0, 1.0)


def test_finished_students_are_left_alone(tmp_path):
    data = load_data("digits")
    store = Store.open(tmp_path, {})
    first = [int((data.train.labels == k).nonzero()[0]) for k in range(10)]
    store.write_images("otg", data.train.images[first], torch.arange(10))
    config = resolve(
        {"data": "digits", "ipc": 1, "out": "x", "seeds": 2, "train": {"epochs": 2, "losses": "ce"}}
    )
    kept = {"accuracy": 1.0, "best": 1.0}
    store.write_json(evaluate.Student("convnet", "ce", 0).file("results", "otg"), kept)
    evaluate.train(store, data, config, "otg")
    (row,) = [r for r in evaluate.accuracy_rows(store, config) if r["set"] == "otg"]
    assert row["runs"][0] == 1.0
    assert 0 <= row["runs"][1] <= 100


def test_a_student_is_missing_when_a_file_that_its_result_names_is(tmp_path):
    store = Store.open(tmp_path, {})
    one, early = (evaluate.Student("convnet", "ce", seed) for seed in (0, 1))
    log, result = one.file("logs", "otg"), one.file("results", "otg")
    store.write_json(log, {})
    store.write_json(result, {"accuracy": 1.0, "best": 1.0, "beside": [log]})
    # A result of before there were logs, in a folder that has got some since.
    store.write_json(early.file("results", "otg"), {"accuracy": 1.0, "best": 1.0})
    assert not {one, early} & set(evaluate.missing(store, CONFIG, "otg"))
    store.remove(log)
    assert {one, early} & set(evaluate.missing(store, CONFIG, "otg")) == {one}


def test_transport_cost_of_the_data_itself_and_of_one_point():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    images[2:] = 255
    part = LabeledImages(images, torch.tensor([0, 0, 1, 1]))
    data = ImageData("toy", ["black", "white"], part, part)
    codec = PixelCodec()
    assert evaluate.transport_cost(images, part.labels, data, codec) < 1e-6
    one = evaluate.transport_cost(images[:1], torch.tensor([1]), data, codec)
    assert abs(one - 4 * 2.0**2) < 1e-6


def test_grid_is_a_readable_picture():
    import io

    from PIL import Image

    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    png = grid({"otg": (images, labels), "random": (images, labels)}, ["a", "a very long name"])
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size[0] > 250
        assert picture.size[1] > 6 * 48
        assert len(picture.getcolors(10**6)) > 100


def test_names_of_classes_on_the_grid():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)

    def head(*names):
        page = Image.open(io.BytesIO(grid({"otg": (images, torch.arange(2))}, names)))
        return np.array(page.convert("L"))[:40]

    plain, accents = head("cafe", "a"), head("café", "a")
    rows = (plain != accents).any(1).nonzero()[0]
    assert 0 < len(rows) <= 5  # the accent and nothing else
    assert (head("漢字", "a") == head("class 0", "a")).all()  # not boxes
    assert (head("a name that is far too long", "a") < 255).any()
