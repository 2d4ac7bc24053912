"""A folder of photographs with broken files, from the command line: refused, then done without."""

import json
import shutil

import pytest
import torch
from distill.test_data import picture
from PIL import Image

import otdd
from otdd import cli
from otdd.distill.codec import PixelCodec
from otdd.distill.config import ConfigError
from otdd.distill.data import DataError, DataWarning, load_data
from otdd.distill.encode import EncodeConfig, encode
from otdd.distill.export import export
from otdd.distill.report import report
from otdd.distill.stream import open_stream

CLASSES = {"Café noir": 9, "béret": 5, "chat gris": 7, "Öl & Essig": 4, "🦊 renard": 6}
BROKEN = ("Café noir/3.jpg", "béret/extra.jpg")


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "my photos"
    for k, (name, count) in enumerate(CLASSES.items()):
        for n in range(count):
            picture(root / name / f"{n}.jpg", 20 * k + n, size=(24 + n, 16 + k), mode="RGB")
    first, second = (root / name for name in BROKEN)
    first.write_bytes(first.read_bytes()[:-200])  # its header is sound
    second.write_bytes(b"\xff\xd8\xff no JPEG")
    return root


@pytest.fixture
def clean(photos, tmp_path):
    root = tmp_path / "clean" / "my photos"
    shutil.copytree(photos, root)
    for name in BROKEN:
        (root / name).unlink()
    return root


def test_photographs_from_the_folder_to_the_set(photos, clean, tmp_path, capsys):
    data = ["--data", photos, "--resolution", 8]
    fit = [
        "fit",
        *data,
        "--width",
        32,
        "--layers",
        1,
        "--steps",
        3,
        "--out",
        tmp_path / "g.safetensors",
    ]
    run = ["run", *data, "--ipc", 2, "--out", tmp_path / "o", "--sets", "otg", "random", "--quiet"]
    run += ["--generator", tmp_path / "g.safetensors", "--seeds", 1, "--train.losses", "ce"]
    run += ["--train.epochs", 2, "--sample.steps", 2, "--sample.starts", 1]
    encoding = ["encode", *data, "--dry-run", "--out", tmp_path / "latents"]
    encoding += ["--generator", tmp_path / "g.safetensors"]
    for command in (fit, [*fit, "--dry-run"], run, [*run, "--dry-run"], encoding):
        code, _, err = call(capsys, *command)
        assert code == 2
        assert all(err.count(f"{photos / name}: unreadable image") == 1 for name in BROKEN)
        assert "leave out images that cannot be read with --skip-bad-images" in err
    assert not (tmp_path / "g.safetensors").exists()

    code, out, err = call(capsys, *fit, "--skip-bad-images", "--dry-run")
    assert code == 0
    assert "5 classes, 24 training and 6 test images of 3x8x8\n" in out
    assert "nothing was written" in out
    assert f"data folder {photos}: 2 images that cannot be read are left out:\n" in err
    assert "Warning" not in err
    assert not (tmp_path / "g.safetensors").exists()
    assert call(capsys, *fit, "--skip-bad-images")[0] == 0
    assert call(capsys, *run, "--skip-bad-images", "--dry-run")[0] == 0
    assert not (tmp_path / "o").exists()
    code, _, err = call(capsys, *run, "--skip-bad-images")
    assert code == 0
    assert all(f"\n  {name}: unreadable image" in err for name in BROKEN)
    code, _, err = call(capsys, *run, "--skip-bad-images")
    assert code == 0
    listed = f"(listed in {tmp_path / 'o' / 'data.json'})"
    assert f"data folder {photos}: 2 images that cannot be read are left out {listed}\n" in err
    assert not any(name in err for name in BROKEN)

    known = json.loads((tmp_path / "o" / "data.json").read_text())
    assert known["classes"] == sorted(CLASSES)
    assert [row["image"] for row in known["skipped"]] == list(BROKEN)
    made = otdd.load(tmp_path / "o")
    assert made.classes == sorted(CLASSES)
    assert len(made) == 10
    page = report(tmp_path / "o", tmp_path / "page.html").read_text(encoding="utf-8")
    assert " 2 images that cannot be read left out.<" in page
    assert "extra.jpg" not in page
    published = export(tmp_path / "o", "imagefolder", tmp_path / "e").files
    assert "béret/extra.jpg" not in (published.store.path / "otdd.json").read_text()
    assert known["sha256"] == load_data(clean, resolution=8).fingerprint
    clean_run = [clean if a == photos else a for a in run]
    assert call(capsys, *clean_run)[0] == 0  # the same images: the same run


def test_leaving_out_is_removing(photos, clean):
    with pytest.warns(DataWarning, match="2 images"):
        data = load_data(photos, resolution=8, skip_bad_images=True, seed=5)
    want = load_data(clean, resolution=8, seed=5)
    assert (data.fingerprint, data.name) == (want.fingerprint, want.name)
    assert [image for image, _ in data.skipped] == list(BROKEN)
    assert want.skipped == ()
    with pytest.warns(DataWarning, match="2 images"):
        seen = open_stream(photos, resolution=8, skip_bad_images=True, seed=5)
    assert torch.equal(seen.read(0, len(seen)), want.train.images)


def test_a_class_must_be_left(photos):
    for n in range(3):
        (photos / "Öl & Essig" / f"{n}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="one image cannot be split") as caught:
        load_data(photos, resolution=8, skip_bad_images=True)
    assert len(caught.value.problems) == 1
    (photos / "Öl & Essig" / "3.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="class 'Öl & Essig': no image"):
        load_data(photos, resolution=8, skip_bad_images=True)
    for path in photos.rglob("*.jpg"):
        path.write_bytes(b"")
    for read in (load_data, open_stream):
        with pytest.raises(DataError, match="class 'béret': no image"):
            read(photos, resolution=8, skip_bad_images=True)


def test_what_cannot_be_left_out_stays_a_problem(photos):
    (photos / "béret" / "x.heic").write_bytes(b"x")
    Image.new("L", (8, 8)).save(photos / "béret" / "y.png")
    with pytest.raises(DataError, match="images of 3") as caught:
        load_data(photos, skip_bad_images=True)
    assert "x.heic: .heic is not read" in str(caught.value)
    assert "extra.jpg" not in str(caught.value)


def test_encoded_without_them(photos, tmp_path):
    wanted = {"resolution": 8, "seed": 0}
    with pytest.warns(DataWarning, match="2 images"):
        seen = open_stream(photos, **wanted, skip_bad_images=True)
    made = encode(seen, PixelCodec(), EncodeConfig(shard=9, batch=4, support=2), tmp_path / "l")
    with pytest.raises(ConfigError, match=r"without 2 images .* give --skip-bad-images here too"):
        made.data(photos, **wanted, ipc=1)
    with pytest.warns(DataWarning, match="2 images"):
        data = made.data(photos, **wanted, ipc=1, skip_bad_images=True)
    with pytest.warns(DataWarning, match="2 images"):
        held = load_data(photos, **wanted, skip_bad_images=True)
    assert (data.fingerprint, data.skipped) == (held.fingerprint, held.skipped)
    assert torch.equal(data.train.images[0:4], held.train.images[:4])
    made.check(held, PixelCodec())
