"""Tables of paths and labels: what they give, and every row that is refused."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distill.test_data import folder, picture

from otdd.distill.data import DataError, DataWarning, load_data
from otdd.distill.inputs.pictures import decode
from otdd.distill.stream import open_stream


def table(path, rows, head="path,label", delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([head.split(","), *rows])
    return path


def rows_of(root, labels=("a", "b")):
    """Rows of all images of a folder with a split, in the order in which a folder is read."""
    found = []
    for part in ("train", "val"):
        for label in labels:
            paths = sorted((root / part / label).glob("*.png"))
            found += [[p.relative_to(root).as_posix(), label, part] for p in paths]
    return found


def as_parquet(target, rows, **schema):
    columns = list(zip(*rows, strict=True))
    pq.write_table(pa.table({n: pa.array(c) for n, c in zip(schema, columns, strict=True)}), target)
    return target


@pytest.fixture
def root(tmp_path):
    return folder(tmp_path / "photos", classes=("é 🦊 b", "a"))


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolons", "parquet"])
def test_a_table_of_a_folder_is_the_folder(root, kind):
    rows = rows_of(root, ("a", "é 🦊 b"))
    if kind == "parquet":
        spec = as_parquet(root / "t.parquet", rows, file="", klass="", split="")
        spec = f"{spec},label_column=klass"
    else:
        delimiter = {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind]
        name = "t.tsv" if kind == "tsv" else "t.csv"
        spec = table(root / name, rows, "image,class,split", delimiter)
    data, want = load_data(spec), load_data(root)
    assert data.classes == want.classes == ["a", "é 🦊 b"]
    assert (data.name, data.fingerprint) == ("t", want.fingerprint)
    seen = open_stream(spec)
    assert torch.equal(seen.read(0, len(seen)), want.train.images)
    assert torch.equal(seen.test.labels, want.test.labels)


def test_integers_are_ordered_as_numbers_and_images_as_rows(tmp_path):
    for n in range(9):
        picture(tmp_path / f"{n}.png", n)
    rows = [[f"{n}.png", label] for n, label in enumerate([10, 9, -1, 10, 9, -1, 10, 9, -1])]
    data = load_data(table(tmp_path / "t.csv", rows))
    assert data.classes == ["-1", "9", "10"]
    pixels = [decode(tmp_path / f"{n}.png", None) for n in range(9)]
    order = [next(n for n in range(9) if torch.equal(pixels[n], i)) for i in data.train.images]
    assert order == sorted(order)
    assert data.train.labels.tolist() == [[2, 1, 0][n % 3] for n in order]
    assert (
        data.fingerprint
        == load_data(as_parquet(tmp_path / "t.parquet", rows, path="", label="")).fingerprint
    )
    names = table(tmp_path / "n.csv", [[path, f"{label:03d}"] for path, label in rows])
    assert load_data(names).classes == ["-01", "009", "010"]


def test_validation_tests_where_there_is_no_test(root):
    rows = rows_of(root, ("a", "é 🦊 b"))
    some = [[path, label, "Training" if part == "train" else "valid"] for path, label, part in rows]
    spec = table(root / "t.csv", some, "path,label,split")
    assert load_data(spec).fingerprint == load_data(root).fingerprint
    for number in (4, 7):
        some[8 + number][2] = "test"
    for number in (1, 5):
        some[number][2] = "test"
    table(spec, some, "path,label,split")
    with pytest.warns(DataWarning, match="6 images of the split val are not used"):
        data = load_data(spec)
    assert (len(data.train), len(data.test)) == (6, 4)


def test_everything_wrong_is_told_at_once(root):
    rows = [
        *rows_of(root, ("a", "é 🦊 b")),
        ["train/a/0.png", "a", "val"],
        ["train/a/./1.png", "é 🦊 b", "train"],
        ["train/a/none.png", "a", "train"],
        ["../../etc/passwd", "a", "train"],
        ["/etc/passwd", "a", "train"],
        [".", "a", "train"],
        ["", "a", "train"],
        ["train/a/2.png", "", "train"],
        ["train/a/3.png", "a", "dev"],
        ["train/a/3.png", "a", "train", "more"],
        ["a\0b", "a", "train"],
    ]
    (root / "train" / "a" / "cut.png").write_bytes((root / "train/a/2.png").read_bytes()[:50])
    rows.append(["train/a/cut.png", "lonely", "train"])
    with pytest.raises(DataError) as caught:
        load_data(table(root / "t.csv", rows, "path,label,split"))
    message = str(caught.value)
    for part in (
        "train/a/0.png: twice, rows 2 and 18, in train and in test",
        "train/a/./1.png: twice, rows 3 and 19, labels 'a' and 'é 🦊 b'",
        "train/a/none.png: no such file",
        "row 21: '../../etc/passwd' leads out of",
        "row 22: '/etc/passwd' leads out of",
        "row 23: '.' leads out of",
        "row 24: no path",
        "row 25: no label",
        "row 26: split 'dev' is not one of train, training, test",
        "row 27: more cells than columns",
        "row 28: no path",
        "cut.png: unreadable image",
        "class 'lonely' is in train only: no image in val",
    ):
        assert part in message
    assert len(caught.value.problems) == 14  # the row of 27 is twice as well


def test_where_paths_may_lead(root, tmp_path):
    rows = [[str(root / path), label, part] for path, label, part in rows_of(root, ("a", "é 🦊 b"))]
    inside = table(root / "t.csv", rows, "path,label,split")
    assert load_data(inside).num_classes == 2  # absolute, but in its folder
    outside = table(tmp_path / "t.csv", rows_of(root, ("a", "é 🦊 b")), "path,label,split")
    assert load_data(f"{outside},root={root}").fingerprint == load_data(root).fingerprint
    with pytest.raises(DataError, match=r"train/a/0.png: no such file"):
        load_data(outside)
    (root / "link").symlink_to(root / "train")  # links of the owner of the folder are followed
    some = [[path.replace("train/", "link/"), *rest] for path, *rest in rows_of(root, ("a",))]
    some += rows_of(root, ("é 🦊 b",))
    assert len(load_data(table(root / "t.csv", some, "path,label,split")).train) == 8
    with pytest.raises(DataError, match="root=/nowhere is no folder"):
        load_data(f"{outside},root=/nowhere")


@pytest.mark.parametrize(
    ("head", "options", "says"),
    [
        ("path,file,label", "", "several columns could be path, file; .*give ,image_column=NAME"),
        ("x,label", "", "no column is called path, .*; there are x, label"),
        ("path,breed", "", "no column is called label, class; there are path, breed"),
        ("path,label", ",label_column=breed", "no column label_column=breed; there are path"),
        ("path,label", ",colour=red", "colour=red is not accepted; here: image_column=..., label"),
        ("path,label", ",root=", "root= is not accepted"),
        ("", "", "there are none"),
    ],
)
def test_columns_that_are_not_clear(tmp_path, head, options, says):
    (tmp_path / "t.csv").write_text(head and head + "\na.png,b,c\n")
    with pytest.raises(DataError, match=says):
        load_data(f"{tmp_path}/t.csv{options}")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", b"path,label\n\xff\xfe,a\n", "cannot be read .*UTF-8"),
        ("t.csv", b'path,label\n"a.png,a\n', "cannot be read"),
        ("t.parquet", b"PAR1", "cannot be read"),
        ("t.csv", b"path,label\n", "cannot be used: *\n"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_data(tmp_path / name)
    with pytest.raises(DataError, match=r"none.csv' is no file; accepted: 'digits', .* \.npz"):
        load_data(tmp_path / "none.csv")


def test_parquet_files_of_images_or_no_texts(tmp_path):
    texts = pa.array([b"\xff"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"path": texts, "label": texts}), tmp_path / "u.parquet")
    with pytest.raises(DataError, match=r"cannot be read .*utf-8"):
        load_data(tmp_path / "u.parquet")
    rows = pa.array([{"bytes": b"", "path": "a"}])
    pq.write_table(pa.table({"image": rows, "label": pa.array([0])}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="holds images, not their paths; give its folder as hf:"):
        load_data(tmp_path / "t.parquet")
    rows = pa.array([b"a.png"])
    pq.write_table(pa.table({"image": rows, "label": pa.array([0])}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column image holds bytes; expected paths of images"):
        load_data(tmp_path / "t.parquet")


def test_other_columns_of_a_parquet_file_may_hold_anything(tmp_path):
    folder(tmp_path, split=False)
    paths = [f"{name}/{n}.png" for name in "ab" for n in range(4)]
    columns = {"path": paths, "label": [path[0] for path in paths], "box": [{"x": 1}] * 8}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert load_data(tmp_path / "t.parquet").classes == ["a", "b"]


def test_names_with_commas_are_names(tmp_path):
    root = folder(tmp_path / "a,root=b")
    assert load_data(root).num_classes == 2
