"""Hugging Face data sets from local folders: splits, columns, and what is refused. No network."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from distill.finished_run import finished_run
from distill.test_data import folder
from PIL import Image

from otdd.distill.codec import PixelCodec
from otdd.distill.config import ConfigError
from otdd.distill.data import DataError, DataWarning, load_data
from otdd.distill.encode import EncodeConfig, encode
from otdd.distill.export import export
from otdd.distill.inputs.spec import absolute, published
from otdd.distill.latents import Latents
from otdd.distill.stream import StreamedImages, open_stream

NAMES = ["z", "é 🦊"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def pictures(count, start=0):
    numbers = range(start, start + count)
    return [
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 8), np.uint8))
        for k in numbers
    ]


def split(count=8, start=0, label=None, **columns):
    label = label or datasets.ClassLabel(names=NAMES)
    values = columns.pop("labels", [k % 2 for k in range(count)])
    features = {"image": datasets.Image(), "label": label}
    rows = {"image": pictures(count, start), "label": values, **columns}
    made = datasets.Dataset.from_dict(
        {k: rows[k] for k in ("image", "label")}, datasets.Features(features)
    )
    for name, column in columns.items():
        made = made.add_column(name, column)
    return made


def on_disk(path, **splits):
    datasets.DatasetDict(splits).save_to_disk(path)
    return f"hf:{path}"


def pixels(images):
    return torch.stack([torch.from_numpy(np.array(image))[None] for image in images])


def test_saved_to_disk(tmp_path):
    data = load_data(on_disk(tmp_path / "d", train=split(), test=split(4, 50)))
    assert data.classes == NAMES  # not sorted
    assert data.name == "d"
    assert torch.equal(data.train.images, pixels(pictures(8)))
    assert torch.equal(data.test.images, pixels(pictures(4, 50)))
    assert data.train.labels.tolist() == [0, 1] * 4


def test_one_split_saved_to_disk_is_divided(tmp_path):
    split(10).save_to_disk(tmp_path / "d")
    data = load_data(f"hf:{tmp_path / 'd'}", seed=1)
    assert (len(data.train), len(data.test)) == (8, 2)


def test_parquet_files_and_their_stream(tmp_path):
    for name, part in (("train", split(9)), ("test", split(4, 50))):
        (tmp_path / "d" / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(tmp_path / "d" / "data" / f"{name}-00000-of-00001.parquet")
    spec = f"hf:{tmp_path / 'd'}"
    data, seen = load_data(spec), open_stream(spec)
    assert data.classes == seen.classes == NAMES
    assert (len(data.train), len(data.test)) == (9, 4)
    assert torch.equal(seen.read(0, 9), data.train.images)
    assert torch.equal(seen.take(torch.tensor([7, 2])), data.train.images[[7, 2]])
    assert torch.equal(seen.test.labels, data.test.labels)
    changed = split(9).to_list()
    changed[3]["image"] = pictures(1, 99)[0]
    digests = [seen.digest(0, 3), seen.digest(3, 6)]
    rows = datasets.Dataset.from_list(changed, features=split().features)
    rows.to_parquet(tmp_path / "d" / "data" / "train-00000-of-00001.parquet")
    again = open_stream(spec)
    assert [again.digest(0, 3) == digests[0], again.digest(3, 6) == digests[1]] == [True, False]


def test_an_image_folder_read_by_datasets_is_the_folder(tmp_path):
    root = folder(tmp_path / "d", classes=("b", "é a"))
    data, want = load_data(f"hf:{root}"), load_data(root)
    assert (data.classes, data.fingerprint) == (want.classes, want.fingerprint)


def test_an_exported_set_is_an_input(tmp_path):
    finished_run(tmp_path / "run")
    made = export(tmp_path / "run", "hf", tmp_path / "out", set="random")
    data = load_data(f"hf:{tmp_path / 'out'}")
    assert data.classes == made.classes
    everything = torch.cat([data.train.images, data.test.images])
    assert len(everything) == len(made)
    assert {i.numpy().tobytes() for i in everything} == {i.numpy().tobytes() for i in made.images}


def test_splits_that_test(tmp_path):
    hidden = split(4, 60, labels=[-1] * 4)
    spec = on_disk(tmp_path / "d", train=split(), test=hidden, validation=split(2, 50))
    with pytest.warns(DataWarning, match="split test is not used: no labels"):
        data = load_data(spec)
    assert torch.equal(data.test.images, pixels(pictures(2, 50)))
    spec = on_disk(tmp_path / "e", train=split(), test=split(4, 60), validation=split(2, 50))
    with pytest.warns(DataWarning, match="split validation is not used: there is test"):
        assert len(load_data(spec).test) == 4
    assert len(load_data(f"{spec},test=validation").test) == 2
    data = load_data(f"{spec},split=test,test=validation")
    assert (len(data.train), len(data.test)) == (4, 2)
    with pytest.raises(DataError, match="no split test=dev; there are train, test, validation"):
        load_data(f"{spec},test=dev")
    spec = on_disk(tmp_path / "f", a=split(), b=split(2, 50))
    with pytest.raises(DataError, match=r"no split is called train; there are a, b; give ,split="):
        load_data(spec)


def test_a_test_split_with_other_class_names_is_refused(tmp_path):
    turned = datasets.ClassLabel(names=NAMES[::-1])  # its 0 is the 1 of the training split
    spec = on_disk(tmp_path / "d", train=split(), test=split(4, 50, turned))
    with pytest.raises(DataError, match="class labels of split test have other names"):
        load_data(spec)


def test_splits_without_the_columns_do_not_test(tmp_path):
    other = split(4, 50)
    tests = {"test": other.rename_column("label", "klass"), "val": other.remove_columns("image")}
    with pytest.warns(DataWarning) as told:
        data = load_data(on_disk(tmp_path / "d", train=split(10), **tests))
    notes = [warning.message.note for warning in told]
    assert "split test is not used: no column label" in notes
    assert "split val is not used: no column image" in notes
    assert (len(data.train), len(data.test)) == (8, 2)


def test_a_file_is_no_name_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    split().to_parquet(tmp_path / "photos" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is a file; expected a folder, such as hf:photos"):
        load_data("hf:photos/train.parquet")


def test_labels_without_names(tmp_path):
    words = [NAMES[k % 2] for k in range(8)]
    spec = on_disk(tmp_path / "d", train=split(label=datasets.Value("string"), labels=words))
    assert load_data(spec).classes == sorted(NAMES)
    numbers = [(10, 9)[k % 2] for k in range(8)]
    spec = on_disk(tmp_path / "e", train=split(label=datasets.Value("int32"), labels=numbers))
    assert load_data(spec).classes == ["9", "10"]
    for value, kind in ((0.5, "float32"), (True, "bool")):
        label, labels = datasets.Value(kind), [value] * 8
        spec = on_disk(tmp_path / kind, train=split(label=label, labels=labels))
        with pytest.raises(
            DataError, match=r"column label is .*expected labels: integers or texts"
        ):
            load_data(spec)
    spec = on_disk(tmp_path / "g", train=split(labels=[0, 1, None, 0, 1, 0, None, 1]))
    with pytest.raises(DataError, match=r"row 2: no label\n  row 6: no label"):
        load_data(spec)


def test_columns_that_are_not_clear(tmp_path):
    two = split(coarse=[0, 0, 1, 1] * 2).cast_column(
        "coarse", datasets.ClassLabel(names=["x", "y"])
    )
    spec = on_disk(tmp_path / "d", train=two)
    with pytest.raises(DataError, match=r"2 columns could be the label; .*coarse \(ClassLabel\)"):
        load_data(spec)
    assert load_data(f"{spec},label_column=coarse").classes == ["x", "y"]
    columns = two.to_dict()
    columns["picture"] = columns["image"][::-1]
    kinds = datasets.Features({**two.features, "picture": datasets.Image()})
    other = datasets.Dataset.from_dict(columns, kinds)
    spec = on_disk(tmp_path / "e", train=other)
    with pytest.raises(DataError, match=r"2 columns could be the image; .*picture \(Image\)"):
        load_data(f"{spec},label_column=coarse")
    assert load_data(f"{spec},label_column=label,image_column=picture").classes == NAMES
    with pytest.raises(DataError, match="no column is label_column=none; there are image"):
        load_data(f"{spec},label_column=none,image_column=image")
    with pytest.raises(DataError, match="column coarse holds no images"):
        load_data(f"{spec},label_column=label,image_column=coarse")
    spec = on_disk(tmp_path / "f", train=split().rename_column("label", "kind"))
    assert load_data(spec).classes == NAMES  # by its type, not its name
    texts = split(label=datasets.Value("string"), labels=NAMES * 4).rename_column("label", "kind")
    with pytest.raises(DataError, match=r"no column is the label; there are image \(Image\), kind"):
        load_data(on_disk(tmp_path / "g", train=texts))


def test_rows_that_are_no_image_are_named(tmp_path):
    rows = [{"bytes": None, "path": "/etc/hostname"}, {"bytes": b"", "path": "x.png"}, None]
    rows += [{"bytes": b"text", "path": None}, {"bytes": None, "path": ""}]
    rows += [{"bytes": None, "path": str(tmp_path / "d" / ".." / "outside.png")}]
    pictures(1)[0].save(tmp_path / "outside.png")
    good = split(10).cast_column("image", datasets.Image(decode=False)).to_dict()["image"]
    about = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("string"))
    kinds = about.copy()
    table = {"image": good + rows, "label": NAMES * 8}
    (tmp_path / "d").mkdir()
    about["image"] = datasets.Image()
    arrow = datasets.Dataset.from_dict(table, kinds).data.table
    arrow = arrow.replace_schema_metadata(about.arrow_schema.metadata)
    pq.write_table(arrow, tmp_path / "d" / "train.parquet")
    spec = f"hf:{tmp_path / 'd'}"
    with pytest.raises(DataError) as caught:
        load_data(spec)
    says = (
        ("10", "names the file /etc/hostname, outside of the data set"),
        ("11", "empty (0 bytes)"),
        ("12", "no image"),
        ("13", "unreadable image"),
        ("14", "no image"),
        ("15", "names the file"),
    )
    assert len(caught.value.problems) == len(says)
    for problem, (row, text) in zip(caught.value.problems, says, strict=True):
        assert f"d, train[{row}]: {text}" in problem
    with pytest.warns(DataWarning, match=r"6 images that cannot be read are left out"):
        data = load_data(spec, skip_bad_images=True)
    assert len(data.train) + len(data.test) == 10
    assert data.skipped[1] == ("train[11]", "empty (0 bytes)")


def test_classes_without_an_image(tmp_path):
    label = datasets.ClassLabel(names=[*NAMES, "none"])
    spec = on_disk(
        tmp_path / "d", train=split(label=label), test=split(2, label=label, labels=[0, 0])
    )
    with pytest.raises(DataError) as caught:
        load_data(spec)
    assert caught.value.problems == [
        "class 'é 🦊' is in train only: no image in test",
        "class 'none': no image",
    ]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hf:", "data hf: is no folder, and no OWNER/NAME"),
        ("hf:nowhere", "is no folder, and no OWNER/NAME"),
        ("hf:./nowhere/x", "is no folder, and no OWNER/NAME"),
        ("hf:owner/name/more", "is no folder, and no OWNER/NAME"),
        ("hf:owner/name,label=x", "label=x is not accepted; here: config=..., revision=..., split"),
        ("hf:owner/name,revision=main", r"cannot be loaded \(HF_HUB_OFFLINE is set\)"),
    ],
)
def test_names_that_lead_nowhere(spec, says, monkeypatch):
    def refuse(*_, **known):
        assert known == {"revision": "main"}
        raise ConnectionError("Offline mode is enabled.\nReally.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=says) as caught:
        load_data(spec)
    assert "\n" not in str(caught.value)


def test_a_name_on_the_hub(monkeypatch):
    seen = []

    def give(*place, **known):
        seen.append((place, known))
        return datasets.DatasetDict(train=split(), test=split(4, 50))

    monkeypatch.setattr(datasets, "load_dataset", give)
    data = load_data("hf:some-one/Photos.v2,config=small,revision=v1")
    assert seen == [(("some-one/Photos.v2", "small"), {"revision": "v1"})]
    assert data.name == "some-one/Photos.v2"
    assert "trust_remote_code" not in seen[0][1]


def test_without_the_library(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "otdd\[hub\]"'):
        load_data(f"hf:{tmp_path}")


def test_a_script_in_a_folder_is_not_run(tmp_path):
    root = folder(tmp_path / "d")
    (root / "d.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(DataError, match=r"cannot be loaded: Dataset scripts are no longer supp"):
        load_data(f"hf:{root}")
    assert not (tmp_path / "run").exists()


def test_encoded_rows_are_read_where_they_are_wanted(tmp_path):
    spec = on_disk(tmp_path / "d", train=split(9), test=split(4, 50))
    config = EncodeConfig(shard=4, batch=2, support=2)
    made = encode(open_stream(spec), PixelCodec(), config, tmp_path / "latents")
    wanted = {"resolution": None, "seed": 0, "ipc": 1}
    seen, held = made.data(spec, **wanted), load_data(spec)
    assert isinstance(seen.train.images, StreamedImages)
    assert (seen.fingerprint, seen.mean, seen.classes) == (held.fingerprint, held.mean, NAMES)
    assert torch.equal(seen.train.of_class(1), held.train.of_class(1))
    other = on_disk(tmp_path / "e", train=split(9, 1), test=split(4, 50))
    with pytest.raises(ConfigError, match=r"from other images \(among 0 to 3\)"):
        Latents(tmp_path / "latents").data(other, **wanted)


def test_specs_as_they_are_kept_and_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "t.csv").write_text("")
    kept = {
        "photos": f"{tmp_path}/photos",
        "hf:photos,split=a,test=b": f"hf:{tmp_path}/photos,split=a,test=b",
        "t.csv,label_column=x,root=other": f"{tmp_path}/t.csv,label_column=x,root={tmp_path}/other",
    }
    for spec, whole in kept.items():
        assert absolute(spec) == absolute(whole) == whole
        assert published(whole) == published(spec) == spec
    (tmp_path / "digits").mkdir()  # not what `--data digits` reads
    for spec in ("digits", "hf:owner/name,split=train"):
        assert absolute(spec) == published(spec) == spec
