"""Hugging Face data sets that are streamed: what is kept, and what is refused. No network."""

from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from distill.test_data import folder
from distill.test_data_hub import NAMES, on_disk, pictures, split
from PIL import Image

from otdd.distill.codec import PixelCodec
from otdd.distill.data import DataError, DataWarning, load_data
from otdd.distill.encode import EncodeConfig, encode
from otdd.distill.inputs.streamed import Streamed
from otdd.distill.stream import open_stream


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def parquet(root, **splits):
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        part.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    return f"hf:{root}"


def large(count, label=None):
    """Pictures of 40x30 and more, each of a colour of its own."""
    rows = [Image.new("RGB", (40 + k, 30), (20 * k, 50, 200)) for k in range(count)]
    features = datasets.Features(image=datasets.Image(), label=label or split().features["label"])
    table = {"image": rows, "label": [k % 2 for k in range(count)]}
    return datasets.Dataset.from_dict(table, features)


@pytest.mark.filterwarnings("ignore::otdd.distill.data.DataWarning")
def test_streamed_images_are_those_of_the_loaded_data(tmp_path):
    spec = parquet(tmp_path / "d", train=large(9), test=large(4))
    want = load_data(spec, resolution=8)
    data = load_data(f"{spec},streaming=true", resolution=8)
    assert (data.name, data.classes, data.fingerprint) == ("d", NAMES, want.fingerprint)
    assert torch.equal(data.train.images, want.train.images)
    assert torch.equal(data.test.labels, want.test.labels)


def test_one_pass_and_small_images_on_the_disk(tmp_path, cache, monkeypatch):
    spec = f"{parquet(tmp_path / 'd', train=large(9), test=large(4))},streaming=true"
    with pytest.warns(DataWarning, match="kept in") as told:
        data = load_data(spec, resolution=8)
    assert [str(w.message).split(": ")[1].split(" in ")[0] for w in told] == [
        "9 rows of train are kept",
        "4 rows of test are kept",
    ]
    pixels = sorted(f.stat().st_size for f in cache.rglob("*.pixels"))
    assert pixels == [4 * 3 * 8 * 8, 9 * 3 * 8 * 8]
    others = [f for f in cache.rglob("*") if f.is_file() and "/otdd/" not in str(f)]
    assert sum(f.stat().st_size for f in others) == 0  # locks of the library
    monkeypatch.setattr(Streamed, "_keep", None)  # nothing is read again
    assert load_data(spec, resolution=8).fingerprint == data.fingerprint
    seen = open_stream(spec, resolution=8)
    assert torch.equal(seen.read(0, 9), data.train.images)
    assert torch.equal(seen.take(torch.tensor([7, 2])), data.train.images[[7, 2]])


@pytest.mark.filterwarnings("ignore::otdd.distill.data.DataWarning")
def test_what_has_changed_is_read_again(tmp_path, cache):
    spec = f"{parquet(tmp_path / 'd', train=large(9))},streaming=true"
    assert len(load_data(spec, resolution=8).train) == 7
    next(cache.rglob("*.pixels")).write_bytes(b"cut")
    assert len(load_data(spec, resolution=8).train) == 7
    parquet(tmp_path / "d", train=large(20))
    data = load_data(spec, resolution=8)
    assert len(data.train) + len(data.test) == 20
    assert load_data(spec, resolution=4).image_shape == (3, 4, 4)


@pytest.mark.filterwarnings("ignore::otdd.distill.data.DataWarning")
def test_the_first_rows(tmp_path):
    spec = parquet(tmp_path / "d", train=large(9), test=large(5))
    for streaming in ("true", "false"):
        data = load_data(f"{spec},limit=4,streaming={streaming}", resolution=8)
        assert (len(data.train), len(data.test)) == (4, 4)
    with pytest.raises(DataError) as caught:
        load_data(f"{spec},limit=1,streaming=true", resolution=8)
    assert "(first 1 rows of each split) cannot be used" in str(caught.value)
    assert caught.value.problems == ["class 'é 🦊': no image"]


def test_labels_without_names_are_those_that_were_read(tmp_path):
    words = [NAMES[k % 2] for k in range(8)]
    part = split(label=datasets.Value("string"), labels=words)
    spec = f"{parquet(tmp_path / 'd', train=part)},streaming=true"
    with pytest.warns(DataWarning, match="label has no class names; they are the labels that were"):
        assert load_data(spec, resolution=8).classes == sorted(NAMES)


def test_withheld_labels(tmp_path):
    hidden = split(4, 60, labels=[-1] * 4)
    spec = parquet(tmp_path / "d", train=split(), test=hidden, validation=split(2, 50))
    with pytest.warns(DataWarning, match="split test is not used: no labels"):
        data = load_data(f"{spec},streaming=true", resolution=8)
    assert len(data.test) == 2


@pytest.mark.filterwarnings("ignore::otdd.distill.data.DataWarning")
def test_images_that_cannot_be_read_are_told_each_time(tmp_path):
    rows = split(10).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:40]
    rows[5]["image"] = {"bytes": None, "path": "/etc/hostname"}
    kinds = split().features.copy()
    kinds["image"] = datasets.Image(decode=False)
    table = datasets.Dataset.from_list(rows, features=kinds).data.table
    (tmp_path / "d").mkdir()
    spec = f"hf:{tmp_path / 'd'},streaming=true"
    about = split().features.arrow_schema.metadata
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "d/train.parquet")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            load_data(spec, resolution=8)
        first, second = caught.value.problems
        assert "train[3]: unreadable image" in first
        assert "train[5]: names the file /etc/hostname, outside of the data set" in second
    data = load_data(spec, resolution=8, skip_bad_images=True)
    assert [key for key, _ in data.skipped] == ["train[3]", "train[5]"]
    seen = open_stream(spec, resolution=8, skip_bad_images=True)
    assert torch.equal(seen.read(0, len(seen)), data.train.images)


@pytest.mark.filterwarnings("ignore::otdd.distill.data.DataWarning")
def test_an_image_folder_and_its_encoding(tmp_path):
    spec = f"hf:{folder(tmp_path / 'd', classes=('b', 'é a'))},streaming=true"
    held = load_data(spec, resolution=8)
    assert held.fingerprint == load_data(tmp_path / "d", resolution=8).fingerprint
    config = EncodeConfig(shard=4, batch=2, support=2)
    made = encode(open_stream(spec, resolution=8), PixelCodec(), config, tmp_path / "latents")
    seen = made.data(spec, resolution=8, seed=0, ipc=1)
    assert torch.equal(seen.train.of_class(1), held.train.of_class(1))


@pytest.mark.parametrize(
    ("settings", "resolution", "says"),
    [
        (
            "streaming=true",
            None,
            "keeps images at their resolution alone; give --resolution",
        ),
        ("streaming=yes", 8, "streaming=yes is not accepted; expected true or false"),
        ("limit=0", 8, "limit=0 is not accepted; expected an integer >= 1"),
        ("limit=-3", 8, "limit=-3 is not accepted; expected an integer >= 1"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, resolution, says):
    spec = parquet(tmp_path / "d", train=split())
    with pytest.raises(DataError, match=says):
        load_data(f"{spec},{settings}", resolution=resolution)


def test_kinds_of_folders_that_are_not_streamed(tmp_path):
    with pytest.raises(DataError, match="of save_to_disk: its images are read where they lie"):
        load_data(f"{on_disk(tmp_path / 'd', train=split())},streaming=true", resolution=8)
    (tmp_path / "e").mkdir()
    (tmp_path / "e/train.csv").write_text("image,label\na.png,1\n")
    with pytest.raises(DataError, match="is not known before it is loaded; leave out streaming"):
        load_data(f"hf:{tmp_path / 'e'},streaming=true", resolution=8)


class Builder:
    """What the library makes of a name on the Hub; its rows name files there."""

    def __init__(self, cache, paths):
        self.cache_dir, self.paths = cache, paths

    def as_streaming_dataset(self):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))

        def rows():
            for k, path in enumerate(self.paths):
                if path is None:
                    raise ConnectionError("the line\nis down")
                yield {"image": {"bytes": None, "path": path}, "label": k % 2}

        return {"train": datasets.IterableDataset.from_generator(rows, features=features)}


def on_the_hub(monkeypatch, tmp_path, paths):
    seen = []

    def build(*place, **known):
        seen.append((place, known))
        return Builder(tmp_path / "cache/built", paths)

    monkeypatch.setattr(datasets, "load_dataset_builder", build)
    return seen


@pytest.mark.filterwarnings("ignore::otdd.distill.data.DataWarning")
def test_files_on_the_hub(tmp_path, monkeypatch):
    root = "hf://datasets/me/photos@abc"
    paths = [f"{root}/{k}.png" for k in range(3)] + [f"zip://in/3.png::{root}/a.zip"]
    paths += ["/etc/hostname", "hf://datasets/other/secret@abc/1.png", f"{root}/../x@a/1.png"]
    asked = []

    def opened(url, mode):
        asked.append(url)
        return open(tmp_path / "one.png", mode)

    pictures(1)[0].save(tmp_path / "one.png")
    monkeypatch.setattr(fsspec, "open", opened)
    seen = on_the_hub(monkeypatch, tmp_path, paths)
    spec = "hf:me/photos,config=small,revision=v1,streaming=true"
    with pytest.raises(DataError) as caught:
        load_data(spec, resolution=8)
    assert seen == [(("me/photos", "small"), {"revision": "v1"})]
    assert sorted(asked) == sorted(paths[:4])
    assert [p.split(", ")[1].split(":")[0] for p in caught.value.problems] == [
        "train[4]",
        "train[5]",
        "train[6]",
    ]
    assert len(load_data(spec, resolution=8, skip_bad_images=True).train) == 2


def test_a_line_that_breaks_keeps_nothing(tmp_path, monkeypatch, capsys):
    pictures(1)[0].save(tmp_path / "one.png")
    root = "hf://datasets/me/photos@abc"
    monkeypatch.setattr(fsspec, "open", lambda url, mode: (tmp_path / "one.png").open(mode))
    on_the_hub(monkeypatch, tmp_path, [f"{root}/1.png"] * 70 + [None])
    with pytest.raises(DataError, match=r"reading train stopped after 64 rows: .*the line is down"):
        load_data("hf:me/photos,streaming=true", resolution=8)

    def fail(url, mode):
        raise OSError("503")

    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(DataError, match=r"1\.png cannot be read \(503\)"):
        load_data("hf:me/photos,streaming=true", resolution=8)
    monkeypatch.setattr(Streamed, "_rows", lambda *_: iter(lambda: 1 / 0, None))
    with pytest.raises(DataError, match="reading test stopped after 0 rows: division by zero"):
        Streamed({}, "data", None, (), tmp_path, 8, None).hidden("test", "label")
    assert [f for f in (tmp_path / "cache").rglob("*") if "otdd" in f.parts and f.is_file()] == []


def test_a_full_disk_is_told(tmp_path, cache):
    spec = f"{parquet(tmp_path / 'd', train=split())},streaming=true"
    where = Path(datasets.load_dataset_builder(str(tmp_path / "d")).cache_dir)
    where.mkdir(parents=True)
    (where / "otdd").write_text("no folder")
    with pytest.raises(DataError, match=r"cannot keep images in .*otdd \(File exists\)"):
        load_data(spec, resolution=8)


def test_grey_and_colour_together(tmp_path):
    images = [Image.fromarray(np.full((9, 9), 40, np.uint8)), Image.new("RGB", (9, 9), (1, 2, 3))]
    table = {"image": images * 3, "label": [0, 1] * 3}
    features = datasets.Features(image=datasets.Image(), label=split().features["label"])
    spec = parquet(tmp_path / "d", train=datasets.Dataset.from_dict(table, features))
    with pytest.warns(DataWarning, match="kept"):
        data = load_data(f"{spec},streaming=true", resolution=4)
    assert data.image_shape == (3, 4, 4)
    assert data.train.of_class(0).unique().tolist() == [40]
