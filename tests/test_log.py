"""`--log`: events as JSON lines, and bars in a terminal of any width."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
import warnings
from datetime import datetime

import pytest

from otdd import cli, joblog
from otdd.distill.compare import comparisons
from otdd.distill.inputs.problems import warn
from otdd.joblog import JsonLog
from otdd.terminal import print_metrics

DRAW = """
from otdd.terminal import shown
with shown("auto", False) as progress:
    for n in range(6):
        progress("sample a set of a long name", n * 1000, 5000)
        __import__("time").sleep(0.12)
"""


def events(err):
    lines = [json.loads(line) for line in err.splitlines()]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        assert line["level"] in ("info", "warning", "error")
    return lines


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_a_run_as_events(capsys, tmp_path):
    flags = ["--data", "digits", "--ipc", 1, "--seeds", 1, "--sets", "random", "--out"]
    flags += [tmp_path / "run", "--train.losses", "ce", "--train.epochs", 12, "--log", "json"]
    code, out, err = call(capsys, "run", *flags)
    assert code == 0
    assert "OT cost" in out  # the table stays on standard output
    seen = events(err)
    names = [line["event"] for line in seen]
    assert names[0] == "start"
    assert names[-1] == "end"
    assert seen[-1]["exit_code"] == 0
    stages = [line["stage"] for line in seen if line["event"] == "stage_start"]
    assert stages == ["sample", "relabel", "train", "evaluate"]
    assert stages == [line["stage"] for line in seen if line["event"] == "stage_end"]
    moved = [line for line in seen if line["event"] == "progress"]
    assert all(set(line) >= {"task", "done", "total", "rate", "eta_s"} for line in moved)
    assert "train random" in [line["task"] for line in seen if line["event"] == "task_done"]
    stored = json.loads((tmp_path / "run/metrics.json").read_text())
    (metrics,) = [line for line in seen if line["event"] == "metrics"]
    assert metrics["accuracy"] == stored["accuracy"]
    assert metrics["ot_cost"] == stored["ot_cost"]


def test_errors_are_events_with_their_exit_code(capsys):
    code, _, err = call(capsys, "run", "--data", "nowhere", "--ipc", 1, "--out", "x", "--log=json")
    assert code == 2
    start, *_, error, end = events(err)
    assert start["command"] == "run"
    assert (error["event"], error["level"], error["exit_code"]) == ("error", "error", 2)
    assert "'nowhere' is no folder" in error["message"]
    assert end["exit_code"] == 2


@pytest.mark.parametrize(("rank", "told"), [("3", 3), ("", None), ("x", None)])
def test_events_tell_the_process_if_it_has_a_number(capsys, monkeypatch, rank, told):
    monkeypatch.setenv("RANK", rank)
    joblog.write("start")
    assert json.loads(capsys.readouterr().err).get("rank") == told


def test_the_environment_chooses_where_no_flag_does(capsys, monkeypatch):
    bad = ["run", "--data", "nowhere", "--ipc", 1, "--out", "x"]
    monkeypatch.setenv("OTDD_LOG", "json")
    start, *_, error, end = events(call(capsys, *bad)[2])
    assert (start["event"], error["event"], end["event"]) == ("start", "error", "end")
    assert call(capsys, *bad, "--log", "lines")[2].startswith("otdd: ")
    assert call(capsys, "env")[0] == 0  # which has no such flag
    monkeypatch.setenv("OTDD_LOG", "yaml")
    code, _, err = call(capsys, *bad)
    assert code == 2
    assert "--log: 'yaml' is not accepted; expected one of auto, bars, lines, json, quiet" in err


def test_progress_is_rare_and_knows_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("otdd.joblog.time.perf_counter", lambda: now[0])
    with JsonLog(interval=5) as log:
        for n in range(11):
            log("fit", n, 10)
            now[0] += 2
    seen = events(capsys.readouterr().err)
    assert [line.get("done") for line in seen] == [0, 3, 6, 9, None]
    assert (seen[0]["rate"], seen[0]["eta_s"]) == (None, None)
    assert (seen[1]["rate"], seen[1]["eta_s"]) == (0.5, 14.0)
    assert (seen[4]["event"], seen[4]["seconds"]) == ("task_done", 20.0)


def test_warnings_are_events_with_their_parts(capsys, monkeypatch):
    def warning(_):
        warnings.warn("low memory", stacklevel=1)
        for _ in range(2):  # a remark about data is made once
            warn("data folder photos", "1 image is left out", ["cat/1.png: unreadable image"])
        return 0

    monkeypatch.setattr(cli, "_env", warning)
    code, _, err = call(capsys, "env", "--log", "json")
    assert code == 0
    _, memory, data, end = events(err)
    about = {"level": "warning", "event": "warning"}
    assert memory | about | {"message": "low memory", "category": "UserWarning"} == memory
    about |= {"message": "1 image is left out", "category": "DataWarning"}
    about |= {"where": "data folder photos", "items": ["cat/1.png: unreadable image"]}
    assert data | about == data
    assert end["exit_code"] == 0


def drawn(columns, **environment):
    """What a program draws on a terminal of so many columns, and its lines without colours."""
    code = [sys.executable, "-c", DRAW]
    child, terminal = pty.fork()
    if child == 0:
        for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
        os.execve(sys.executable, code, os.environ | {"TERM": "xterm-256color"} | environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    raw = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        raw += part
    assert os.waitpid(child, 0)[1] == 0
    text = raw.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return text, [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_table_of_a_run_names_its_data_and_fits_any_encoding(monkeypatch):
    row = {"set": "otg", "arch": "convnet", "loss": "ce", "mean": 91.5, "std": 0.6, "runs": [1, 2]}
    config = {"data": "/home/someone/photos", "ipc": 1}
    metrics = {"accuracy": [row], "ot_cost": {"otg": 11.25}, "comparisons": [], "config": config}
    for encoding, spread in (("utf-8", "±"), ("ascii", "+-")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
        print_metrics(metrics, "runs/a")
        sys.stdout.flush()
        title, *lines = raw.getvalue().decode(encoding).splitlines()
        about = f"test accuracy of convnet in %, mean {spread} std of 2 students"
        assert title == f"photos, 1 image per class: {about}"
        assert any(f"91.5 {spread} 0.6" in line for line in lines)
        assert len({len(line) for line in lines[:-1]}) == 1
        assert lines[-1] == "written to runs/a"


def test_a_difference_without_an_interval_is_shown(capsys):
    about = {"arch": "convnet", "loss": "ce", "seeds": [0, 1], "mean": 1.0, "std": 0.0}
    rows = [
        {**about, "set": "otg", "runs": [57.1429, 71.4286]},
        {**about, "set": "random", "runs": [42.8571, 57.1429]},
    ]
    metrics = {"accuracy": rows, "ot_cost": {}, "comparisons": comparisons(rows)}
    print_metrics({**metrics, "config": {"data": "photos", "ipc": 1}}, "runs/a")
    shown = capsys.readouterr().out
    assert "+14.3" in shown
    assert "the same difference for every seed: no interval, no test" in shown
    assert "to compare sets takes two seeds" not in shown


def test_bars_fit_into_terminals():
    for columns, bar in ((40, False), (100, True)):
        text, lines = drawn(columns)
        assert "\x1b[3" in text  # colours
        assert max(map(len, lines)) <= columns
        shown = [line for line in lines if "/5000" in line]
        assert shown, lines
        assert all(line.startswith("sample a set") for line in shown)
        assert any("━" in line for line in shown) == bar
        assert any(line.startswith("done") for line in lines)


def test_terminals_without_colours_or_cursor():
    text, lines = drawn(80, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)
    assert any("/5000" in line for line in lines)
    text, lines = drawn(80, TERM="dumb")
    assert "\x1b" not in text
    assert [line.split("  ")[:2] for line in lines] == [["done", "sample a set of a long name"]]
