"""Surrogates: checkpoints over a training that resumes exactly, and what is refused."""

import dataclasses
import functools
import json

import pytest
import torch
from distill import tiny

from otdd import cli
from otdd.distill import update
from otdd.distill.config import ConfigError, InfluenceConfig, RunConfig, SampleConfig
from otdd.distill.data import load_data
from otdd.distill.store import Store, StoreError
from otdd.distill.surrogate import (
    SurrogateConfig,
    fit_surrogate,
    load_surrogates,
    surrogate_digest,
)
from otdd.distill.workers import Workers

TINY = SurrogateConfig(arch="convnet", checkpoints=2, epochs=4, batch=8)


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("surrogate") / "s"
    fit_surrogate(tiny.images(), TINY, made)
    return made


def test_checkpoints_over_the_training(folder):
    about = json.loads((folder / "surrogate.json").read_text())
    assert [c["epoch"] for c in about["checkpoints"]] == [2, 4]
    first, last = load_surrogates(folder, tiny.images())
    assert not torch.equal(first.body.head.weight, last.body.head.weight)
    assert not any(p.requires_grad for p in last.parameters())
    assert SurrogateConfig(epochs=10).marks() == [3, 5, 8, 10]
    assert SurrogateConfig(epochs=4).marks() == [1, 2, 3, 4]


def test_training_that_diverges_leaves_no_surrogate(tmp_path):
    with pytest.raises(
        ConfigError, match=r"lr: 1e\+30 makes the training diverge: the loss is nan"
    ):
        fit_surrogate(tiny.images(), dataclasses.replace(TINY, lr=1e30), tmp_path)
    with pytest.raises(ConfigError, match="holds no finished surrogate"):
        load_surrogates(tmp_path, tiny.images())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupted_training_ends_with_the_same_bytes(tmp_path, folder, at):
    def stop(_, epoch, __):
        if epoch == at:
            raise Stop

    with pytest.raises(Stop):
        fit_surrogate(tiny.images(), TINY, tmp_path, progress=stop)
    with pytest.raises(ConfigError, match="holds no finished surrogate; run `otdd fit-surrogate`"):
        load_surrogates(tmp_path, tiny.images())
    seen = []
    fit_surrogate(tiny.images(), TINY, tmp_path, progress=lambda _, epoch, __: seen.append(epoch))
    assert seen == list(range(at, 5))
    assert surrogate_digest(tmp_path) == surrogate_digest(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in folder.iterdir())
    fit_surrogate(tiny.images(), TINY, tmp_path, progress=lambda *_: pytest.fail("it was finished"))


def test_other_settings_and_other_data_are_refused(folder):
    with pytest.raises(StoreError, match="another run"):
        fit_surrogate(tiny.images(), dataclasses.replace(TINY, lr=1e-2), folder)
    with pytest.raises(ConfigError, match="was trained on 3 classes"):
        load_surrogates(folder, tiny.images((6,) * 4))
    with pytest.raises(ConfigError, match="checkpoints: 5 is not accepted; expected 1 to the"):
        SurrogateConfig(epochs=4, checkpoints=5)


def test_command(tmp_path, capsys):
    command = f"fit-surrogate --data digits --out {tmp_path} --epochs 2 --checkpoints 1 --quiet"
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--arch", "convnet"])
    assert not end.value.code
    assert "test accuracy" in capsys.readouterr().out
    assert len(load_surrogates(tmp_path, load_data("digits"))) == 1


def test_a_run_trains_the_surrogate_that_it_needs(tmp_path, monkeypatch):
    small = functools.partial(dataclasses.replace, TINY)
    monkeypatch.setattr(update, "SurrogateConfig", small)

    def folder(seen=None, **influence):
        sampling = SampleConfig(influence=InfluenceConfig(**influence))
        config = RunConfig(data="toy", ipc=1, out="x", seed=3, sample=sampling)
        show = None if seen is None else lambda *told: seen.append(told)
        return update.surrogate_for(
            Store(tmp_path), tiny.images(), config, torch.device("cpu"), Workers(), show
        )

    assert folder() is None
    assert folder(strength=1.0, surrogate="given") == "given"
    assert not list(tmp_path.iterdir())
    seen = []
    made = folder(seen, strength=1.0)
    assert seen[-1] == ("surrogate", TINY.epochs, TINY.epochs)
    assert len(load_surrogates(made, tiny.images())) == TINY.checkpoints
    about = json.loads((tmp_path / "surrogate" / "otdd.json").read_text())
    assert about["identity"]["surrogate"]["seed"] == 3
    again = []
    assert folder(again, strength=1.0) == made
    assert not again  # it was finished
