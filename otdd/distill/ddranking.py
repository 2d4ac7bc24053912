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
        Dicts of `set`, `arch`, `loss` (the labels that "any" stands for), `hlr`, `ior`, `lrs` and
        `ars` (with the loss `ce`; it is of hard labels). What cannot be computed is None, and
        `missing` says in a sentence what it needs and how to make that; None where all is there.
    """
    mean = {(row["set"], row["arch"], row["loss"]): row["mean"] / 100 for row in rows}
    real: dict[str, float] = {}
    for arch in {row["arch"] for row in rows}:
        found = [t["accuracy"] / 100 for t in teachers if t["name"] == arch]
        if found:
            real[arch] = statistics.fmean(found)
    made = [_score(mean, real, *key) for key in mean if key[0] != "random" and key[2] != "ce-plain"]
    return [score | {"missing": _missing(score, mean, real, bool(teachers))} for score in made]


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


def _missing(
    score: Mapping[str, Any],
    mean: Mapping[tuple[str, str, str], float],
    real: Mapping[str, float],
    taught: bool,
) -> str | None:
    """What the scores that are None need, and how to make it; None where all are there."""
    name, arch, loss = (score[key] for key in ("set", "arch", "loss"))
    asked = ("hlr", "ior", "lrs", "ars") if loss == "ce" else ("hlr", "ior", "lrs")
    lacking = [key for key in asked if score[key] is None]
    if not lacking:
        return None
    rows = [(name, "ce"), ("random", loss)]
    if loss == "ce":
        rows += [(name, "ce-plain"), ("random", "ce-plain")]
    rows = [(owner, used) for owner, used in rows if (owner, arch, used) not in mean]
    needs, sets = [], dict.fromkeys(owner for owner, _ in rows)
    losses = dict.fromkeys(used for _, used in rows)
    if rows:
        students = " and ".join(f"on {owner} with {used}" for owner, used in rows)
        needs.append(f"students {arch} {students}")
    if arch not in real:
        needs.append(f"a teacher {arch} trained here")
        losses |= {} if taught else {"kl": None}  # teachers are trained for soft labels alone
    words = [("sets", sets), ("train.losses", losses)]
    if taught and arch not in real:
        words.append(("relabel.teachers", {arch: None}))
    flags = ", ".join(f"{' '.join(new)} among --{flag}" for flag, new in words if new)
    # Teachers are what the labels of a folder depend on.
    where = "a new folder" if taught and arch not in real else "this folder"
    return (
        f"{', '.join(lacking)} cannot be computed without {' and '.join(needs)}: give otdd run "
        f"{where} and {flags}"
    )


def _gain(
    mean: Mapping[tuple[str, str, str], float], name: str, arch: str, loss: str
) -> float | None:
    """Improvement over random real images."""
    own, other = (mean.get((owner, arch, loss)) for owner in (name, "random"))
    return None if own is None or other is None else round(own - other, 4)
