"""Arrays: layouts and types that are accepted, and files that are refused before they are read."""

import io
import zipfile

import numpy as np
import pytest
import torch
from distill.finished_run import finished_run

from otdd.distill.data import DataError, load_data
from otdd.distill.export import export
from otdd.distill.inputs import npz
from otdd.distill.stream import open_stream

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (12, 6, 6, 3), np.uint8)
GREY = COLOUR[..., 0]
LABELS = np.arange(12) % 3


def saved(path, **arrays):
    np.savez_compressed(path / "set.npz", **arrays)
    return path / "set.npz"


@pytest.mark.parametrize(
    ("images", "want"),
    [
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.astype(np.float32) / 255, COLOUR.transpose(0, 3, 1, 2)),
        (GREY[:, None].astype(np.float64) / 255, GREY[:, None]),
    ],
)
def test_layouts(tmp_path, images, want):
    data = load_data(
        saved(tmp_path, x_train=images, y_train=LABELS, x_test=images[:6], y_test=LABELS[:6, None])
    )
    assert torch.equal(data.train.images, torch.from_numpy(want.copy()))
    assert torch.equal(data.test.images, data.train.images[:6])
    assert data.train.labels.tolist() == LABELS.tolist()
    assert data.classes == ["0", "1", "2"]
    assert data.name == "set"


def test_keys_and_class_names(tmp_path):
    known = np.array(["z", "é", "a"])
    data = load_data(saved(tmp_path, images=GREY, labels=LABELS, classes=known), seed=3)
    assert data.classes == ["z", "é", "a"]
    assert (len(data.train), len(data.test)) == (9, 3)
    texts = load_data(saved(tmp_path, images=GREY, labels=known[LABELS]), seed=3)
    assert texts.classes == ["a", "z", "é"]
    named = load_data(saved(tmp_path, images=GREY, labels=known[LABELS], classes=known), seed=3)
    assert named.fingerprint == data.fingerprint
    medmnist = {"train_images": GREY, "train_labels": LABELS[:, None]}
    for part, rows in (("val", 6), ("test", 9)):  # test comes before val
        medmnist |= {f"{part}_images": GREY[:rows], f"{part}_labels": LABELS[:rows, None]}
        assert len(load_data(saved(tmp_path, **medmnist)).test) == rows


def test_resizing_is_that_of_files(tmp_path):
    from PIL import Image

    from otdd.distill.inputs.pictures import decode

    spec = saved(tmp_path, images=COLOUR, labels=LABELS)
    data = load_data(spec, resolution=4)
    Image.fromarray(COLOUR[0]).save(tmp_path / "0.png")
    assert data.image_shape == (3, 4, 4)
    assert any(
        torch.equal(decode(tmp_path / "0.png", 4), i)
        for i in torch.cat([data.train.images, data.test.images])
    )
    seen = open_stream(spec, resolution=4)
    assert torch.equal(seen.read(0, len(seen)), data.train.images)


def test_an_exported_set_is_an_input(tmp_path):
    finished_run(tmp_path / "run")
    made = export(tmp_path / "run", "npz", tmp_path / "out", set="random")
    data = load_data(tmp_path / "out" / "data.npz")
    assert data.classes == made.classes
    everything = torch.cat([data.train.images, data.test.images])
    assert len(everything) == len(made)
    assert {i.numpy().tobytes() for i in everything} == {i.numpy().tobytes() for i in made.images}


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": GREY}, "labels missing; there are images"),
        ({"pictures": GREY}, "one of images and labels or train_images"),
        (
            {"images": GREY, "labels": LABELS, "x_train": GREY},
            "one of images and labels or x_train",
        ),
        ({"images": GREY, "labels": LABELS[:5]}, "12 images, but 5 labels"),
        ({"images": GREY, "labels": LABELS / 1}, r"labels must be integers .* got float64"),
        ({"images": GREY, "labels": np.eye(3)[LABELS]}, r"of shape \(N,\) or \(N, 1\), got"),
        ({"images": GREY, "labels": LABELS, "classes": ["a", "b"]}, "labels without a class: 2"),
        ({"images": GREY, "labels": LABELS - 1, "classes": ["a", "b"]}, "without a class: -1"),
        ({"images": GREY, "labels": LABELS, "classes": ["a", "b", "b"]}, "must differ; twice: b"),
        ({"images": GREY, "labels": LABELS, "classes": list("abcd")}, "class 'd': no image"),
        ({"images": GREY, "labels": LABELS, "classes": [1, 2, 3]}, "classes must be a list of tex"),
        ({"images": GREY.astype(int), "labels": LABELS}, "must be uint8 or floats"),
        ({"images": GREY.astype(float), "labels": LABELS}, r"floats from .* accepted: \[0, 1\]"),
        ({"images": GREY * np.nan, "labels": LABELS}, "floats from nan"),
        ({"images": np.zeros((12, 3, 5, 3), np.uint8), "labels": LABELS}, "could be .N, C, H, W"),
        ({"images": np.zeros((12, 5, 5, 4), np.uint8), "labels": LABELS}, "with C = 1 or 3, got"),
        ({"images": np.zeros((12, 0, 5), np.uint8), "labels": LABELS}, "must be"),
        (
            {"images": GREY, "labels": np.array([None] * 12)},
            "labels: an array of objects needs pic",
        ),
        ({"images": COLOUR[:, :4], "labels": LABELS}, r"that are not square \(4x6\): give --reso"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, says):
    with pytest.raises(DataError, match=says):
        load_data(saved(tmp_path, **arrays))


def header(shape, dtype="|u1"):
    buffer = io.BytesIO()
    about = {"shape": shape, "fortran_order": False, "descr": dtype}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


def zipped(path, **members):
    with zipfile.ZipFile(path / "set.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path / "set.npz"


@pytest.mark.parametrize("shape", [(10**9, 224, 224, 3), (2**33, 2**33), (12, 6, 7), (-12, 6, 6)])
def test_headers_that_promise_what_is_not_there(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("arrays were read"))
    labels = header((12,)) + LABELS.astype(np.uint8).tobytes()
    spec = zipped(tmp_path, images=header(shape) + GREY.tobytes(), labels=labels)
    with pytest.raises(DataError, match=r"images: its header says -?\d+ bytes .* the file has 432"):
        load_data(spec)


def test_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    spec = saved(tmp_path, images=np.zeros((4096, 32, 32), np.uint8), labels=np.zeros(4096, int))
    assert spec.stat().st_size < 2**16  # 4 MiB when it is unpacked
    monkeypatch.setattr(npz, "memory", lambda: 2**22)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("arrays were read"))
    with pytest.raises(DataError, match=r"0\.0 GiB of arrays are too much for 0\.0 GiB of memory"):
        load_data(spec)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "no header"])
def test_damaged_files(tmp_path, damage):
    spec = saved(tmp_path, images=GREY, labels=LABELS)
    content = bytearray(spec.read_bytes())
    content[200] ^= 255
    cut = {"cut": content[:300], "flipped": content, "text": b"no archive", "empty": b""}
    if damage == "no header":
        zipped(tmp_path, images=b"no header", labels=b"")
    else:
        spec.write_bytes(cut[damage])
    with pytest.raises(DataError, match=r"set\.npz cannot be read .*expected an \.npz file"):
        load_data(spec)
