"""Built-in data and image folders: what is accepted, and what is refused with every name."""

import numpy as np
import pytest
import torch
from PIL import Image

from otdd.distill.data import DataError, load_data


def picture(path, value: int = 0, size: tuple = (8, 8), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode).save(path)


def folder(root, split: bool = True, classes=("a", "b"), count: int = 4):
    for part in ("train", "val") if split else (".",):
        for k, name in enumerate(classes):
            for n in range(count):
                picture(root / part / name / f"{n}.png", 10 * k + n)
    return root


def test_digits():
    data = load_data("digits")
    assert (len(data.train), len(data.test)) == (1297, 500)
    assert data.image_shape == (1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.classes == [str(k) for k in range(10)]
    assert data.fingerprint == load_data("digits").fingerprint


def test_textures_are_split_in_space():
    data = load_data("textures")
    assert data.num_classes == 8
    assert data.image_shape == (1, 32, 32)
    train = {bytes(image.numpy().tobytes()) for image in data.train.images}
    assert not any(bytes(image.numpy().tobytes()) in train for image in data.test.images)
    assert torch.bincount(data.test.labels).min() > 20


def test_folder_with_a_split(tmp_path):
    data = load_data(folder(tmp_path, classes=("é t é", "b")))
    assert data.classes == ["b", "é t é"]
    assert (len(data.train), len(data.test)) == (8, 8)


def test_folder_split_by_seed(tmp_path):
    folder(tmp_path, split=False, count=10)
    picture(tmp_path / ".hidden" / "0.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    first, again = load_data(tmp_path, seed=1), load_data(tmp_path, seed=1)
    other = load_data(tmp_path, seed=2)
    assert (len(first.train), len(first.test)) == (16, 4)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.classes == ["a", "b"]


def test_sizes_and_colours(tmp_path):
    folder(tmp_path)
    picture(tmp_path / "train" / "a" / "wide.png", size=(20, 10), mode="RGB")
    with pytest.raises(DataError, match=r"2 sizes.*resolution"):
        load_data(tmp_path)
    data = load_data(tmp_path, resolution=8)
    assert data.image_shape == (3, 8, 8)
    grey = data.test.images
    assert torch.equal(grey[:, 0], grey[:, 1])


def test_sixteen_bits_are_scaled(tmp_path):
    folder(tmp_path)
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "train" / "a" / "deep.png")
    images = load_data(tmp_path).train.of_class(0)
    assert (images == 30000 >> 8).flatten(1).all(1).any()


def test_every_offending_file_and_class_is_named(tmp_path):
    folder(tmp_path, classes=("a", "b", "c"))
    (tmp_path / "train" / "a" / "text.png").write_text("not an image")
    whole = (tmp_path / "train" / "b" / "0.png").read_bytes()
    (tmp_path / "train" / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "val" / "other").mkdir()
    picture(tmp_path / "val" / "other" / "0.png")
    (tmp_path / "train" / "c" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError) as caught:
        load_data(tmp_path)
    message = str(caught.value)
    for part in ("text.png", "cut.png", "gone.png", "empty", "'other' is in val/ only"):
        assert part in message
    assert len(caught.value.problems) >= 5
    assert "fewer than ipc" not in message
    with pytest.raises(DataError) as caught:
        load_data(tmp_path, ipc=5)
    message = str(caught.value)
    assert "class 'a': 4 readable training images, fewer than ipc=5" in message
    assert "cut.png" in message


def test_decompression_bombs_are_named_like_unreadable_files(tmp_path):
    import struct
    import zlib

    folder(tmp_path)
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + head
    whole = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    whole += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IEND"
    (tmp_path / "train" / "a" / "bomb.png").write_bytes(whole)
    with pytest.raises(DataError, match=r"bomb\.png: unreadable image \(DecompressionBomb"):
        load_data(tmp_path, resolution=8)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "missing", "no folder; accepted: 'digits', 'textures'"),
        (lambda p: p, "empty"),
        (lambda p: folder(p, split=False, classes=("only",)), "one class"),
        (lambda p: folder(p, split=False, count=1), "cannot be split"),
    ],
)
def test_unusable_folders(tmp_path, make, says):
    with pytest.raises(DataError, match=says):
        load_data(make(tmp_path))


def test_fewer_images_than_ipc_and_bad_numbers(tmp_path):
    folder(tmp_path)
    with pytest.raises(DataError, match=r"ipc=5 asks for more.*\n.*a: 4 training images"):
        load_data(tmp_path, ipc=5)
    with pytest.raises(DataError, match="val_fraction"):
        load_data("digits", val_fraction=0)
    with pytest.raises(DataError, match="resolution=16"):
        load_data("digits", resolution=16)
