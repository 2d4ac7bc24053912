"""Training protocols: their values, what wins over what, and what the settings do."""

import math

import pytest
import torch
from torch import nn

from otdd import cli
from otdd.distill.config import PROTOCOLS, ConfigError, TrainConfig
from otdd.distill.match import make_loss
from otdd.distill.relabel import Plan
from otdd.distill.settings import protocol, resolve
from otdd.distill.training import Training, factor, learning_rate

BASE = {"data": "digits", "ipc": 10, "out": "x"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_a_set_of_settings(name):
    for ipc in (1, 10, 50, 300):
        config = resolve({**BASE, "ipc": ipc, "train": {"protocol": name}})
        assert config.train.protocol == name
        assert config.relabel.cutmix == 1.0


def test_a_number_of_images_counts_however_it_is_written():
    for ipc in (50, "50", "+50", " 50", "5_0"):  # as flags take it
        assert protocol("rded", ipc)["train"]["batch"] == 200
    for ipc in ("many", "²", None, [50], 50.0, float("inf")):  # refused with the other settings
        assert protocol("rded", ipc)["train"]["batch"] == 20


def test_values_of_the_protocols():
    edc = resolve({**BASE, "train": {"protocol": "edc"}}).train
    assert (edc.losses, edc.kappa_1, edc.kappa_2) == (("mse",), 0.025, 1.0)
    assert (edc.epochs, edc.lr, edc.weight_decay, edc.stretch, edc.ema) == (
        300,
        1e-3,
        0.01,
        2,
        0.99,
    )
    assert [edc.batch_for(classes) for classes in (10, 11, 1000)] == [50, 100, 100]
    rates = [learning_rate(edc, name) for name in ("resnet18", "mobilenetv2_100")]
    rates += [learning_rate(edc, n) for n in ("efficientnet_b0", "swin_tiny_patch4_window7_224")]
    assert rates == [1e-3, 2.5e-3, 2e-3, 1e-4]
    for ipc, few, many in ((1, 10, 20), (10, 50, 100), (50, 100, 200)):
        rded = resolve({**BASE, "ipc": ipc, "train": {"protocol": "rded"}}).train
        assert (rded.losses, rded.tau, rded.ema, rded.stretch) == (("kl",), 20.0, 0.0, 2.0)
        assert (rded.batch_for(10), rded.batch_for(1000)) == (few, many)
    for ipc, epochs in ((1, 3000), (2, 2000), (10, 2000), (50, 1500), (200, 1000), (300, 1000)):
        igd = resolve({**BASE, "ipc": ipc, "train": {"protocol": "igd-hard"}}).train
        assert (igd.losses, igd.schedule, igd.batch, igd.epochs) == (("ce",), "steps", 64, epochs)


def test_flags_over_file_over_protocol_over_preset(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("preset: paper\ntrain: {protocol: rded, epochs: 7, lr: 0.5}\n")
    train = resolve({**BASE, "train": {"lr": 0.25}}, file=file).train
    assert (train.tau, train.ema) == (20.0, 0.0)  # the preset has an average of its own
    assert (train.epochs, train.lr) == (7, 0.25)
    other = resolve({**BASE, "train": {"protocol": "edc", "epochs": 3}}, file=file).train
    assert (other.losses, other.epochs) == (("mse",), 3)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"protocol": "best"}, "train.protocol: 'best' .* one of edc, rded, igd-hard"),
        ({"arch_lr": ["swin"]}, "train.arch_lr: 'swin' .* PATTERN=RATE with a rate > 0"),
        ({"arch_lr": ["swin*=-1"]}, r"train.arch_lr: 'swin\*=-1'"),
        ({"batch_few": 1}, "train.batch_few: 1 .* an integer >= 2"),
        ({"checkpoint_every": 0}, "train.checkpoint_every: 0 .* an integer >= 1"),
        ({"test_every": 0}, "train.test_every: 0 .* an integer >= 1"),
        ({"precision": "fp16"}, "train.precision: 'fp16' .* one of fp32, bf16"),
        ({"losses": ["mse"], "kappa_1": 0, "kappa_2": 0}, "kappa_1, kappa_2: .* the loss mse"),
    ],
)
def test_refusals(train, message):
    with pytest.raises(ConfigError, match=message):
        resolve({**BASE, "train": train})


def test_protocol_as_a_flag(capsys, tmp_path):
    flags = ["run", "--data", "digits", "--ipc", "1", "--out", str(tmp_path / "o"), "--dry-run"]
    flags += ["--sets", "random", "--train.protocol", "igd-hard", "--seeds", "2"]
    for more, steps in (([], 3000), (["--train.epochs", "9"], 9)):
        with pytest.raises(SystemExit) as end:
            cli.main([*flags, *more])
        said = capsys.readouterr().out
        assert end.value.code == 0
        assert f"train    2 students (1 set, convnet; ce; 2 seeds) of {steps} steps" in said
    with pytest.raises(SystemExit) as end:
        cli.main([*flags, "--train.protocol", "none"])
    assert end.value.code == 2
    assert "train.protocol: 'none' is not accepted; expected one of" in capsys.readouterr().err


def test_schedules():
    steps = TrainConfig(schedule="steps")
    assert [factor(steps, n, 12) for n in (0, 7, 8, 9, 10, 11)] == pytest.approx(
        [1, 1, 0.2, 0.2, 0.04, 0.04]
    )
    slow = TrainConfig(stretch=2.0)
    assert factor(slow, 0, 10) == 1
    assert factor(slow, 10, 10) == pytest.approx(0.5)
    assert factor(TrainConfig(), 5, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


def test_batches_of_a_protocol_follow_the_classes():
    from otdd.distill.data import ImageData, LabeledImages

    for classes, batch in ((10, 50), (20, 100)):
        part = LabeledImages(
            torch.zeros(classes, 1, 8, 8, dtype=torch.uint8), torch.arange(classes)
        )
        data = ImageData("toy", [str(k) for k in range(classes)], part, part)
        config = resolve({**BASE, "train": {"protocol": "edc"}})
        assert Plan.of(config, data, 10 * classes).batch == batch


def test_half_precision_is_of_the_products_alone():
    seen = []

    class Net(nn.Linear):
        def forward(self, x):
            made = super().forward(x.flatten(1))
            seen.append(made.dtype)
            return made

    def loss(logits, mixed, base, teacher):
        seen.append(logits.dtype)
        return make_loss("ce", TrainConfig())(logits, mixed, base, teacher)

    from otdd.distill.augment import Augmentation
    from otdd.distill.training import Step

    batch = Augmentation().draw(4, 4, (8, 8), seed=0, epoch=0, step=0)
    images, labels = torch.zeros(4, 1, 8, 8), torch.arange(4)
    for precision, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        seen.clear()
        training = Training(Net(64, 4), loss, TrainConfig(precision=precision), 1)
        training.step(images, labels, Step(batch))
        assert seen == [kind, torch.float32]
        assert training.student.weight.dtype == torch.float32
