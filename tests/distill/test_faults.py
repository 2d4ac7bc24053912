"""Faults put into a tiny run of every stage: a thin version of `benchmarks/faults.py`."""

import pytest
from distill import campaigns
from distill.faults import STAGES, contents, finished


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("faults") / "whole")


def held(rows, outcomes, count=None):
    assert [row for row in rows if row.fault] == []
    assert {row.outcome for row in rows} <= set(outcomes)
    assert len(rows) == count if count is not None else rows


def test_a_run_has_every_stage_and_is_the_same_each_time(whole, tmp_path):
    rows = campaigns.stops(whole, tmp_path / "a", 2, seed=3)
    held(rows, [campaigns.SAME], 2)
    assert {name.partition("/")[0] for name in contents(whole)} == {
        *("g.safetensors", "g.safetensors.grids", "surrogate", "latents", "run", "hf"),
    }
    assert len(contents(whole)) > 50


def test_interrupted_and_started_again(whole, tmp_path):
    held(campaigns.stops(whole, tmp_path / "a", 1, 5, "interrupt"), [campaigns.SAME], 1)


def test_disk_full(whole, tmp_path):
    held(campaigns.full_disks(whole, tmp_path / "a", 1, seed=1), [campaigns.FULL], 1)
    held(campaigns.file_limits(whole, tmp_path / "a", [5000]), [campaigns.FULL], 1)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("run/sets/otg/images.safetensors", "flipped"),
        ("run/sets/kmeans/images/00001/00001.png", "deleted"),
        ("run/sets/unguided/labels/00001.safetensors", "cut"),
        ("run/results/otg/convnet/soft-kl-0.json", "emptied"),
        ("run/logs/otg/convnet/hard-ce-0.csv", "emptied"),
        ("run/geometry/otg/convnet/soft-kl-0.json", "deleted"),
        ("run/sets/otg/data/train-00000.parquet", "cut"),
        ("run/README.md", "flipped"),
        ("run/teachers.json", "deleted"),
        ("run/otdd.json", "deleted"),
        ("run/config.json", "flipped"),
        ("run/SHA256SUMS", "deleted"),
        ("latents/latents-00001.safetensors", "flipped"),
        ("latents/statistics/00000.safetensors", "flipped"),
        ("surrogate/checkpoint-00.safetensors", "deleted"),
        ("g.safetensors", "flipped"),
    ],
)
def test_damaged_files_are_named_and_made_again(whole, tmp_path, name, way):
    ends = (campaigns.NAMED, campaigns.AGAIN)
    held(campaigns.damage(whole, tmp_path / "a", [name], [way]), ends, 1)


def test_a_damaged_teacher_whose_labels_are_all_there_is_named(whole, tmp_path):
    rows = campaigns.damage(whole, tmp_path / "a", ["run/teachers/convnet-0.safetensors"], ["cut"])
    held(rows, [f"named in one line; {campaigns.ABSENT}"], 1)


def test_damaged_latents_are_not_read(whole, tmp_path):
    names = ["latents/statistics/00001.safetensors", "latents/latents-00000.safetensors"]
    rows = campaigns.consumed(whole, tmp_path / "a", names, ["flipped"])
    held(rows, [campaigns.REFUSED], 2)


def test_damaged_exports_are_not_loaded(whole, tmp_path):
    names = ["images/00001/00000.png", "labels-00001-of-00002.safetensors", "otdd.json"]
    held(campaigns.loaded(whole, tmp_path / "a", names), [campaigns.REFUSED], 12)


def test_outputs_that_cannot_be(whole, tmp_path):
    rows = campaigns.places(whole, tmp_path / "a")
    held(rows, [campaigns.REFUSED])
    assert {row.to for row in rows} == set(STAGES)


def test_read_only_output(whole, tmp_path):
    rows = campaigns.read_only(whole, tmp_path / "a", real=False, stages=("fit", "sample"))
    held(rows, [campaigns.FULL], 2)


def test_second_process_and_stale_locks(whole, tmp_path):
    stages = ("fit", "encode", "evaluate")
    rows = campaigns.second_runs(whole, tmp_path / "a", stages)
    held(rows, [campaigns.REFUSED, campaigns.HEALED], 15)
