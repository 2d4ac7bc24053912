"""`--log json`: what happens in a run as one JSON object a line, for schedulers and dashboards.

Every line has `time` (UTC, ISO 8601), `level` (info, warning or error), `event`, and `rank` where
several processes share the work. The events and their keys:

- `start`: `command`, `version`; `end`: `command`, `exit_code`, `seconds`
- `stage_start`: `stage`; `stage_end`: `stage`, `seconds`
- `progress`: `task`, `done`, `total`, `rate` (a second; null at first) and `eta_s` (seconds; null),
  and for some tasks a `note`, such as the loss
- `task_done`: `task`, `total`, `seconds`
- `metrics`: `out`, `accuracy`, `ot_cost`, `timings`, as in `metrics.json`
- `warning`: `message`, `category`; of data also `where` it is, and the `items` that are meant, such
  as images with the reason why each is left out
- `error`: `message`, `exit_code`
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

from otdd.distill.inputs.problems import DataWarning


def write(event: str, level: str = "info", **values: Any) -> None:
    """Write one event to standard error."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line: dict[str, Any] = {"time": now, "level": level, "event": event}
    rank = os.environ.get("RANK", "")
    if rank.isdecimal():
        line["rank"] = int(rank)
    sys.stderr.write(json.dumps(line | values) + "\n")
    sys.stderr.flush()


def warned(message: Warning | str, category: type[Warning]) -> None:
    """Write a warning; of one about data, its parts are keys of their own."""
    kind = category.__name__
    if isinstance(message, DataWarning):
        about = {"where": message.where, "items": message.items}
        write("warning", "warning", message=message.note, category=kind, **about)
    else:
        write("warning", "warning", message=str(message), category=kind)


class JsonLog:
    """Progress as events, at most one every `interval` seconds for each task.

    Call it as progress(text, done, total).
    """

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._since: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, text: str, done: int, total: int, note: str = "") -> None:
        """Tell that `done` of `total` steps are finished."""
        now = time.perf_counter()
        first = text not in self._since
        start, before = self._since.setdefault(text, (now, done))
        if done >= total:
            self._since.pop(text)
            self._last.pop(text, None)
            write("task_done", task=text, total=total, seconds=round(now - start, 3))
        elif first or now - self._last[text] >= self._interval:
            self._last[text] = now
            moved = done > before and now > start
            rate = (done - before) / (now - start) if moved else None
            eta = None if rate is None else round((total - done) / rate, 1)
            rate = None if rate is None else round(rate, 4)
            values: dict[str, Any] = {"done": done, "total": total, "rate": rate, "eta_s": eta}
            write("progress", task=text, **values, **({"note": note} if note else {}))
