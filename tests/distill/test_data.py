"""Built-in data and image folders: what is accepted, and what is refused with every name."""

import unicodedata
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from otdd.distill.config import ConfigError
from otdd.distill.data import DataError, DataWarning, load_data
from otdd.distill.inputs.pictures import decode, header
from otdd.distill.prepare import outside


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


def test_what_is_printed_of_data_has_no_pixels():
    text = repr(load_data("digits"))
    assert "train=LabeledImages(1297 of 1x8x8), test=LabeledImages(500 of 1x8x8)" in text
    assert len(text) < 500


def test_digits():
    data = load_data("digits")
    assert (len(data.train), len(data.test)) == (1297, 500)
    assert data.image_shape == (1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.classes == [str(k) for k in range(10)]
    assert data.fingerprint == load_data("digits").fingerprint


def test_a_folder_named_as_a_data_set_of_otdd_is_told_of(tmp_path, monkeypatch):
    folder(tmp_path / "digits", split=False)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(DataWarning, match=r"data 'digits': .* come with otdd; './digits' is the f"):
        assert load_data("digits").num_classes == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_data("./digits").classes == ["a", "b"]


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
    with pytest.raises(DataError, match=r"resolution=16 does not fit .* images are 8x8"):
        load_data("digits", resolution=16)


def test_fingerprint_of_a_folder_stays_what_it_was(tmp_path):
    """Pixels by formula: finished runs and generators name this hash."""
    for k, name in enumerate(("a", "é b")):
        for n in range(4):
            path = tmp_path / name / f"{n}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((4, 4), 10 * k + n, np.uint8)).save(path)
    known = "ddc8cee08a444f11a915b457f54a304e084257cbe0416d349adbf45812459de5"
    assert load_data(tmp_path).fingerprint == known


def test_names_with_blanks_accents_and_emoji_keep_their_order(tmp_path):
    names = ["Zebra", "été d'or", "a b", "🦊 fox", "10", "9"]
    folder(tmp_path, classes=[unicodedata.normalize("NFD", name) for name in names])
    data = load_data(tmp_path)
    assert data.classes == sorted(names)
    assert data.classes[0] == "10"


def test_names_that_look_alike(tmp_path):
    folder(tmp_path / "case", classes=("cat", "Cat", "dog"))
    with pytest.warns(DataWarning, match="'Cat', 'cat' differ only in case"):
        assert load_data(tmp_path / "case").classes == ["Cat", "cat", "dog"]
    spellings = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    folder(tmp_path / "form", classes=[*spellings, "b"])
    with pytest.raises(DataError, match=r"'e\\u0301', '\\xe9' are one name"):
        load_data(tmp_path / "form")
    folder(tmp_path / "bytes", classes=("a", "b\udcff", "c\nd"))
    with pytest.raises(DataError, match="no control characters") as caught:
        load_data(tmp_path / "bytes")
    assert all(name in str(caught.value) for name in (r"'b\udcff'", r"'c\nd'"))


def test_what_lies_between_images(tmp_path):
    folder(tmp_path, split=False)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "labels.csv", "._0.png", ".x/0.png"):
        path = tmp_path / "a" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    (tmp_path / "__MACOSX").mkdir()
    assert len(load_data(tmp_path).train) == 6
    for name in ("a/photo.HEIC", "b/vector.svg"):
        (tmp_path / name).write_bytes(b"an image of another kind")
    with pytest.raises(DataError) as caught:
        load_data(tmp_path)
    assert [p.split(":")[0] for p in caught.value.problems] == [
        str(tmp_path / name) for name in ("a/photo.HEIC", "b/vector.svg")
    ]


def test_folders_of_other_kinds_are_pointed_at(tmp_path):
    picture(tmp_path / "flat" / "0.png")
    with pytest.raises(DataError, match="found 1 images outside any"):
        load_data(tmp_path / "flat")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "data" / "train.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="give it as hf:"):
        load_data(tmp_path / "hub")


@pytest.mark.parametrize(
    "parts", [("Testing", "Training"), ("Test", "Train"), ("training", "validation"), ("val",)]
)
def test_parts_of_other_names_are_no_classes(tmp_path, parts):
    for part in parts:
        folder(tmp_path / part, split=False)
    with pytest.raises(DataError, match=f"where classes are expected: {', '.join(parts)}; call"):
        load_data(tmp_path)


def test_folders_beside_the_parts_are_told_as_not_used(tmp_path):
    folder(tmp_path)
    (tmp_path / "labels").mkdir()
    load_data(tmp_path)  # without a word
    folder(tmp_path / "valid", split=False)
    folder(tmp_path / "test", split=False)
    with pytest.warns(DataWarning, match="beside train/ and val/ are not used: test, valid"):
        load_data(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    folder(tmp_path, split=False, classes=("bus", "train"))
    data = load_data(tmp_path)
    assert data.classes == ["bus", "train"]
    outside(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match="lies among the classes"):
        outside(tmp_path / "bus" / "run", tmp_path)


def made(path, image, **options):
    image.save(path, **options)
    return path


def several(path, **options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return made(path, frames[0], save_all=True, append_images=frames[1:], **options)


def linked(path, target):
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: several(p / "a.gif"), "2 frames or pages"),
        (lambda p: several(p / "a.webp", lossless=True), "2 frames"),
        (lambda p: several(p / "a.tiff"), "2 frames"),
        (lambda p: several(p / "a.png"), "2 frames"),
        (lambda p: made(p / "a.tiff", Image.new("F", (8, 8))), "image of mode F"),
        (lambda p: p / "none.png", "no such file"),
        (lambda p: p, "not a file"),
        (lambda p: linked(p / "a.png", p / "none"), "link to a file that does not exist"),
    ],
)
def test_files_that_are_no_image(tmp_path, make, says):
    path = make(tmp_path)
    assert says in decode(path, 8)
    assert says in header(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.png", b"", r"empty \(0 bytes\)"),
        ("a.jpg", b"plain text", "unreadable image .none of PNG, JPEG"),
        # PostScript, which Pillow would hand to another program.
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "unreadable image .none"),
    ],
)
def test_bytes_that_are_no_image(tmp_path, name, content, says):
    folder(tmp_path)
    (tmp_path / "train" / "a" / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {says}"):
        load_data(tmp_path, resolution=8)


def test_modes_become_grey_or_rgb(tmp_path):
    blue = np.zeros((8, 8, 4), np.uint8)
    blue[..., 2], blue[..., 3] = 200, 10
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    alpha = Image.fromarray(blue, "RGBA")
    solid = alpha.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    files = {
        "cmyk.jpg": (cmyk, (255, 0, 0)),
        "alpha.png": (alpha, (0, 0, 200)),
        "palette.png": (solid, (0, 0, 200)),
        "one.png": (Image.new("1", (8, 8), 1), (255,)),
        "grey-alpha.png": (Image.new("LA", (8, 8), (7, 0)), (7,)),
    }
    for name, (image, colour) in files.items():
        got = decode(made(tmp_path / name, image), None)
        assert header(tmp_path / name) == tuple(got.shape)
        want = torch.tensor(colour).view(-1, 1, 1).expand(-1, 8, 8)
        assert (got.int() - want).abs().max() <= 3, name
    clear = made(tmp_path / "clear.png", solid, transparency=solid.getpixel((0, 0)))
    assert decode(clear, None)[:, 0, 0].tolist() == [0, 0, 200]  # the colour below


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_cameras_is_applied(tmp_path, name, orientation):
    from PIL import ImageOps

    image = Image.new("RGB", (16, 8))
    image.paste((250, 250, 250), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = made(tmp_path / name, image, exif=exif)
    got = decode(path, None)
    with Image.open(path) as file:
        want = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    assert np.array_equal(got.permute(1, 2, 0).numpy(), want)
    assert tuple(got.shape) == header(path)
    assert (got.shape[1] > got.shape[2]) == (orientation >= 5)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "CMYK"])  # those that Pillow can map
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_plain_tiff_files(tmp_path, mode, orientation):
    values = np.random.default_rng(0).integers(0, 256, (8, 16), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) << 8)
    else:
        image = Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = made(tmp_path / "a.tiff", image, exif=exif)
    want = decode(made(tmp_path / "a.png", Image.fromarray(values), exif=exif), None)
    got = decode(path, None)
    assert tuple(got.shape) == header(path)
    assert torch.equal(got[:1], want)


def test_a_jpeg_with_a_second_picture_and_one_with_damaged_exif(tmp_path):
    first = Image.new("RGB", (8, 8), (200, 0, 0))
    second = Image.new("RGB", (4, 4))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert decode(tmp_path / "a.jpg", None).shape == (3, 8, 8)
    first.save(tmp_path / "b.jpg", exif=b"Exif\x00\x00broken")
    assert decode(tmp_path / "b.jpg", None).shape == (3, 8, 8)
    assert header(tmp_path / "b.jpg") == (3, 8, 8)


def test_a_message_has_an_end(tmp_path):
    with pytest.raises(DataError) as caught:
        raise DataError("wrong:", [f"file {k}" for k in range(1000)])
    assert len(caught.value.problems) == 1000
    assert str(caught.value).endswith("file 199\n  ... and 800 more")
