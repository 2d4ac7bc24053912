"""Hostile and random inputs: a thin version of `benchmarks/faults.py`."""

import pytest
from distill import hostile

from otdd.distill import costs


@pytest.mark.parametrize(
    ("campaign", "count"),
    [
        (hostile.bad_images, 26),
        (hostile.class_names, 21),
        (hostile.strange_folders, 2),
        (hostile.bad_yaml, 14),
        (hostile.bad_safetensors, 26),
        (hostile.bad_pickles, 6),
    ],
)
def test_hostile_inputs_are_refused(tmp_path, campaign, count):
    rows = campaign(tmp_path)
    assert [row for row in rows if row.fault] == []
    assert len(rows) == count


@pytest.mark.parametrize(
    ("campaign", "count"),
    [
        (hostile.fuzzed_settings, 30),
        (hostile.fuzzed_flags, 30),
        (hostile.fuzzed_images, 60),
    ],
)
def test_random_inputs_end_with_one_line(tmp_path, campaign, count, monkeypatch):
    monkeypatch.setattr(costs, "BUDGET", 0.0)
    rows = campaign(tmp_path, count)
    assert [row for row in rows if row.fault] == []
    assert len({row.outcome for row in rows}) >= 1
    assert len(rows) >= count // 2  # hypothesis may see that it has tried everything
