"""Intervals, paired tests and DD-Ranking's scores against values worked out by hand."""

import math
import random
import statistics

import pytest
from scipy import stats

from otdd.distill.compare import comparisons, holm, interval, paired
from otdd.distill.ddranking import normalised, scores

SAME = "the same difference for every seed: no interval, no test"


def row(name, runs, loss="ce", seeds=None):
    seeds = list(range(len(runs))) if seeds is None else seeds
    mean = statistics.fmean(runs)
    about = {"set": name, "arch": "convnet", "loss": loss}
    return {**about, "seeds": seeds, "runs": runs, "mean": mean}


def test_interval_covers_the_mean_as_often_as_it_says():
    assert interval([1.0]) is None
    assert interval([70.0, 72.0]) == [58.29, 83.71]  # 71 -+ 12.706 * 1
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        low, high = interval([rng.gauss(5, 2) for _ in range(4)])
        covered += low <= 5 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_paired_by_seed():
    one = {0: 90.0, 1: 92.0, 2: 95.0, 7: 1.0}
    other = {2: 93.0, 1: 91.0, 0: 87.0, 8: 99.0}
    made = paired(one, other)
    assert (made["seeds"], made["difference"]) == (3, 2.0)
    assert made["ci95"] == interval([3.0, 1.0, 2.0])
    assert made["p"] == pytest.approx(stats.ttest_rel([90, 92, 95], [87, 91, 93]).pvalue, rel=1e-3)
    assert made["p_wilcoxon"] is None
    five = {seed: float(seed) for seed in range(5)}
    assert paired(five, dict.fromkeys(range(5), -1.0))["p_wilcoxon"] is None
    six = {seed: float(seed) for seed in range(6)}
    assert paired(six, dict.fromkeys(range(6), -1.0))["p_wilcoxon"] == pytest.approx(
        2 / 64, rel=1e-3
    )


@pytest.mark.parametrize(
    ("one", "other", "note"),
    [
        ({0: 1.0}, {0: 2.0}, "1 seed in common: a test needs 2"),
        ({0: 1.0}, {1: 2.0}, "no seeds in common: a test needs 2"),
        ({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}, SAME),
        (
            {0: 57.1429, 1: 71.4286},
            {0: 42.8571, 1: 57.1429},
            SAME,
        ),  # of 14 images, 2 in both; rounded
    ],
)
def test_too_little_to_test_is_said(one, other, note):
    made = paired(one, other)
    assert (made["p"], made["p_wilcoxon"], made["ci95"]) == (None, None, None)
    assert made["note"] == note


def test_small_differences_of_large_tests_are_tested():
    """One of 10,000 test images is 0.01 points; these were "the same difference for every seed"."""
    one, other = [90.50, 91.21, 90.83, 91.02], [90.00, 90.70, 90.33, 90.51]
    made = paired(dict(enumerate(one)), dict(enumerate(other)))
    test = stats.ttest_rel(one, other)
    assert made["p"] == pytest.approx(test.pvalue, rel=1e-3)
    assert made["p"] < 1e-5
    assert made["ci95"] == pytest.approx(test.confidence_interval(0.95), abs=0.006)


def test_holm():
    assert holm([0.01, 0.04, 0.03, None]) == [0.03, 0.06, 0.06, None]  # as in Holm's scheme
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_the_first_set_against_every_other_one():
    rows = [
        row("otg", [90.0, 91.0]),
        row("otg", [95.0], "kl"),
        row("random", [80.0, 82.0]),
        row("random", [90.0], "kl"),
        row("kmeans", [89.0, 91.5]),
    ]
    made = comparisons(rows)
    assert [(c["against"], c["loss"]) for c in made] == [
        *(("random", "ce"), ("random", "kl"), ("kmeans", "ce"))
    ]
    assert [c["difference"] for c in made] == [9.5, 5.0, 0.25]
    assert made[0]["p_holm"] == pytest.approx(2 * made[0]["p"], rel=1e-3)
    assert made[1]["note"] == "1 seed in common: a test needs 2"
    assert comparisons([]) == comparisons(rows[:2]) == []


def test_scores_are_their_formulas():
    rows = [
        *(row("otg", [84.0]), row("otg", [90.0], "kl"), row("otg", [70.0], "ce-plain")),
        *(row("random", [70.0]), row("random", [86.0], "kl"), row("random", [50.0], "ce-plain")),
    ]
    teachers = [{"name": "convnet", "accuracy": 98.0}, {"name": "resnetap-10", "accuracy": 1.0}]
    hard, soft = scores(rows, teachers)

    def score(value):
        return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))

    assert (hard["set"], hard["loss"], hard["hlr"], hard["ior"]) == ("otg", "ce", 0.14, 0.14)
    assert hard["lrs"] == pytest.approx(score(0.0), abs=1e-4)
    assert hard["ars"] == pytest.approx(score(0.5 * 0.14 + 0.5 * 0.2), abs=1e-4)
    assert (soft["loss"], soft["ior"], soft["ars"]) == ("kl", 0.04, None)
    assert soft["lrs"] == pytest.approx(score(0.5 * 0.04 - 0.5 * 0.14), abs=1e-4)
    assert hard["missing"] is soft["missing"] is None
    assert (normalised(-1), normalised(1)) == (0.0, 1.0)


def test_what_is_missing_is_said_in_a_sentence():
    rows = [row("otg", [84.0]), row("otg", [90.0], "kl"), row("random", [70.0])]
    hard, soft = scores(rows, [{"name": "convnet=x.pt", "accuracy": 98.0}])
    assert (hard["ior"], hard["lrs"], hard["ars"], soft["ior"]) == (0.14, None, None, None)
    assert hard["missing"] == (
        "hlr, lrs, ars cannot be computed without students convnet on otg with ce-plain and on "
        "random with ce-plain and a teacher convnet trained here: give otdd run a new folder and "
        "otg random among --sets, ce-plain among --train.losses, convnet among --relabel.teachers"
    )
    soft = scores(rows, [{"name": "convnet", "accuracy": 98.0}])[1]
    assert soft["missing"] == (
        "ior, lrs cannot be computed without students convnet on random with kl: give otdd run "
        "this folder and random among --sets, kl among --train.losses"
    )
    alone = scores([row("otg", [84.0], "otm")], [])[0]
    assert "this folder and otg random among --sets, ce otm kl among --train.l" in alone["missing"]
