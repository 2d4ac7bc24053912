"""The command: flags, exit codes, one-line errors, quick help, stages on their own."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from otdd import cli
from otdd.helptext import EXIT_CODES

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
    code += "assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
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


UNITS = """images image classes steps step epochs students seed seeds pixels degrees GiB fraction
fractions factor probability share weight rate temperature decay blocks iterations latents networks
centres logits bytes features patches shape samplings""".split()


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_a_command(capsys, command):
    """Every flag is explained, with a default, and numbers with their unit."""
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert call(capsys, "help", command)[1] == out
    if command == "env":
        return
    assert out.startswith(f"usage: otdd {command} ")
    flags = out.partition("\nflags\n")[2].partition("\nexit codes\n")[0]
    assert "\n  --debug\n" in flags
    for entry in re.split(r"\n  (?=--)", "\n" + flags)[1:]:
        name, *text = entry.split("\n      ")
        said = " ".join(text).partition("\n")[0]
        assert "(default: " in said or "(required)" in said or "by default" in said.lower(), entry
        number = re.search(r"\b(INT|NUMBER)\b", name)
        units = set(re.findall(r"\w+", said.lower())) & set(map(str.lower, UNITS))
        assert units or not number, entry
        assert "_" not in name.split()[0]
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("columns", [40, 120])
def test_help_fits_into_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ([], ["run"], ["fit"]):
        out = call(capsys, *command, "--help")[1]
        assert max(map(len, out.splitlines())) <= columns
        assert "  130  " in out


def test_no_help_imports_torch():
    code = "import sys\nfrom otdd import cli\nfor command in sys.argv[1:]:\n"
    code += (
        "  try: cli.main([command, '--help'])\n  except SystemExit as end: assert not end.code\n"
    )
    code += "  heavy = {'torch', 'numpy', 'rich'} & set(sys.modules)\n  assert not heavy, command"
    done = subprocess.run(
        [sys.executable, "-c", code, *cli.COMMANDS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_help_shows_what_a_preset_and_a_file_set(capsys, tmp_path):
    (tmp_path / "f.json").write_text('{"seeds": 7, "relabel": {"store_labels": false}}')
    flags = ["--preset", "paper", "--config", tmp_path / "f.json"]
    out = call(capsys, "run", *flags, "--help")[1]
    assert re.search(r"--seeds INT\n.*\(default: 7\)", out)
    assert re.search(r"--sample.steps INT\n.*\(default: 50\)", out)
    assert re.search(r"  --relabel.store-labels\n", out)  # is off


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: otdd COMMAND"),
        (["distil"], "unknown command 'distil'; known: run"),
        (["run"], "missing: --data, --ipc, --out"),
        (["run", "--ipc", "1", "--out", "x"], "missing: --data"),
        (["run", "digits"], "'digits' follows no flag"),
        (["-v"], "unknown flag -v; flags follow a command"),
        (["run", *TINY, "--out"], "--out: no value is given; expected"),
        (
            ["run", *TINY, "--out", "x", "--sample.guidance.window", "1"],
            "1 is given; expected 2 val",
        ),
        (
            ["run", *TINY, "--out", "x", "--quiet=3"],
            "--quiet: '3' .* expected no value",
        ),
        (["run", *TINY, "--out", "x", "--train.lr", "inf"], "--train.lr: inf .* a finite number"),
        (
            ["run", *TINY, "--out", "x", "--sample.batch_images", "x"],
            "an integer or auto",
        ),
        (["run", *TINY, "--out", "x", "--train.batch-few", "1"], "--train.batch-few: 1 is not acc"),
        (["run", *TINY, "--out", "x", "--epochs", "1"], "did you mean --train.epochs"),
        (["train"], "missing: --out"),
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
        (["run", *TINY, "--out", "x", "--relabel.teachers", "convnet=f"], "no file 'f' for"),
        (["run", *TINY, "--out", "x", "--relabel.teachers", "convnet="], "no file '' for convnet"),
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
        (["report", ""], "dir: '' is not accepted; expected the name of a file or a folder"),
        (["report", "none", "--out="], "out: '' is not accepted; expected the name of"),
        (["export", "none", "--to", "hf", "--out", ""], "out: '' is not accepted"),
        (["run", *TINY, "--out", "x", "--generator", ""], "--generator: '' is not accepted"),
        (["report", "none", "--classes", "0"], "classes: 0 is not accepted; expected"),
        (["push", "none"], "missing: --repo-id"),
        (["push", "none", "me/set"], "none: no such folder"),
        (["env", "--jsno"], "unknown flag --jsno"),
        (["fit", "--data", "digits", "--out", "x", "--steps", "0"], "--steps: 0 is not accepted"),
        (
            ["fit", "--data", "digits", "--out", "x", "--tune", "all"],
            "expected 'lora', the default",
        ),
        (
            ["fit", "--data", "digits", "--out", "x", "--from", "dit", "--width", "64"],
            "width: 64 is not accepted; expected 0, the default, with --from",
        ),
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
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert re.search(message, err or out), err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("fast", "unknown OTDD_BACKEND='fast'; choose from"),
        ("cuda", "cost_matrix: OTDD_BACKEND='cuda' cannot be used"),
    ],
)
def test_a_backend_that_a_run_cannot_use_is_refused(
    capsys, tmp_path, monkeypatch, backend, message
):
    """It was found out when the first transport was solved, after teachers or students."""
    monkeypatch.setenv("OTDD_BACKEND", backend)
    code, _, err = call(capsys, "run", *TINY, "--out", tmp_path / "o")
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "sample", "train"])
def test_an_output_in_a_file_is_a_text(capsys, tmp_path, command):
    (tmp_path / "f.yaml").write_text("{data: digits, ipc: 1, out: [5]}")
    code, _, err = call(capsys, command, "--config", tmp_path / "f.yaml")
    assert (code, err) == (2, "otdd: out: [5] is not accepted; expected a text\n")


def test_relabel_says_where_no_loss_asks_for_labels(capsys, tmp_path):
    out = tmp_path / "o"
    hard = ("--train.losses", "ce")
    assert call(capsys, "sample", *TINY, *hard, "--out", out)[0] == 0
    code, told, _ = call(capsys, "relabel", "--out", out)
    assert (code, told[:18]) == (0, "nothing to relabel")
    assert "--train.losses kl" in told
    assert call(capsys, "relabel", "--out", out, "--train.losses", "kl")[:2] == (
        0,
        f"written to {out}\n",
    )
    assert list(out.glob("sets/*/labels/*"))


def test_stages_one_by_one_then_run_finds_all_done(capsys, tmp_path):
    out = tmp_path / "o"
    code, _, err = call(capsys, "evaluate", *TINY, "--out", out)
    assert (code, err) == (2, f"otdd: {out} holds no images yet; run `otdd sample` first\n")
    assert call(capsys, "sample", *TINY, "--out", out)[:2] == (0, f"written to {out}\n")
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
    if shutil.which("sha256sum"):  # the same is in Python's hands in test_store
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def test_a_finished_generator_is_not_told_as_trained(capsys, tmp_path):
    small = ("--steps", "1", "--width", "32", "--layers", "1", "--batch", "4")
    command = ("fit", "--data", "digits", "--out", tmp_path / "g.safetensors", *small)
    assert "weights trained in 0.0 min" in call(capsys, *command)[1]
    code, printed, _ = call(capsys, *command)
    assert code == 0
    assert printed.startswith(f"{tmp_path / 'g.safetensors'} is finished already: loss ")
    assert "min" not in printed


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample: {stpes: 3}", "sample.stpes: unknown setting; did you mean sample.steps?"),
        ("sample: {steps: many}", "sample.steps: 'many' is not accepted; expected an integer"),
        ("sample: 3", "sample: 3 is not accepted; expected a group of settings"),
        ("log: json", "log: unknown setting; known: data, ipc, out"),
        ("train: {epochs: 3", "neither YAML nor JSON: line 1, column 18: expected ',' or '}'"),
        ("[train]\nepochs = 3", "neither YAML nor JSON: line 2, column 1: "),
    ],
)
def test_settings_of_a_file_are_refused_in_a_line(capsys, tmp_path, text, message):
    (tmp_path / "f.yaml").write_text(text)
    flags = [*TINY, "--out", tmp_path / "o", "--config", tmp_path / "f.yaml"]
    code, _, err = call(capsys, "run", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "o").exists()


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


def test_a_folder_in_use_and_one_that_cannot_be_written(capsys, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "o").mkdir()
    with open(tmp_path / "o" / ".otdd.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = call(capsys, "run", *TINY, "--out", tmp_path / "o")
    assert (code, err.count("\n")) == (3, 1)
    assert "in use by another otdd process" in err

    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    command = [sys.executable, "-m", "otdd", "run", *TINY, "--out", tmp_path / "full"]
    done = subprocess.run(command, preexec_fn=no_large_files, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr


@pytest.mark.parametrize("flags", [["run", "--help"], ["--help"], ["env"]])
def test_a_reader_that_goes_away_is_no_error_to_talk_about(flags):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "otdd", *flags]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_exit_codes_are_documented():
    readme = (Path(cli.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \|", readme, re.MULTILINE)
    assert [int(code) for code in listed] == list(EXIT_CODES)


def test_env(capsys):
    code, out, _ = call(capsys, "env", "--json")
    assert code == 0
    assert "backends" in json.loads(out)
    assert call(capsys, "--version")[1].startswith("otdd 0.")
