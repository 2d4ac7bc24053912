"""Training of students: losses, determinism, averaging."""

import threading

import pytest
import torch
from distill.finished_run import settings
from distill.surroundings import SURROUNDINGS

from otdd.distill import pipeline
from otdd.distill.augment import Augmentation, generator
from otdd.distill.config import ConfigError, TrainConfig
from otdd.distill.data import ImageData, LabeledImages
from otdd.distill.match import accuracy, make_loss, reproducible, train_student, undisturbed
from otdd.distill.students import make_network
from otdd.distill.training import Step, Training
from otdd.losses import OTDistillationLoss


def bars(count=40):
    """Two classes that differ in which half is bright."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 100, (count, 1, 8, 8), dtype=torch.uint8, generator=generator("b"))
    images[labels == 1, :, :4] += 100
    images[labels == 0, :, 4:] += 100
    part = LabeledImages(images, labels)
    return ImageData("bars", ["down", "up"], part, part)


DATA = bars()


def steps(total=30, soft=False):
    for number in range(total):
        batch = Augmentation().draw(40, 20, (8, 8), seed=0, epoch=number, step=0)
        hot = torch.nn.functional.one_hot(DATA.train.labels[batch.index], 2).float()
        yield Step(batch, 6 * hot - 3 if soft else None)


def train(loss="ce", seed=0, **settings):
    config = TrainConfig(lr=5e-3, **settings)
    student = make_network("convnet", DATA, seed)
    images, labels = DATA.train.images, DATA.train.labels
    with reproducible(DATA.image_shape):
        training = Training(student, make_loss(loss, config), config, 30, seed=seed)
        drawn = steps(soft=loss != "ce")
        outcome = train_student(training, images, labels, drawn, test=DATA.test)
    return student, outcome


@pytest.mark.parametrize("loss", ["ce", "kl", "otm"])
@pytest.mark.parametrize("settings", [{}, {"ema": 0.0}, {"optimizer": "sgd", "stretch": 2.0}])
def test_learns(loss, settings):
    student, outcome = train(loss, **settings)
    assert outcome.accuracy == accuracy(student, DATA.test) >= 95
    assert outcome.best >= outcome.accuracy


@pytest.mark.parametrize("loss", ["ce", "kl", "mse", "otm"])
def test_a_student_that_diverges_is_no_result(loss):
    """Else it would count with the accuracy of chance, or stop the run at its geometry."""
    config = TrainConfig(lr=1e30, optimizer="sgd")
    student, per_epoch = make_network("convnet", DATA, 0), 10
    training = Training(student, make_loss(loss, config), config, 30, per_epoch, arch="convnet")
    drawn = steps(soft=loss != "ce")
    with pytest.raises(ConfigError, match=r"train\.lr: 1e\+30 makes convnet diverge, in epoch 1 "):
        train_student(training, DATA.train.images, DATA.train.labels, drawn, test=DATA.test)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_student_that_diverges_in_its_last_step_is_no_result(loss):
    """Its loss is finite to the end; only the tests see the weights after that."""
    config = TrainConfig(lr=1e30, optimizer="sgd")
    student = make_network("convnet", DATA, 0)
    training = Training(student, make_loss(loss, config), config, 1, arch="convnet")
    message = r"train\.lr: 1e\+30 makes convnet diverge, in epoch 1 its logits of the test images"
    with pytest.raises(ConfigError, match=message):
        train_student(
            training, DATA.train.images, DATA.train.labels, steps(1, loss != "ce"), test=DATA.test
        )


def test_same_seed_same_bytes():
    (one, _), (two, _), (other, _) = train(), train(), train(seed=1)
    same = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in same)
    assert not torch.equal(one.body.head.weight, other.body.head.weight)


def test_losses_are_their_formulas():
    student, teacher = torch.randn(2, 4, 3, generator=generator("l"), dtype=torch.float64)
    base = torch.tensor([0, 1, 2, 0])
    mixed = torch.nn.functional.one_hot(base, 3).double()
    config = TrainConfig(beta_2=0.0, kappa_1=0.5, kappa_2=2.0, tau=2.0)

    def value(kind):
        return make_loss(kind, config)(student, mixed, base, teacher)[0]

    cross = -student.log_softmax(1)[torch.arange(4), base].mean()
    torch.testing.assert_close(value("ce"), cross)
    squared = (student - teacher).square().mean()
    torch.testing.assert_close(value("otm"), 0.5 * cross + 2 * squared)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    torch.testing.assert_close(value("ce-plain"), cross)
    torch.testing.assert_close(value("mse"), value("otm"))
    torch.testing.assert_close(value("kl"), 4 * (p * (p / q).log()).sum(1).mean())
    transported = TrainConfig(beta_2=1.0)
    with_plan = make_loss("otm", transported)(student, mixed, base, teacher)[0]
    assert with_plan > 0.025 * cross + squared
    without = make_loss("mse", transported)(student, mixed, base, teacher)[0]
    torch.testing.assert_close(without, 0.025 * cross + squared)
    shared = TrainConfig(beta_2_share=0.5)
    with_share = make_loss("otm", shared)(student, mixed, base, teacher)[0]
    torch.testing.assert_close(
        with_share, OTDistillationLoss(beta_2_share=0.5)(student, teacher, base)
    )


def test_soft_losses_need_soft_labels():
    with pytest.raises(ValueError, match="needs soft labels"):
        make_loss("kl", TrainConfig())(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), None)
    with pytest.raises(ValueError, match="unknown loss 'l2'"):
        make_loss("l2", TrainConfig())


def process_settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_default_dtype(),
    )


@pytest.fixture(params=[(False, False), (True, False), (True, True)], ids=str)
def given_settings(request):
    """What a caller may have set: deterministic algorithms off, strict, or with warnings only."""
    before = process_settings()
    on, warn_only = request.param
    torch.use_deterministic_algorithms(on, warn_only=warn_only)
    torch.set_default_dtype(torch.float64)
    yield process_settings()
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.set_default_dtype(before[3])


def test_reproducible_restores_the_settings(given_settings):
    before = torch.get_num_threads()
    with reproducible((1, 8, 8)):
        assert torch.get_num_threads() == 1
        assert process_settings()[:3] == (True, True, False)
    assert process_settings() == given_settings
    assert before == torch.get_num_threads()


def test_settings_hold_until_the_last_thread_is_done(given_settings):
    """Two threads, each in the middle of the other's time."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with undisturbed(), reproducible((1, 32, 32)):
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second():
        assert first_in.wait(60)
        with undisturbed(), reproducible((1, 32, 32)):
            second_in.set()
            assert first_out.wait(60)
            seen["inside"] = process_settings()
        seen["after"] = process_settings()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"inside": (True, True, False, torch.float32), "after": given_settings}


def test_threads_of_python_that_come_later_have_as_many_of_torch():
    """A thread takes the number that was set last; one that began here found 1 and set that."""

    def elsewhere(run):
        made = []
        thread = threading.Thread(target=lambda: made.append(run()))
        thread.start()
        thread.join()
        return made[0]

    def tiny():
        with reproducible((1, 8, 8)):
            return torch.get_num_threads()

    before = torch.get_num_threads()
    began, ended = threading.Event(), threading.Event()

    def late():
        assert torch.get_num_threads() == 1  # as the main thread is inside
        with reproducible((1, 8, 8)):
            began.set()
            assert ended.wait(60)

    torch.set_num_threads(3)
    try:
        thread = threading.Thread(target=late)
        with reproducible((1, 8, 8)):
            thread.start()
            assert began.wait(60)
        ended.set()
        thread.join()
        assert torch.get_num_threads() == elsewhere(torch.get_num_threads) == 3
        assert elsewhere(tiny) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("loss", ["ce", "kl", "mse", "otm"])
def test_a_step_mixes_no_devices(loss):
    """Images, labels and teacher logits are on the CPU, the student elsewhere (meta: no values)."""
    config = TrainConfig(optimizer="sgd")  # the fused AdamW is not for this device
    student = make_network("convnet", DATA, 0).to("meta")
    training = Training(student, make_loss(loss, config), config, 30)
    for step in steps(2, soft=loss != "ce"):
        training.step(DATA.train.images, DATA.train.labels, step)
    assert all(p.is_meta and p.grad.is_meta for p in student.parameters())
    tensors, _ = training.state()
    assert tensors["student.body.head.weight"].is_meta


def around():
    """What a run sees of its surroundings: a type, a device, gradients and a product."""
    x = torch.ones(1)
    x.requires_grad_()
    y = x * 2
    return y.dtype, y.device.type, y.requires_grad, y.is_inference(), (y[None] @ y[None]).dtype


def flags():
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_runs_are_not_disturbed_by_their_surroundings(name, monkeypatch, tmp_path):
    class Seen(Exception):
        pass

    def opened(*_, **__):
        raise Seen(around())

    monkeypatch.setattr(pipeline.Run, "open", opened)
    wanted = torch.float32, "cpu", True, False, torch.float32
    with SURROUNDINGS[name]():
        before = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        with pytest.raises(Seen) as seen:
            pipeline.run(settings(tmp_path / "run"))
        after = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
    assert seen.value.args == (wanted,)
    assert after == before


def test_settings_that_are_not_resolved():
    with pytest.raises(ConfigError, match=r"config: \{.* expected a RunConfig, which .*resolve"):
        pipeline.run({"data": "digits"})
