"""A student killed after any epoch ends with the bytes of one that was left in peace."""

import math
import warnings

import pytest
import torch
from distill.finished_run import DATA, settings
from torch import nn

from otdd.distill import evaluate, students
from otdd.distill import relabel as stage
from otdd.distill.augment import Augmentation
from otdd.distill.checkpoints import Checkpoint
from otdd.distill.config import TrainConfig
from otdd.distill.logs import read_log
from otdd.distill.match import make_loss, reproducible, train_student
from otdd.distill.store import Store
from otdd.distill.training import Step, Training

EPOCHS, PER_EPOCH = 4, 2


class Killed(BaseException):
    """Stands for the end of the process."""


def network():
    """Batch statistics, and random numbers of its own."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 10))


def steps(first, soft):
    for epoch in range(first, EPOCHS):
        for step in range(PER_EPOCH):
            batch = Augmentation(shift=0.1, cutmix=0.5).draw(
                20, 10, (8, 8), seed=0, epoch=epoch, step=step
            )
            logits = torch.linspace(-3, 3, 100).reshape(10, 10).roll(epoch + step, 0)
            yield Step(batch, logits if soft else None)


def trained(checkpoint, loss, config, kill_after=None):
    """Weights, results and log of a student, which dies after an epoch."""

    def begin():
        objective = make_loss(loss, config)
        return Training(network(), objective, config, EPOCHS * PER_EPOCH, PER_EPOCH, seed=3)

    torch.manual_seed(torch.seed())  # what came before is another matter in every process
    with reproducible((1, 8, 8)):
        training = checkpoint.restored(begin)

        def after_epoch():
            checkpoint.keep(training)
            if training.epochs == kill_after:
                raise Killed

        part = DATA.train
        images, labels = part.images[:20], part.labels[:20]
        drawn = steps(training.epochs, loss != "ce")
        outcome = train_student(
            training, images, labels, drawn, test=DATA.test, after_epoch=after_epoch
        )
    rows = [row[:-1] for row in training.rows]  # seconds are what they are
    return training.student.state_dict(), outcome, training.columns, rows


def checkpoint(folder, every=1, **about):
    return Checkpoint(Store(folder), "checkpoints/s.safetensors", about, every)


KINDS = {
    "otm": ("otm", {}),
    "no average": ("kl", {"ema": 0.0}),
    "sgd": ("ce", {"optimizer": "sgd", "stretch": 2.0, "test_every": 1}),
    "bf16": ("mse", {"precision": "bf16", "schedule": "steps"}),
}


def same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    assert one[1:3] == other[1:3]
    torch.testing.assert_close(
        torch.tensor(one[3]), torch.tensor(other[3]), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_after_a_kill(tmp_path, kind):
    loss, changed = KINDS[kind]
    config = TrainConfig(lr=5e-3, **changed)
    whole = trained(checkpoint(tmp_path / "whole", 9), loss, config)
    for after in range(1, EPOCHS):
        kept = checkpoint(tmp_path / f"killed-{after}")
        with pytest.raises(Killed):
            trained(kept, loss, config, kill_after=after)
        same(trained(kept, loss, config), whole)
    again = checkpoint(tmp_path / "again", every=2)  # killed twice, the second time between two
    for after in (2, 3):
        with pytest.raises(Killed):
            trained(again, loss, config, kill_after=after)
    same(trained(again, loss, config), whole)


def cut(file, data):
    file.write_bytes(data[: len(data) // 2])


def flip(file, data):
    file.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])


def empty(file, data):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_checkpoint_is_named_and_the_student_starts_again(tmp_path, damage):
    config = TrainConfig()
    whole = trained(checkpoint(tmp_path / "whole"), "kl", config)
    kept = checkpoint(tmp_path / "killed")
    with pytest.raises(Killed):
        trained(kept, "kl", config, kill_after=2)
    file = tmp_path / "killed" / kept.name
    damage(file, file.read_bytes())
    with pytest.warns(UserWarning, match=f"{file} is damaged .* this student starts again"):
        same(trained(kept, "kl", config), whole)


def test_a_checkpoint_of_another_student_is_not_taken(tmp_path):
    with pytest.raises(Killed):
        trained(checkpoint(tmp_path, seed=1), "kl", TrainConfig(), kill_after=2)
    with pytest.warns(UserWarning, match=r"it is of .*'seed': 1"):
        trained(checkpoint(tmp_path, seed=2), "kl", TrainConfig())


def test_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    from otdd.distill import checkpoints

    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    kept = checkpoint(tmp_path, every=None)
    config = TrainConfig(ema=0.0)
    training = Training(network(), make_loss("ce", config), config, 8, 2)
    images, labels = DATA.train.images[:20], DATA.train.labels[:20]
    for number, step in enumerate(steps(0, False), start=1):
        training.step(images, labels, step)
        if number % 2 == 0:
            training.end_epoch()
            now[0] += 40
            assert kept.keep(training) == (number == 4), number  # 80 s; the last is never kept
    kept.remove()
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    config = settings(
        out, sets=["random"], train={"epochs": 4, "batch": 8, "checkpoint_every": 1, "losses": "kl"}
    )
    store = Store.open(out, {})
    first = torch.cat([(DATA.train.labels == k).nonzero()[:2, 0] for k in range(10)])
    store.write_images("random", DATA.train.images[first], DATA.train.labels[first])
    stage.relabel(store, DATA, stage.make_teachers(store, DATA, config), config, "random")
    return store, config


def test_a_run_goes_on_from_the_checkpoint_of_a_student(labelled, monkeypatch):
    store, config = labelled
    (student,) = evaluate.all_students(config)
    evaluate.train(store, DATA, config, "random")
    files = [store.path / student.file(kind, "random") for kind in ("results", "logs")]
    whole, log = files[0].read_bytes(), read_log(store, student.file("logs", "random"))
    kept = store.path / student.file("checkpoints", "random")
    files[0].unlink()
    made, seen = students.make_network, []
    monkeypatch.setattr(students, "make_network", lambda *a: seen.append(a) or made(*a))

    def killed(text, done, total):
        if done == 10:  # the first batch of the fourth epoch is done
            raise Killed

    with pytest.raises(Killed):
        evaluate.train(store, DATA, config, "random", progress=killed)
    assert kept.is_file()
    assert store.read_sealed(student.file("checkpoints", "random"))[1]["steps"] == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.train(store, DATA, config, "random")
    assert files[0].read_bytes() == whole
    again = read_log(store, student.file("logs", "random"))
    for rows in (log, again):
        del rows["seconds"]
    assert repr(again) == repr(log)
    evaluate.tidy(store, config, "random")
    assert not store.has("checkpoints")


def test_logs_have_a_row_per_epoch(labelled):
    store, config = labelled
    (student,) = evaluate.all_students(config)
    evaluate.train(store, DATA, config, "random")
    name = student.file("logs", "random")
    assert name == "logs/random/convnet/soft-kl-0.csv"
    log = read_log(store, name)
    assert list(log) == [
        *("epoch", "lr", "loss", "kl", "train_accuracy", "test_accuracy", "seconds")
    ]
    assert log["epoch"] == [1, 2, 3, 4]
    assert log["lr"][0] == 1e-3 > log["lr"][1] > log["lr"][3] > 0
    assert log["loss"] == log["kl"]
    assert all(0 <= value <= 100 for value in log["train_accuracy"])
    assert not math.isnan(log["test_accuracy"][-1])
    result = store.read_json(student.file("results", "random"))
    assert log["test_accuracy"][-1] == pytest.approx(result["accuracy"], rel=1e-5)
