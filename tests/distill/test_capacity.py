"""How many images fit: found by trial, within the budget, and kept for the folder."""

import types

import pytest
import torch
from distill.finished_run import settings as run_settings

from otdd.distill import capacity
from otdd.distill.config import ConfigError, SampleConfig
from otdd.distill.pipeline import Run

MIB = 1 << 20
EACH, FIXED = 8 * MIB, 4 * MIB


class Hungry:
    """A denoiser of known appetite: 4 MiB, and 8 MiB an image; three times that with gradients."""

    def __init__(self):
        self.calls = []

    def predict(self, z, t, labels, scale):
        self.calls.append(len(z))
        grown = 3 if z.requires_grad else 1
        taken = torch.ones(FIXED + EACH * len(z) * grown, dtype=torch.uint8)
        return z * taken[0], None


def generator(denoiser=None):
    return types.SimpleNamespace(
        device=torch.device("cpu"), latent_shape=(1, 2, 2), denoiser=denoiser or Hungry()
    )


def settings(mib: float | None) -> SampleConfig:
    return SampleConfig(batch_images="auto", memory=mib and mib / 1024)


@pytest.fixture
def exact(monkeypatch):
    """Peaks as they would be without a process around the tensors."""

    def taken(generator, count, scale, *, grad):
        generator.denoiser.calls.append(count)
        return FIXED + EACH * count * (3 if grad else 1)

    monkeypatch.setattr(capacity, "trial_bytes", taken)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fit", [1, 2, 3, 7, 20])
def test_what_is_found_fits_and_one_more_does_not(fit, grad, exact):
    each = EACH * (3 if grad else 1) / MIB
    budget = 4 + each * (fit + 0.5)
    assert capacity.find_batch(generator(), settings(budget), 1000, grad=grad) == fit


@pytest.mark.parametrize("grad", [False, True])
def test_the_peak_of_a_trial_is_measured(grad):
    taken = capacity.trial_bytes(generator(), 16, 1.0, grad=grad)
    known = FIXED + EACH * 16 * (3 if grad else 1)
    assert 0.8 * known < taken < 1.2 * known


def test_no_more_than_there_are_and_no_trial_above_the_budget(exact):
    hungry = Hungry()
    assert capacity.find_batch(generator(hungry), settings(2000), 5, grad=False) == 5
    assert hungry.calls == [1, 2, 4, 5]
    hungry = Hungry()
    capacity.find_batch(generator(hungry), settings(100), 1000, grad=False)
    assert max(hungry.calls) * EACH <= 100 * MIB


def test_a_long_trial_is_the_last(monkeypatch, exact):
    monkeypatch.setattr(capacity, "LONG", 0.0)
    hungry = Hungry()
    found = capacity.find_batch(generator(hungry), settings(100), 1000, grad=False)
    assert hungry.calls == [1]
    assert 1 <= found <= 100 / 8


def test_one_image_that_does_not_fit_is_said_before_any_work(exact):
    with pytest.raises(ConfigError, match=r"sample.memory: one image takes .* that are given"):
        capacity.find_batch(generator(), settings(6), 4, grad=False)


def test_free_memory_is_the_default_budget(monkeypatch, exact):
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 60 * MIB)
    assert capacity.find_batch(generator(), settings(None), 100, grad=False) == 5  # of 48 MiB
    monkeypatch.undo()
    assert 16 * MIB < capacity.free_bytes(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_images": 0}, "batch_images: 0"),
        ({"batch_images": "many"}, "batch_images: 'many'"),
        ({"batch_images": "auto", "memory": 0.0}, "memory: 0.0"),
        ({"batch_images": 8, "memory": 1.0}, "memory: 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SampleConfig(**changes)


def test_precision_and_compilation_of_the_denoiser(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))

    def made(name, **changes):
        sample = {"steps": 2, "starts": 1, "guidance_scale": 1.0, **changes}
        run = Run.open(run_settings(tmp_path / name, ipc=1, sets=["otg"], sample=sample))
        with run.store:
            run.sample()
            return run, run.store.read_images("otg")["latents"]

    _, plain = made("float32")
    assert not compiled
    run, same = made("compiled", compile=True)
    assert compiled == [run.generator.transformer]
    assert torch.equal(same, plain)
    run, half = made("bfloat16", precision="bfloat16")
    assert {p.dtype for p in run.generator.transformer.parameters()} == {torch.bfloat16}
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 0.2
