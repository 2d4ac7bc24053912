"""The command: flags, exit codes, one-line errors, quick help, stages on their own."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from otdd import cli

TINY = [
    *("--data", "digits", "--ipc", "1", "--seeds", "1", "--sets", "random", "kmeans"),
    *("--relabel.teacher-epochs", "1", "--train.epochs", "2"),
]


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_help_is_quick_and_imports_no_torch():
    code = "import sys\nfrom otdd import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'rich', 'tyro'} & set(sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 2  # alone it takes a tenth of a second
    for command in (
        "run",
        "sample",
        "relabel",
        "train",
        "evaluate",
        "fit",
        "fit-surrogate",
        "encode",
        "report",
        "export",
        "push",
        "env",
    ):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", ["run", "sample", "evaluate", "fit", "fit-surrogate", "encode"])
def test_help_of_a_command(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert "--data" in out
    assert "(default:" in out


def test_help_of_run_imports_no_torch():
    code = "import sys\nfrom otdd import cli\ntry: cli.main(['run', '--help'])\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: otdd COMMAND"),
        (["distil"], "unknown command 'distil'; known: run"),
        (["run"], "missing: --data, --ipc, --out"),
        (["run", "--ipc", "1", "--out", "x"], "missing: --data"),
        (["run", *TINY, "--out", "x", "--ipc", "0"], "--ipc: 0 is not accepted; expected"),
        (["run", *TINY, "--out", "x", "--seeds", "two"], "--seeds: 'two' .* an integer"),
        (["run", *TINY, "--out", "x", "--train.lr", "fast"], "--train.lr: 'fast' .* a number"),
        (
            ["run", *TINY, "--out", "x", "--sample.guidance.strength", "-1"],
            "--sample.guidance.strength: -1.0 is not accepted; expected a number >= 0",
        ),
        (
            ["run", *TINY, "--out", "x", "--sample.order", "no"],
            "--sample.order: 'no' .* one of joint",
        ),
        (["run", *TINY, "--out", "x", "--sampel.steps", "3"], "--sampel.steps"),
        (["run", *TINY, "--out", "x", "--preset", "best"], "preset: 'best' .* one of paper"),
        (["run", *TINY, "--out", "x", "--config", "none.yaml"], "cannot read none.yaml"),
        (["run", *TINY, "--out", "x", "--data", "nowhere"], "'nowhere' is no folder"),
        (["run", *TINY, "--out", "x", "--ipc", "1000"], "0: 132 training images"),
        (["run", *TINY, "--out", "x", "--train.archs", "net"], "unknown architecture 'net'"),
        (["run", *TINY, "--out", "x", "--relabel.teachers", "convnet=f"], "no file f"),
        (["run", *TINY, "--out", "x", "--generator", "g", "--sets", "otg"], "generator g cannot"),
        pytest.param(
            ["run", *TINY, "--out", "x", "--sample.device", "cuda"],
            "sample.device: 'cuda' is not accepted for process 0 .* torch sees 0 GPUs",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        pytest.param(
            ["encode", "--data", "digits", "--out", "x", "--device", "cuda"],
            "--device: 'cuda' is not accepted for process 0 .* torch sees 0 GPUs",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["export"], "missing: --dir, --to, --out"),
        (["export", "none", "--to", "hf", "--out", "x"], "none: no such folder"),
        (["export", "none", "--to", "csv", "--out", "x"], "--to: 'csv' is not accepted; .* hf"),
        (["report"], "missing: --dir"),
        (["report", "none"], "none: no such folder"),
        (["report", "none", "--classes", "0"], "classes: 0 is not accepted; expected"),
        (["push", "none"], "missing: --repo-id"),
        (["push", "none", "me/set"], "none: no such folder"),
        (["env", "--jsno"], "unknown flag --jsno"),
        (["fit", "--data", "digits", "--out", "x", "--steps", "0"], "--steps: 0 is not accepted"),
        (["encode", "--data", "digits", "--out", "x", "--shard", "0"], "--shard: 0 is not accept"),
        (["encode", "--data", "nowhere", "--out", "x"], "'nowhere' is no folder"),
        (["encode", "--data", "textures", "--out", "x"], "no generator is shipped"),
        (["evaluate", "--out", "none"], "--out: there is no run in none"),
        (["fit-surrogate", "--data", "digits", "--out", "x", "--arch", "net"], "unknown .* 'net'"),
        (
            [
                *("run", *TINY, "--out", "x", "--sets", "otg", "--preset", "paper"),
                *("--sample.influence.surrogate", "none"),
            ],
            "none holds no finished surrogate; run `otdd fit-surrogate`",
        ),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(
    capsys, tmp_path, monkeypatch, arguments, message
):
    import re

    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert re.search(message, err or out), err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_stages_one_by_one_then_run_finds_all_done(capsys, tmp_path):
    out = tmp_path / "o"
    code, _, err = call(capsys, "evaluate", *TINY, "--out", out)
    assert (code, err) == (2, f"otdd: {out} holds no images yet; run `otdd sample` first\n")
    assert call(capsys, "sample", *TINY, "--out", out)[0] == 0
    code, _, err = call(capsys, "train", "--out", out)
    assert code == 2
    assert "no soft labels yet; run `otdd relabel` first" in err
    for stage in ("relabel", "train", "evaluate"):
        assert call(capsys, stage, "--out", out)[0] == 0
    first = json.loads((out / "metrics.json").read_text())
    results = {p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.json")}
    code, printed, _ = call(capsys, "run", *TINY, "--out", out)
    assert code == 0
    assert results == {p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.json")}
    assert json.loads((out / "metrics.json").read_text())["accuracy"] == first["accuracy"]
    assert "mean ± std of 1 student" in printed
    assert "kmeans" in printed
    assert f"written to {out}" in printed


def test_files_of_a_run(capsys, tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("train: {losses: [ce], epochs: 2}\nsets: [random]\nseeds: 2\n")
    out = tmp_path / "o"
    base = ["run", "--data", "digits", "--ipc", "1", "--out", out]
    assert call(capsys, *base, "--config", file)[0] == 0
    metrics = json.loads((out / "metrics.json").read_text())
    (row,) = metrics["accuracy"]
    assert (row["set"], row["labels"], row["loss"], len(row["runs"])) == ("random", "hard", "ce", 2)
    about = {"accuracy", "comparisons", "dd_ranking", "ot_cost", "geometry", "teachers"}
    assert set(metrics) == {*about, "timings", "versions", "config"}
    assert metrics["ot_cost"].keys() == {"random"}
    assert metrics["config"]["train"]["epochs"] == 2
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")
    pictures = list((out / "sets/random/images").rglob("*.png"))
    assert len(pictures) == 10

    code, _, err = call(capsys, *base, "--config", file, "--train.epochs", "3")
    assert code == 2
    assert "another run (train.epochs: 2 there, 3 here); choose another --out" in err
    more = ["--seeds", "3", "--sets", "random", "kmeans"]
    assert call(capsys, *base, "--config", file, *more)[0] == 0
    rows = json.loads((out / "metrics.json").read_text())["accuracy"]
    assert [(r["set"], len(r["runs"])) for r in rows] == [("random", 3), ("kmeans", 3)]


def test_foreign_folder_is_refused(capsys, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    code, _, err = call(capsys, "run", *TINY, "--out", tmp_path)
    assert code == 2
    assert "not empty and no otdd output (it holds 'letter.txt')" in err


def test_failures_are_one_line_and_debug_shows_where(capsys, monkeypatch):
    def broken(_):
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(cli, "_env", broken)
    code, _, err = call(capsys, "env")
    assert (code, err) == (
        1,
        "otdd: failed: ZeroDivisionError: by hand (--debug shows where)\n",
    )
    assert "Traceback" in call(capsys, "env", "--debug")[2]


def test_interrupt_says_that_the_same_command_continues(tmp_path):
    out = tmp_path / "o"
    command = [sys.executable, "-m", "otdd", "run", *TINY, "--out", out, "--train.epochs", "3000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "sets").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command continues" in err
    assert "Traceback" not in err


def test_env(capsys):
    code, out, _ = call(capsys, "env", "--json")
    assert code == 0
    assert "backends" in json.loads(out)
    assert call(capsys, "--version")[1].startswith("otdd 0.")
