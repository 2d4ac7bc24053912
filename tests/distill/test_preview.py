"""--dry-run: the plan agrees with what a run then writes, and nothing is written before."""

import json
import re
import shutil

import pytest
from distill.finished_run import finished_run, settings
from PIL import Image

from otdd import cli
from otdd.distill import costs
from otdd.distill.pipeline import STAGES
from otdd.distill.prepare import prepare
from otdd.distill.preview import denoising_steps, disk_bytes, label_bytes, preview
from otdd.distill.relabel import SHARD_BYTES


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Only as many steps are timed as a time takes."""
    monkeypatch.setattr(costs, "BUDGET", 0.0)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_plan_agrees_with_the_run(tmp_path):
    out = tmp_path / "run"
    config = settings(out)
    made = prepare(config)
    before = "\n".join(preview(config, STAGES))
    assert f"out      {out}: new folder" in before
    assert "sample   random: 20 images, from the real ones" in before
    assert "2 sets by 1 teacher (convnet), 3 epochs of 3 batches of 8" in before
    assert "train    4 students" in before
    assert "of 9 steps" in before
    assert not out.exists()
    finished_run(out, SHARD_BYTES)
    labels = (out / "sets/random/labels/00000.safetensors").stat().st_size
    assert 0 < labels - label_bytes(config, made) < 1024  # the header
    kept = [p for name in ("sets", "teachers") for p in (out / name).rglob("*") if p.is_file()]
    written = sum(p.stat().st_size for p in kept)
    assert 0.9 < disk_bytes(config, made, STAGES) / written < 1.1
    after = "\n".join(preview(config, STAGES))
    assert "sample   random: finished" in after
    assert "2 of 2 shards finished" in after


def test_denoising_steps_are_those_of_the_progress(tmp_path):
    sample = {"steps": 2, "starts": 3, "batch_classes": 4}
    relabel = {"teacher_epochs": 1}
    config = settings(tmp_path / "run", sets=["otg", "unguided"], sample=sample, relabel=relabel)
    made = prepare(config)
    from otdd.distill.pipeline import Run

    seen = {}
    run = Run.open(config, lambda text, done, total: seen.setdefault(text, total))
    with run.store:
        run.sample()
    for name in config.sets:
        assert seen[f"sample {name}"] == denoising_steps(config, made, name)


def test_teachers_that_compare_starts_come_before_sampling(tmp_path):
    told, written = {}, {}
    for judge in ("auto", "latents"):
        sample = {"steps": 6, "judge": judge}
        config = settings(tmp_path / "run", sets=["otg"], sample=sample, train={"losses": ["kl"]})
        said = preview(config, STAGES[:2])
        named = "sample   teachers: convnet, who compare 4 starts of otg"
        assert (named in said) == (judge == "auto")
        written[judge] = disk_bytes(config, prepare(config), ("sample",))
        lines = [x for x in said if x.startswith("time ")]
        told[judge] = [line.removeprefix("time     ").split(":")[0] for line in lines[:-1]]
    assert written["auto"] > 10 * written["latents"]  # a teacher is larger than two images
    labels = "relabel labels of convnet"
    assert told["auto"] == ["sample teachers convnet", "sample otg", labels]
    assert told["latents"] == ["sample otg", "relabel teachers convnet", labels]


def test_a_surrogate_that_the_run_trains_is_told(tmp_path):
    sample = {"influence": {"strength": 0.1}}
    config = settings(tmp_path / "run", sets=["otg"], sample=sample)
    lines = preview(config, ("sample",))
    assert any("surrogate: a convnet-6 trained for 40 epochs" in line for line in lines)
    plain = settings(tmp_path / "run", sets=["otg"])
    assert not any("surrogate:" in line for line in preview(plain, ("sample",)))
    made = prepare(config)
    assert disk_bytes(config, made, ("sample",)) > disk_bytes(plain, made, ("sample",))


def test_command_names_every_bad_file_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(4):
            Image.new("L", (8, 8), n).save(tmp_path / "data" / name / f"{n}.png")
    flags = ["run", "--data", "data", "--ipc", 1, "--out", "o", "--sets", "random", "--dry-run"]
    code, out, _ = call(capsys, *flags)
    assert code == 0
    assert "data     data: 2 classes, 6 training and 2 test images of 1x8x8" in out
    assert out.endswith("nothing was written (--dry-run)\n")
    whole = (tmp_path / "data/a/0.png").read_bytes()
    (tmp_path / "data/a/0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data/b/3.png").write_text("no image")
    code, _, err = call(capsys, *flags)
    assert code == 2
    assert "a/0.png" in err
    assert "b/3.png" in err
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_finished_folder_is_previewed_by_its_own_settings(tmp_path, capsys):
    out = tmp_path / "run"
    finished_run(out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    code, said, _ = call(capsys, "train", "--out", out, "--seeds", "7", "--dry-run")
    assert code == 0
    assert "train    28 students" in said
    assert "sample" not in said
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert json.loads((out / "config.json").read_text())["seeds"] == 1


def test_nothing_is_asked_of_teachers_whose_labels_are_all_there(tmp_path):
    config = finished_run(tmp_path / "run", SHARD_BYTES)
    shutil.rmtree(tmp_path / "run" / "teachers")
    assert not [line for line in preview(config, STAGES) if line.startswith("time ")]


def test_costs_are_measured_and_go_with_what_is_done(tmp_path):
    config = settings(tmp_path / "run", sets=["unguided"], sample={"steps": 6})
    lines = preview(config, STAGES)
    told = [line.removeprefix("time     ") for line in lines if line.startswith("time")]
    assert [line.split(":")[0] for line in told[:-1]] == [
        "sample unguided",
        "relabel teachers convnet",
        "relabel labels of convnet",
        *(f"train convnet, {loss}" for loss in config.train.losses),
    ]
    assert all("one step timed at" in line for line in told[:-1])
    assert told[-1].endswith("in all, on this machine as busy as it is now")
    (memory,) = [line for line in lines if line.startswith("memory")]
    size, unit = memory.split()[2:4]
    assert float(size) * {"MiB": 1, "GiB": 1024}[unit] > 50
    assert not (tmp_path / "run").exists()


def test_the_first_interval_is_not_timed(monkeypatch):
    now = iter([0.0, 10.0, 11.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(now))
    watch = costs.Watch(budget=12.0)
    while not watch.enough:
        watch.tick()
    assert watch.step == 1.0
    assert str(costs.Cost(180, watch.step)) == "about 3 min (one step timed at 1 s)"


@pytest.mark.parametrize("command", ["fit", "fit-surrogate", "encode"])
def test_tools_tell_what_they_take_and_write_nothing(tmp_path, capsys, command):
    out = tmp_path / "out"
    code, told, err = call(capsys, command, "--data", "digits", "--out", out, "--dry-run")
    assert code == 0, err
    assert "one step timed at" in told
    assert re.search(r"about [\d.]+ [MG]iB at the peak of the timed steps", told)
    assert not out.exists()


def test_fit_refuses_an_out_of_another_training(tmp_path, capsys):
    def fit(*more):
        return call(capsys, "fit", "--data", "digits", "--grid-every", 0, "--batch", 2, *more)

    out, other = tmp_path / "g.safetensors", ("--steps", 9, "--dry-run")
    assert fit("--out", out, "--steps", 2)[0] == 0
    assert fit("--out", out, "--steps", 2, "--dry-run")[0] == 0
    code, told, err = fit("--out", out, *other)
    assert (code, told) == (2, "")
    assert "g.safetensors is of another training (steps: 2 there, 9 here); choose another" in err
    (tmp_path / "g.safetensors.checkpoint").write_bytes(b"")  # left by a kill: goes with the rest
    assert fit("--out", out, "--steps", 2, "--dry-run")[0] == 0
    out.rename(tmp_path / "h.safetensors.checkpoint")  # and one that is not a checkpoint
    code, _, err = fit("--out", tmp_path / "h.safetensors", *other)
    assert code == 2
    assert "h.safetensors.checkpoint" in err


@pytest.mark.parametrize("command", ["fit", "fit-surrogate", "encode", "sample"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_out_below_a_file_is_refused_before_any_work(tmp_path, capsys, command, dry):
    (tmp_path / "file").write_bytes(b"mine")
    more = ["--ipc", 1] * (command == "sample")
    out = tmp_path / "file" / "below" / "out"
    code, told, err = call(capsys, command, "--data", "digits", *more, "--out", out, *dry)
    assert (code, told) == (2, "")
    assert err.endswith(f"{tmp_path / 'file'} is a file; --out needs a folder\n")
    assert (tmp_path / "file").read_bytes() == b"mine"
