"""Are two sets different? Intervals and paired tests over the seeds of students.

Students of one seed start from the same weights, so sets are compared seed by seed. The set named
first is compared with every other one, and the p-values of all these comparisons are corrected
together (Holm, 1979). With few seeds a test finds large differences only; and as the images of a
set are the same for every seed, nothing here tells how another sampling of it would do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

LEVEL = 0.95
DIGITS = 4  # of an accuracy in percent: one of 10,000 test images is 0.01
SAME = 2.1 * 10**-DIGITS  # how far apart rounding can put equal differences: 4 halves of a digit
WILCOXON = 6  # seeds from which the signed-rank test can reach p < 0.05 at all: 2 / 2^6


def interval(values: Sequence[float], level: float = LEVEL) -> list[float] | None:
    """Confidence interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.5 + level / 2, len(values) - 1)) * error
    return [round(mean - half, 2), round(mean + half, 2)]


def comparisons(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first set of a table against every other, for each architecture and loss.

    Args:
        rows: of the table, with `set`, `arch`, `loss`, `seeds` and `runs` (accuracies by seed).

    Returns:
        Dicts of `set`, `against`, `arch`, `loss`, `seeds` (how many both have), `difference` (of
        the means over these, in points), `ci95` of it, `p` (paired t test, two-sided), `p_holm`
        (that, corrected for all comparisons) and `p_wilcoxon` (signed-rank test, from 6 seeds on);
        None, and a `note`, where there is nothing to tell.
    """
    if not rows:
        return []
    first = rows[0]["set"]
    key = {(row["set"], row["arch"], row["loss"]): row for row in rows}
    made = []
    for row in rows:
        own = key.get((first, row["arch"], row["loss"]))
        if row["set"] == first or own is None:
            continue
        about = {"set": first, "against": row["set"], "arch": row["arch"], "loss": row["loss"]}
        made.append({**about, **paired(_by_seed(own), _by_seed(row))})
    for one, p in zip(made, holm([one["p"] for one in made]), strict=True):
        one["p_holm"] = p
    return made


def paired(one: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    """Compares accuracies seed by seed, those that both have; as in `comparisons`."""
    seeds = sorted(one.keys() & other.keys())
    apart = [one[seed] - other[seed] for seed in seeds]
    made: dict[str, Any] = {
        "seeds": len(seeds),
        "difference": round(statistics.fmean(apart), 2) if apart else None,
        "ci95": interval(apart),
        "p": None,
        "p_holm": None,
        "p_wilcoxon": None,
    }
    if len(seeds) < 2:
        common = "1 seed" if seeds else "no seeds"
        return {**made, "note": f"{common} in common: a test needs 2"}
    if max(apart) - min(apart) < SAME:
        note = "the same difference for every seed: no interval, no test"
        return {**made, "ci95": None, "note": note}
    from scipy.stats import ttest_1samp, wilcoxon

    made["p"] = _rounded(ttest_1samp(apart, 0.0).pvalue)
    if len(seeds) >= WILCOXON:
        made["p_wilcoxon"] = _rounded(wilcoxon(apart).pvalue)
    return made


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of p-values; None stays None and counts for nothing."""
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    made: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        made[i] = _rounded(least)
    return made


def _rounded(p: float) -> float:
    return float(f"{p:.4g}")


def _by_seed(row: dict[str, Any]) -> dict[int, float]:
    return dict(zip(row["seeds"], row["runs"], strict=True))
