"""The folder of a run as a Hugging Face data set: its card, and a table of every set."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from distill.finished_run import finished_run, settings, written_set

import otdd
from otdd.distill import hf
from otdd.distill.export import export
from otdd.distill.pipeline import run_stages
from otdd.distill.settings import to_dict
from otdd.distill.store import Store, StoreError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("with blank é") / "digits run"
    finished_run(path)
    return path


def tables(folder, *name, cache):
    return datasets.load_dataset(str(folder), *name, split="train", cache_dir=str(cache))


def columns(folder, name):
    path = f"{folder}/sets/{name}/data/train-00000.parquet"
    return datasets.Dataset.from_parquet(path, cache_dir=f"{folder}-cache").column_names


@pytest.mark.parametrize("name", [(), ("random",), ("kmeans",)])
def test_every_set_is_read_with_names_and_soft_labels(folder, tmp_path, name):
    loaded = otdd.load(folder, set=name[0] if name else "random")
    table = tables(folder, *name, cache=tmp_path)
    assert table.features["label"].names == loaded.classes
    assert table["label"][:] == loaded.labels.tolist()
    assert table.features["soft_label"].length == len(loaded.classes)
    assert torch.equal(torch.tensor(table["soft_label"][:]), loaded.soft_labels)
    for row, image in zip(table, loaded.images, strict=True):
        assert np.array_equal(np.array(row["image"]), image[0].numpy())


def test_otg_is_the_default_set(tmp_path):
    written_set(tmp_path / "run", ["b", "a"], name="otg")
    with Store(tmp_path / "run") as store:
        part = store.read_images("otg")
        store.write_images("kmeans", 255 - part["images"], part["labels"])
        hf.describe_run(store, {"kmeans": False, "otg": False}, {"ipc": 2}, {})
    names = datasets.get_dataset_config_names(str(tmp_path / "run"))
    assert names == ["otg", "kmeans"]
    first = tables(tmp_path / "run", cache=tmp_path / "cache")[0]["image"]
    assert np.array_equal(np.array(first).transpose(2, 0, 1), part["images"][0].numpy())


def test_folders_of_one_name_are_told_apart_in_one_cache(tmp_path):
    for place in "ab":
        run, given = tmp_path / place / "run", tmp_path / place / "given"
        images = written_set(run, ["x", "y"])
        with Store(run) as store:
            hf.describe_run(store, {"otg": False}, {"ipc": 2}, {})
        export(run, "hf", given)
        for folder in (run, given):
            first = tables(folder, cache=tmp_path / "cache")[0]["image"]
            assert np.array_equal(np.array(first).transpose(2, 0, 1), images[0].numpy())


def test_a_cache_does_not_outlive_a_change(folder, tmp_path):
    config = to_dict(copied(folder, tmp_path))
    for labelled in (False, True):
        with Store(tmp_path / "run") as store:
            hf.describe_run(store, {"random": labelled}, config, {})
        names = tables(tmp_path / "run", cache=tmp_path / "cache").column_names
        assert ("soft_label" in names) == labelled


def test_odd_class_names(tmp_path):
    odd = ["../../évil", "a/b", "a|b\n`c`", "null", "yes: [1]", "---", "<b>&", "12"]
    written_set(tmp_path / "run", odd)
    with Store(tmp_path / "run") as store:
        hf.describe_run(store, {"otg": False}, {"ipc": 2, "data": "/home/me/toy"}, {})
    table = tables(tmp_path / "run", cache=tmp_path / "cache")
    assert table.features["label"].names == odd
    assert "/home" not in (tmp_path / "run" / "README.md").read_text()


def test_the_card_tells_the_figures_of_all_sets(folder):
    text = (folder / "README.md").read_text()
    for words in ("| **random** | soft | kl |", "| kmeans | hard | ce |", "license: unknown"):
        assert words in text
    for name in ("grid.png", "config.json", "otdd.json", "metrics.json", "data.json"):
        assert name in text
        assert (folder / name).exists()


def copied(folder, tmp_path):
    """Settings of a copy of the run."""
    shutil.copytree(folder, tmp_path / "run")
    return settings(tmp_path / "run")


def test_soft_labels_that_come_later_are_taken_in(folder, tmp_path):
    config = to_dict(copied(folder, tmp_path))
    with Store(tmp_path / "run") as store:
        hf.describe_run(store, {"random": False}, config, {})
        assert columns(tmp_path / "run", "random") == ["image", "label"]
        hf.describe_run(store, {"random": True}, config, {})
        assert columns(tmp_path / "run", "random") == ["image", "label", "soft_label"]


def test_what_is_missing_is_made_again_and_what_is_there_stays(folder, tmp_path, monkeypatch):
    config = copied(folder, tmp_path)
    for name in config.sets:
        shutil.rmtree(tmp_path / f"run/sets/{name}/data")
    monkeypatch.setattr(hf, "SHARD_ROWS", 7)
    run_stages(config, ("evaluate",))
    files = sorted((tmp_path / "run").glob("sets/*/data/*.parquet"))
    assert len(files) == 6  # three of 20 images, twice
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    files[1].unlink()
    (tmp_path / "run" / "README.md").unlink()
    run_stages(config, ("evaluate",))
    assert (tmp_path / "run" / "README.md").exists()
    for path, (data, time) in before.items():
        assert path.read_bytes() == data
        assert (path.stat().st_mtime_ns == time) == ("random" in str(path))


def test_what_is_said_of_teachers_survives_metrics_that_could_not_be_written(folder, tmp_path):
    config, before = copied(folder, tmp_path), {}
    with Store(tmp_path / "run") as store:
        before = store.read_json("metrics.json")
        assert before["teachers"]
        store.sums.keep()
        store.write_json("metrics.json", {**before, "teachers": []})  # that of the stage before
    run_stages(config, ("evaluate",))
    assert Store(tmp_path / "run").read_json("metrics.json")["teachers"] == before["teachers"]


def test_teachers_are_told_when_their_weights_and_the_metrics_are_gone(folder, tmp_path):
    config = copied(folder, tmp_path)
    metrics = tmp_path / "run" / "metrics.json"
    before = json.loads(metrics.read_text())["teachers"]
    metrics.unlink()
    shutil.rmtree(tmp_path / "run" / "teachers")
    run_stages(config, ("evaluate",))
    assert before
    assert json.loads(metrics.read_text())["teachers"] == before
    assert not (tmp_path / "run" / "teachers").exists()


def test_broken_tables_without_a_hash_are_made_again(folder, tmp_path):
    config = copied(folder, tmp_path)
    path = tmp_path / "run" / "sets/random/data/train-00000.parquet"
    before = path.read_bytes()
    path.write_bytes(before[:9])
    (tmp_path / "run" / "SHA256SUMS").unlink()
    run_stages(config, ("evaluate",))
    assert path.read_bytes() == before


def test_changed_tables_are_named(folder, tmp_path):
    config = copied(folder, tmp_path)
    path = tmp_path / "run" / "sets/random/data/train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"sets/random/data/train-00000\.parquet"):
        run_stages(config, ("evaluate",))


def test_a_readme_of_someone_else_stays(folder, tmp_path):
    config = copied(folder, tmp_path)
    card = tmp_path / "run" / "README.md"
    card.unlink()
    with Store.open(config.out, {}, lock=True):  # then the list knows no card, as in older folders
        pass
    card.write_text("my notes")
    run_stages(config, ("evaluate",))
    assert card.read_text() == "my notes"
    card.unlink()
    card.mkdir()
    run_stages(config, ("evaluate",))
    assert card.is_dir()
