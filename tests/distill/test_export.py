"""otdd export: every format read back by its own reader, whole folders or none, no leaks."""

import errno
import io
import json
import os
import tarfile

import datasets
import numpy as np
import pytest
import torch
import yaml
from distill.finished_run import finished_run, same, written_set
from PIL import Image

import otdd
from otdd import _torchvision, cli
from otdd.distill.config import ConfigError
from otdd.distill.export import FORMATS, export
from otdd.distill.store import StoreError

ODD = ["../../évil", "a/b", "a|b\n`c`", "null", "yes: [1]", "C:\\temp", "<b>&", "12"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "digits"
    finished_run(path)
    return path


def files(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("to", ["hf", "imagefolder"])
def test_exported_folder_is_the_set_again(run, tmp_path, to):
    out = tmp_path / "new" / to
    export(run, to, out, set="random")
    first, again = otdd.load(run, set="random"), otdd.load(out)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.soft_labels, again.soft_labels)
    assert (first.classes, first.mean, first.std) == (again.classes, again.mean, again.std)
    assert all(same(a, b) for a, b in zip(first.replay(), again.replay(), strict=True))
    assert {f"labels-0000{i}-of-00003.safetensors" for i in range(3)} <= files(out)
    with pytest.raises(StoreError, match="has no set 'kmeans'; there: random"):
        otdd.load(out, set="kmeans")
    export(out, "imagefolder", tmp_path / "twice")
    assert torch.equal(otdd.load(tmp_path / "twice").soft_labels, first.soft_labels)


def test_hugging_face_reads_names_types_and_soft_labels(run, tmp_path):
    export(run, "hf", tmp_path / "hf", set="random", license="cc-by-4.0")
    loaded = otdd.load(run, set="random")
    table = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))
    assert list(table) == ["train"]
    rows = table["train"]
    assert rows.features["label"].names == loaded.classes
    assert rows.features["soft_label"].length == 10
    assert rows.features["soft_label"].feature.dtype == "float32"
    assert torch.equal(torch.tensor(rows["soft_label"][:]), loaded.soft_labels)
    assert rows["label"][:] == loaded.labels.tolist()
    for row, image in zip(rows, loaded.images, strict=True):
        assert np.array_equal(np.array(row["image"]), image[0].numpy())


def test_odd_class_names_are_content_and_never_paths(tmp_path):
    images = written_set(tmp_path / "run", ODD)
    for to in FORMATS:
        export(tmp_path / "run", to, tmp_path / to)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"run", *FORMATS}
    for path in tmp_path.rglob("*"):
        assert all(part.isascii() and "b" not in part[:1] for part in path.parts[-2:])
    table = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))["train"]
    assert table.features["label"].names == ODD
    assert set(table.column_names) == {"image", "label"}
    pixels = torch.from_numpy(np.array(table[5]["image"])).permute(2, 0, 1)
    assert torch.equal(pixels, images[5])
    assert json.loads((tmp_path / "imagefolder/classes.json").read_text()) == ODD
    assert np.load(tmp_path / "npz/data.npz")["classes"].tolist() == ODD


def test_card_has_one_config_licence_and_figures(run, tmp_path):
    export(run, "hf", tmp_path / "hf", set="random", license="cc-by-4.0")
    _, head, body = (tmp_path / "hf/README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["license"] == "cc-by-4.0"
    assert [c["config_name"] for c in card["configs"]] == ["default"]
    (row,) = [
        r
        for r in json.loads((run / "metrics.json").read_text())["accuracy"]
        if (r["set"], r["loss"]) == ("random", "kl")
    ]
    assert f"| **random** | soft | kl | convnet | {row['mean']:.2f} |" in body
    found = files(tmp_path / "hf")
    assert {"classes.json", "otdd.json", "metrics.json", "grid.png"} <= found
    assert {"data/train-00000.parquet", "images/00009/00001.png"} <= found
    export(tmp_path / "hf", "hf", tmp_path / "again")
    assert files(tmp_path / "again") == found
    for name in found:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    manifest = json.loads((tmp_path / "hf/otdd.json").read_text())
    assert manifest["config"]["train"]["epochs"] == 3
    assert manifest["identity"]["data_sha256"] == manifest["data"]["sha256"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["timings"]


def test_parquet_is_cut_into_shards(run, tmp_path, monkeypatch):
    monkeypatch.setattr("otdd.distill.hf.SHARD_ROWS", 7)
    export(run, "hf", tmp_path / "hf", set="random")
    assert len(list((tmp_path / "hf/data").iterdir())) == 3
    table = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))["train"]
    loaded = otdd.load(run, set="random")
    assert torch.equal(torch.tensor(table["soft_label"][:]), loaded.soft_labels)
    assert table["label"][:] == loaded.labels.tolist()


def test_torchvision_reads_the_folder(run, tmp_path):
    _torchvision.repair()
    from torchvision.datasets import ImageFolder

    export(run, "imagefolder", tmp_path / "folder", set="random")
    read = ImageFolder(tmp_path / "folder")
    loaded = otdd.load(run, set="random")
    assert read.targets == loaded.labels.tolist()
    for (picture, _), image in zip(read, loaded.images, strict=True):
        assert np.array_equal(np.array(picture)[..., 0], image[0].numpy())


def test_npz_needs_no_pickle(run, tmp_path):
    export(run, "npz", tmp_path / "npz", set="random")
    loaded = otdd.load(run, set="random")
    with np.load(tmp_path / "npz/data.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["images"], loaded.images.numpy())
        assert np.array_equal(arrays["soft_labels"], loaded.soft_labels.numpy())
        assert arrays["classes"].tolist() == loaded.classes
    with pytest.raises(StoreError, match="is an export to npz; otdd reads the folders of runs"):
        otdd.load(tmp_path / "npz")


def test_ddranking_takes_plain_tensors(run, tmp_path):
    export(run, "ddranking", tmp_path / "dd", set="random")
    loaded = otdd.load(run, set="random")
    read = {p.stem: torch.load(p, weights_only=True) for p in (tmp_path / "dd").glob("*.pt")}
    assert set(read) == {"images", "labels", "hard_labels"}
    assert torch.equal(read["images"], loaded.normalise(loaded.images))
    assert torch.equal(read["labels"], loaded.soft_labels)
    assert read["labels"].dtype == read["images"].dtype == torch.float32
    assert torch.equal(read["hard_labels"], loaded.labels)


def test_webdataset_members(run, tmp_path, monkeypatch):
    monkeypatch.setattr("otdd.distill.formats.SHARD_IMAGES", 12)
    export(run, "webdataset", tmp_path / "wds", set="random")
    loaded, samples = otdd.load(run, set="random"), {}
    for path in sorted((tmp_path / "wds").glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
    assert sorted(p.name for p in (tmp_path / "wds").glob("*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
    ]
    assert len(samples) == 20
    for number, sample in enumerate(samples.values()):
        assert set(sample) == {"png", "cls", "json", "logits.npy"}
        assert int(sample["cls"]) == loaded.labels[number]
        logits = np.load(io.BytesIO(sample["logits.npy"]), allow_pickle=False)
        assert np.array_equal(logits, loaded.soft_labels[number].numpy())
        with Image.open(io.BytesIO(sample["png"])) as picture:
            assert np.array_equal(np.array(picture), loaded.images[number, 0].numpy())


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_set_gives_the_same_bytes(tmp_path, to):
    written_set(tmp_path / "run", ["a", "b"])
    for name in ("one", "two"):
        export(tmp_path / "run", to, tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_where_the_files_were_is_not_published(tmp_path):
    written_set(tmp_path / "run", ["a", "b"])
    export(tmp_path / "run", "imagefolder", tmp_path / "out")
    text = (tmp_path / "out/otdd.json").read_text()
    assert "/home/me" not in text
    manifest = json.loads(text)
    assert manifest["config"]["data"] == "toy"
    assert manifest["config"]["generator"] == "g.safetensors"
    assert manifest["identity"]["relabel.teachers"] == ["convnet=t.pt"]
    assert "out" not in manifest["config"]


def test_only_a_new_or_empty_folder(tmp_path):
    written_set(tmp_path / "run", ["a", "b"])
    (tmp_path / "empty").mkdir()
    export(tmp_path / "run", "npz", tmp_path / "empty")
    with pytest.raises(StoreError, match="empty is not empty; --out needs a new or an empty"):
        export(tmp_path / "run", "npz", tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file is a file; --out needs"):
        export(tmp_path / "run", "npz", tmp_path / "file")
    with pytest.raises(ConfigError, match="to: 'csv' is not accepted; expected one of hf, image"):
        export(tmp_path / "run", "csv", tmp_path / "x")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch, call):
    written_set(tmp_path / "run", ["a", "b"])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreError, match=r"out \(No space left on device\); nothing is left"):
        export(tmp_path / "run", "imagefolder", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_damaged_or_changed_pictures_are_named(tmp_path):
    written_set(tmp_path / "run", ["a", "b"])
    export(tmp_path / "run", "imagefolder", tmp_path / "out")
    picture = tmp_path / "out/00001/00001.png"
    Image.new("RGB", (9000, 9)).save(picture)
    with pytest.raises(StoreError, match=r"00001\.png is 9000x9, RGB; the set has images of 8x8"):
        otdd.load(tmp_path / "out", verify=False)
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(StoreError, match=r"00001\.png cannot be read"):
        otdd.load(tmp_path / "out", verify=False)
    manifest = json.loads((tmp_path / "out/otdd.json").read_text())
    manifest["labels"] = ["../../labels.safetensors"]
    (tmp_path / "out/otdd.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"otdd\.json is damaged; export the set again"):
        otdd.load(tmp_path / "out", verify=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layout", "../.."),
        ("layout", ["images"]),
        ("counts", [10**9]),
        ("counts", [2.0, 2]),
        ("counts", None),
        ("epochs", "many"),
        ("labels", [1]),
        ("set", None),
        ("data", {}),
        ("data", []),
    ],
)
def test_manifest_of_a_stranger_is_refused(tmp_path, key, value):
    written_set(tmp_path / "run", ["a", "b"])
    export(tmp_path / "run", "imagefolder", tmp_path / "out")
    file = tmp_path / "out/otdd.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(StoreError, match=r"otdd\.json is damaged; export the set again"):
        otdd.load(tmp_path / "out", verify=False)


def test_command(tmp_path, capsys):
    written_set(tmp_path / "run", ["a", "b"])
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(tmp_path / "run"), "--to", "npz", "--out", str(out)])
    assert not end.value.code
    said = capsys.readouterr().out
    assert f"written to {out}: set otg, 4 images in 2 classes, no soft labels; 3 files" in said
    assert "licence  unknown; name one with --license\n" in said
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(tmp_path / "run"), "--to", "npz", "--out", str(out)])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"otdd: {out} is not empty; --out needs a new or an empty folder\n"
    )
