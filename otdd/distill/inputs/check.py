"""One verdict on a listing whose images were looked at: all that is wrong, or what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from otdd.distill.inputs.listing import Listing
from otdd.distill.inputs.problems import DataError, warn
from otdd.distill.words import counted

SKIP = "; mend or remove these, or leave out images that cannot be read with --skip-bad-images"

Skipped = tuple[tuple[str, str], ...]  # images that were left out, and why


def check(
    listing: Listing,
    bad: Sequence[Mapping[int, str]],
    problems: Sequence[str] = (),
    *,
    skip: bool = False,
    ipc: int | None = None,
    split: tuple[float, int] = (0.2, 0),
) -> tuple[Listing, Skipped]:
    """What is left of a listing without bad images.

    Args:
        listing: what the input names.
        bad: of each of its parts, the images that cannot be read, with the reason.
        problems: what else is wrong with the images.
        skip: go on without the bad images.
        ipc: images per class that will be asked for.
        split: `val_fraction` and `seed` of the test part, if the input has none.

    Returns:
        The listing without the bad images, and what was left out.

    Raises:
        DataError: naming everything that is wrong.
    """
    left = listing.without(bad)
    parts = list(zip(listing.parts, bad, strict=True))
    wrong = [*listing.problems, *(left if skip else listing).class_problems()]
    if not skip:
        wrong += [f"{part.images.name(k)}: {why}" for part, out in parts for k, why in out.items()]
    wrong += problems
    if wrong:
        hint = SKIP if any(bad) and not skip else ""
        wrong += _short(left, ipc, split)
        raise DataError(f"{listing.where} cannot be used{hint}:", wrong)
    skipped = tuple((part.images.key(k), why) for part, out in parts for k, why in out.items())
    for note in listing.notes:
        warn(listing.where, note)
    if skipped:
        verb = "is" if len(skipped) == 1 else "are"
        count = counted(len(skipped), "image")
        reasons = [f"{key}: {why}" for key, why in skipped]
        warn(listing.where, f"{count} that cannot be read {verb} left out", reasons)
    return left, skipped


def _short(listing: Listing, ipc: int | None, split: tuple[float, int]) -> list[str]:
    """Classes with fewer images to train than will be asked for."""
    if ipc is None:
        return []
    number, chosen = listing.divide(*split)[0]
    labels = listing.parts[number].labels[chosen]
    counts = torch.bincount(labels, minlength=len(listing.classes)).tolist()
    return [
        f"class {name!r}: {n} readable training images, fewer than ipc={ipc}"
        for name, n in zip(listing.classes, counts, strict=False)
        if n < ipc
    ]
