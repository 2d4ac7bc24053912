"""Remarks about the data, and other warnings, as the command line tells them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from otdd import joblog
from otdd.distill.config import printable
from otdd.distill.inputs.problems import DataWarning


@contextlib.contextmanager
def noted(as_json: bool, out: str | None) -> Iterator[None]:
    """Remarks about the data as lines of otdd, each once; other warnings as they are.

    Args:
        as_json: all of them as events.
        out: the output, which may list what a remark is about.
    """
    show, known = warnings.showwarning, set[str]()
    first = os.environ.get("RANK", "0") == "0"  # of several processes one is heard

    def told(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if isinstance(message, DataWarning):
            if str(message) in known:
                return
            known.add(str(message))
        if as_json:
            joblog.warned(message, category)
        elif not isinstance(message, DataWarning):
            show(message, category, *where, **more)
        elif first:
            sys.stderr.write(f"otdd: {_remark(message, out)}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        warnings.showwarning = told
        yield


def _remark(warning: DataWarning, out: str | None) -> str:
    """A remark about the data; without its list where an earlier command has left that."""
    file = Path(out or "") / "data.json"
    if not (warning.items and out and file.is_file()):
        return str(warning)
    try:
        skipped = json.loads(file.read_text(encoding="utf-8"))["skipped"]
        listed = [f"{entry['image']}: {entry['problem']}" for entry in skipped]
    except (OSError, ValueError, KeyError, TypeError):  # the command itself says what is wrong
        return str(warning)
    known = list(map(printable, listed)) == warning.items
    return f"{warning.where}: {warning.note} (listed in {file})" if known else str(warning)
