"""DD-Ranking's scores (Li et al., arXiv 2505.13300): what of an accuracy is due to the images?

With accuracies as fractions, syn the set, rdm random real images, real all real images:

    HLR = acc(real, hard) - acc(syn, hard)              hard-label recovery; less is better
    IOR = acc(syn, any) - acc(rdm, any)                 improvement over random, any labels
    alpha = w IOR - (1 - w) HLR
    LRS = (e^alpha - e^-1) / (e - e^-1)                 label-robust score
    beta = g (acc(syn, aug) - acc(rdm, aug)) + (1 - g) (acc(syn, plain) - acc(rdm, plain))
    ARS = (e^beta - e^-1) / (e - e^-1)                  augmentation-robust score

with w = g = 1/2, as in the introduction of its documentation; means over seeds. Ours, and other
than DD-Ranking's own program: students, augmentation and learning rate are those of the run, not
the best of a search; accuracies are those of the last step; acc(real, hard) is that of the teacher
of the same architecture trained here; ARS is of hard labels (`ce` and `ce-plain`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WEIGHT = 0.5


def scores(
    rows: Sequence[Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """LRS and ARS of every set but `random`, for each architecture and loss.

    Args:
        rows: of the table, accuracies in percent.
        teachers: dicts of `name` and `accuracy` in percent; names of architectures are of teachers
            that were trained here on all real images.

    Returns:
        Dicts of `set`, `arch`, `loss` (the labels that "any" stands for), `hlr`, `ior`, `lrs` and,
        with the loss `ce`, `ars`; None where a row is missing, and `missing` says which.
    """
    mean = {(row["set"], row["arch"], row["loss"]): row["mean"] / 100 for row in rows}
    real: dict[str, float] = {}
    for arch in {row["arch"] for row in rows}:
        found = [t["accuracy"] / 100 for t in teachers if t["name"] == arch]
        if found:
            real[arch] = statistics.fmean(found)
    return [_score(mean, real, *key) for key in mean if key[0] != "random" and key[2] != "ce-plain"]


def normalised(value: float) -> float:
    """(e^x - e^-1) / (e - e^-1): from -1 ... 1 to 0 ... 1."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _score(
    mean: Mapping[tuple[str, str, str], float],
    real: Mapping[str, float],
    name: str,
    arch: str,
    loss: str,
) -> dict[str, Any]:
    made: dict[str, Any] = {"set": name, "arch": arch, "loss": loss}
    made |= {"hlr": None, "ior": None, "lrs": None, "ars": None}
    needed = [(name, arch, "ce"), ("random", arch, loss)]
    if loss == "ce":
        needed += [(name, arch, "ce-plain"), ("random", arch, "ce-plain")]
    made["missing"] = [", ".join(key) for key in needed if key not in mean]
    if arch not in real:
        made["missing"].append(f"a teacher {arch} trained here (relabel.teachers)")
    if (name, arch, "ce") in mean and arch in real:
        made["hlr"] = round(real[arch] - mean[name, arch, "ce"], 4)
    made["ior"] = _gain(mean, name, arch, loss)
    if made["ior"] is not None and made["hlr"] is not None:
        alpha = WEIGHT * made["ior"] - (1 - WEIGHT) * made["hlr"]
        made["lrs"] = round(normalised(alpha), 4)
    plain = _gain(mean, name, arch, "ce-plain")
    if loss == "ce" and made["ior"] is not None and plain is not None:
        made["ars"] = round(normalised(WEIGHT * made["ior"] + (1 - WEIGHT) * plain), 4)
    return made


def _gain(
    mean: Mapping[tuple[str, str, str], float], name: str, arch: str, loss: str
) -> float | None:
    """Improvement over random real images."""
    own, other = (mean.get((owner, arch, loss)) for owner in (name, "random"))
    return None if own is None or other is None else round(own - other, 4)
