"""`--log json`: what happens in a run as one JSON object a line, for schedulers and dashboards.

Every line has `time` (UTC, ISO 8601), `level` (info, warning or error), `event`, and `rank` where
several processes share the work. The events and their keys:

- `start`: `command`, `version`; `end`: `command`, `exit_code`, `seconds`
- `stage_start`: `stage`; `stage_end`: `stage`, `seconds`
- `progress`: `task`, `done`, `total`, `rate` (a second; null at first) and `eta_s` (seconds; null),
  and for some tasks a `note`, such as the loss
- `task_done`: `task`, `total`, `seconds`
- `metrics`: `out`, `accuracy`, `ot_cost`, `timings`, as in `metrics.json`
- `warning`: `message`; `error`: `message`, `exit_code`
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from datetime import UTC, datetime
from typing import Any, TextIO


def write(event: str, level: str = "info", **values: Any) -> None:
    """Write one event to standard error."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line: dict[str, Any] = {"time": now, "level": level, "event": event}
    if "RANK" in os.environ:
        line["rank"] = int(os.environ["RANK"])
    sys.stderr.write(json.dumps(line | values) + "\n")
    sys.stderr.flush()


class JsonLog:
    """Progress as events, at most one every `interval` seconds for each task, and warnings.

    Call it as progress(text, done, total), within a `with` block.
    """

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._since: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> JsonLog:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.showwarning = _warning
        return self

    def __exit__(self, *_: object) -> None:
        self._catch.__exit__(None, None, None)

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


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    write("warning", "warning", message=f"{category.__name__}: {message}")
