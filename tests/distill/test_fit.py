"""Training from scratch: ends with the same bytes however often it was stopped, and says so."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distill import tiny
from PIL import Image

from otdd.distill.config import ConfigError
from otdd.distill.fit import SCHEDULE, FitConfig, Pictures, check_out, fit
from otdd.distill.generator import Generator
from otdd.distill.store import StoreError
from otdd.distill.trainer import DiffusionLoss, Trainer

TINY = FitConfig(width=32, layers=1, steps=6, batch=8, checkpoint_every=2, grid_every=0)
DRIVER = Path(__file__).with_name("killed_fit.py")


def trainer(config: FitConfig = TINY, counts=(6, 6, 6)) -> Trainer:
    data = tiny.images(counts)
    model = tiny.transformer(len(counts), channels=1, side=8)
    latents = data.train.images.float() / 127.5 - 1
    return Trainer(
        model, latents, data.train.labels, SCHEDULE, dataclasses.replace(config, lr=1e-2)
    )


class Stop(Exception):
    pass


def stop_at(step: int):
    def progress(_: str, done: int, __: int, ___: str) -> None:
        if done == step:
            raise Stop

    return progress


@pytest.mark.parametrize("at", [1, 2, 5])
def test_interrupted_training_ends_with_the_same_bytes(tmp_path, at):
    data = tiny.images()
    fit(data, TINY, tmp_path / "whole.safetensors")
    with pytest.raises(Stop):
        fit(data, TINY, tmp_path / "cut.safetensors", progress=stop_at(at))
    steps = []
    fit(data, TINY, tmp_path / "cut.safetensors", progress=lambda _, step, *__: steps.append(step))
    assert steps[0] == at // 2 * 2  # from the last checkpoint, not from the start
    whole, cut = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.safetensors", "whole.safetensors"]


def test_a_checkpoint_that_a_kill_left_beside_the_result_goes(tmp_path):
    data, out = tiny.images(), tmp_path / "g.safetensors"
    with pytest.raises(Stop):
        fit(data, TINY, out, progress=stop_at(2))
    checkpoint = tmp_path / "g.safetensors.checkpoint"
    kept = checkpoint.read_bytes()
    fit(data, TINY, out)
    checkpoint.write_bytes(kept)
    fit(data, TINY, out)
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


def run_killed(out: Path, sign: int, at: int) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DRIVER), str(out), str(sign), str(at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_killed_while_it_writes_a_checkpoint(tmp_path):
    ended = run_killed(tmp_path / "cut.safetensors", signal.SIGKILL, 3)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "cut.safetensors.checkpoint").exists()
    assert not (tmp_path / "cut.safetensors").exists()
    for name in ("cut", "whole"):
        pictured = dataclasses.replace(TINY, grid_every=3)
        fit(tiny.images(), pictured, tmp_path / f"{name}.safetensors")
    whole = tmp_path / "whole.safetensors"
    assert (tmp_path / "cut.safetensors").read_bytes() == whole.read_bytes()
    pictures = [f"{name}.safetensors.grids/step-000003.png" for name in ("cut", "whole")]
    assert (tmp_path / pictures[0]).read_bytes() == (tmp_path / pictures[1]).read_bytes()


def test_the_first_interrupt_keeps_the_step_that_was_done(tmp_path):
    def interrupt(_: str, step: int, *__: object) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"4 of 6 steps are kept in .*cut.safetensors"):
        fit(tiny.images(), TINY, tmp_path / "cut.safetensors", progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    fit(tiny.images(), TINY, tmp_path / "cut.safetensors")
    fit(tiny.images(), TINY, tmp_path / "whole.safetensors")
    names = [tmp_path / f"{name}.safetensors" for name in ("cut", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_other_settings_are_refused_where_a_training_is(tmp_path):
    out, other = tmp_path / "g.safetensors", dataclasses.replace(TINY, lr=1e-4)
    with pytest.raises(Stop):
        fit(tiny.images(), TINY, out, progress=stop_at(3))
    for refuse in (fit, check_out):
        with pytest.raises(StoreError, match=r"checkpoint is of .*lr: 0.001 there, 0.0001"):
            refuse(tiny.images(), other, out)
    check_out(tiny.images(), TINY, out)
    made = fit(tiny.images(), TINY, out)
    with pytest.raises(StoreError, match=r"g.safetensors is of another training \(lr"):
        fit(tiny.images(), other, out)
    assert fit(tiny.images(), TINY, out, progress=stop_at(0)).info == made.info  # only read


def test_pictures_have_the_same_noise_and_change_no_weight(tmp_path):
    pictured = dataclasses.replace(TINY, grid_every=3)
    fit(tiny.images(), TINY, tmp_path / "a.safetensors")
    fit(tiny.images(), pictured, tmp_path / "b.safetensors")
    a, b = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    names = sorted(p.name for p in (tmp_path / "b.safetensors.grids").iterdir())
    assert names == ["step-000003.png", "step-000006.png"]
    made, picture = Generator.load(a), Pictures(tiny.images(), 0)
    assert picture(made, 1) == picture(made, 1)


def test_pictures_have_a_row_of_samples_for_each_guidance_scale(tmp_path):
    made = fit(tiny.images(), dataclasses.replace(TINY, lr=1e-2), tmp_path / "g.safetensors")
    shown = {}
    for scales in ((1.0,), (1.0, 1.0), (1.0, 4.0)):
        with Image.open(io.BytesIO(Pictures(tiny.images(), 0, scales)(made, 1))) as page:
            shown[scales] = np.array(page)
    one, same, two = shown.values()
    assert same.shape == one.shape  # a row of the same name
    more = len(two) - len(one)
    assert more > 0
    pixels = slice(180, None)  # right of the titles
    first = slice(0, 46 + more)  # the names of the classes and the samples without guidance
    assert (two[first, pixels] == one[first, pixels]).all()
    guided = two[first.stop : first.stop + more, pixels]
    assert (guided != two[46 : first.stop, pixels]).any()
    assert (two[first.stop + more :] == one[first.stop :]).all()


def test_the_average_is_what_is_sampled():
    made = trainer()
    for _ in range(3):
        made.train_step()
    weights = {k: p.detach().clone() for k, p in made.trained.items()}
    with made.averaged():
        inside = dict(made.model.named_parameters())
        assert all(torch.equal(inside[k], v) for k, v in made.average.items())
    assert any(not torch.equal(made.average[k], weights[k]) for k in weights)
    assert all(torch.equal(p, weights[k]) for k, p in made.trained.items())


def test_the_average_warms_up():
    made = trainer(dataclasses.replace(TINY, ema=0.9999))
    start = {k: v.clone() for k, v in made.average.items()}
    made.train_step()
    for name, kept in made.average.items():  # decay 1/11 after the first step, not 0.9999
        want = start[name] + (1 - 1 / 11) * (made.trained[name] - start[name])
        torch.testing.assert_close(kept, want.detach(), rtol=1e-5, atol=1e-6)


def test_uneven_classes_are_drawn_alike():
    made = trainer(dataclasses.replace(TINY, batch=3000, label_dropout=0.0), counts=(2, 20, 200))
    counts = torch.bincount(made._batch()[1], minlength=3)
    assert (counts - 1000).abs().max() < 150


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_the_error_of_x0(kind):
    """All predictions of one x0_hat have the same weighted loss, above the least weight."""
    loss = DiffusionLoss({**SCHEDULE, "prediction_type": kind}, min_snr=5.0)
    x0, noise = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t, wrong = torch.tensor([1, 100, 500, 900]), x0 + 0.1
    abar = loss.alpha_bar[t].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    epsilon = (noisy - abar.sqrt() * wrong) / (1 - abar).sqrt()
    output = {
        "epsilon": epsilon,
        "sample": wrong,
        "v_prediction": abar.sqrt() * epsilon - (1 - abar).sqrt() * wrong,
    }[kind]
    snr = abar / (1 - abar)
    want = (0.01 * snr.clamp(0.0 if kind == "epsilon" else 1.0, 5.0)).mean()
    got = loss(tiny.Constant(output), x0, torch.zeros(4, dtype=torch.int64), t, noise)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_learned_variances_get_the_bound_of_the_true_step(kind):
    """Against the two Gaussians of Nichol & Dhariwal, written out."""
    loss = DiffusionLoss({**SCHEDULE, "prediction_type": kind}, min_snr=0.0)
    draw = torch.Generator().manual_seed(0)
    x0, noise, error, spread = torch.randn(4, 3, 2, 2, 2, generator=draw)
    t = torch.tensor([1, 400, 990])
    abar = loss.alpha_bar.double()
    now, before = (a.view(-1, 1, 1, 1) for a in (abar[t], abar[t - 1]))
    beta = 1 - now / before
    target = noise if kind == "epsilon" else now.sqrt() * noise - (1 - now).sqrt() * x0
    predicted = target + 0.1 * error
    noisy = now.sqrt() * x0 + (1 - now).sqrt() * noise
    if kind == "epsilon":
        guess = (noisy - (1 - now).sqrt() * predicted) / now.sqrt()
    else:
        guess = now.sqrt() * noisy - (1 - now).sqrt() * predicted
    gap = before.sqrt() * beta / (1 - now) * (x0 - guess)
    tilde = beta * (1 - before) / (1 - now)
    share = (spread.double() + 1) / 2
    variance = torch.exp(share * beta.log() + (1 - share) * tilde.log())
    true, model = (
        torch.distributions.Normal(m, v.sqrt()) for m, v in ((gap, tilde), (0, variance))
    )
    bits = torch.distributions.kl_divergence(true, model) / torch.log(torch.tensor(2.0))
    want = (0.1 * error).square().mean() + bits.mean()
    output = torch.cat([predicted.float(), spread], 1)
    got = loss(tiny.Constant(output), x0, torch.zeros(3, dtype=torch.int64), t, noise)
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_no_number_stops_the_training():
    made = trainer()
    made.latents[:] = torch.nan
    with pytest.raises(ConfigError, match="the loss is nan after step 1; expected a smaller"):
        made.train_step()


def test_a_fitted_generator_is_sampled_by_every_scheduler(tmp_path):
    from otdd.distill.config import SampleConfig
    from otdd.distill.sample import Batch, run_batch
    from otdd.distill.terms import rng

    made = fit(tiny.images(), TINY, tmp_path / "g.safetensors")
    labels = torch.arange(3)
    for name in ("ddim", "ddpm", "dpm++"):
        batch = Batch(labels, labels, [rng(0, n) for n in range(3)])
        latents = run_batch(made, batch, SampleConfig(scheduler=name, steps=5))
        assert torch.isfinite(latents).all()
        assert latents.abs().max() <= 1.2, name


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"width": 33},
        {"ema": 1.0},
        {"lr": -1.0},
        {"batch": 0},
        {"min_snr": 0.5},
        {"tune": "some"},
    ],
)
def test_bad_settings(settings):
    (key,) = settings
    with pytest.raises(ConfigError, match=f"{key}:"):
        FitConfig(**settings)
