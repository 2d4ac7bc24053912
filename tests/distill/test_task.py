"""The task of timm: what it returns, what it trains, and the README's loop around it."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from otdd.distill import OTDistillationTask
from otdd.distill.students import import_timm
from otdd.losses import OTDistillationLoss

README = Path(__file__).parents[2] / "README.md"


def network(seed, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(12, 5))


def batch():
    torch.manual_seed(9)
    return torch.randn(8, 3, 2, 2), torch.randint(0, 5, (8,))


def test_is_a_training_task_with_its_loss():
    import_timm()
    from timm.task import TrainingTask

    images, labels = batch()
    student, teachers = network(0), [network(1), network(2)]
    loss = OTDistillationLoss(0.5, soft="kl", beta_2_share=0.2)
    task = OTDistillationTask(student, teachers, loss)
    assert isinstance(task, TrainingTask)
    result = task(images, labels)
    mean = (teachers[0](images) + teachers[1](images)) / 2
    torch.testing.assert_close(result["teacher_output"], mean)
    torch.testing.assert_close(result["output"], student(images))
    torch.testing.assert_close(result["loss"], loss(student(images), mean, labels))
    assert result.keys() - {"loss", "output", "teacher_output"} == {
        *("ce_loss", "kl_loss", "ot_loss", "beta_2")
    }


def test_trains_the_student_alone():
    images, labels = batch()
    student, teacher = network(0), network(1, dropout=0.5)
    before = copy.deepcopy(teacher.state_dict())
    task = OTDistillationTask(student, teacher, OTDistillationLoss(0.0)).train()
    assert task.training
    assert student.training
    assert not teacher.training
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=0.05)
    losses = []
    for step in range(100):
        result = task(images, labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        task.update_ema(step)
        losses.append(result["loss"].item())
    assert losses[-1] < 0.05 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert task.get_checkpoint_state()["state_dict"].keys() == student.state_dict().keys()
    assert "state_dict_ema" in task.get_checkpoint_state(ema=True)


def test_doubles_and_halves():
    images, labels = batch()
    for dtype, computed in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        task = OTDistillationTask(network(0), network(1)).to(dtype)
        assert task.dtype == dtype
        result = task(images.to(dtype), labels)
        assert result["loss"].dtype == result["teacher_output"].dtype == computed
        result["loss"].backward()


def test_compiled_parts_are_called():
    images, labels = batch()
    task = OTDistillationTask(network(0), network(1))
    want = task(images, labels)["loss"]
    task.compile(backend="eager")
    torch.testing.assert_close(task(images, labels)["loss"], want)
    assert task.get_eval_model() is task.trainable_module
    assert task.get_checkpoint_state()["state_dict"].keys() == network(0).state_dict().keys()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda s: OTDistillationTask(s, []), ValueError, "teachers: got none"),
        (lambda s: OTDistillationTask(s, s), ValueError, "teachers: got one that shares"),
        (lambda s: OTDistillationTask(s, ["resnet18"]), TypeError, "teachers: got str"),
        (lambda s: OTDistillationTask(s, None), TypeError, "teachers: got NoneType; accepted: tor"),
        (lambda s: OTDistillationTask(len, s), TypeError, "student: got builtin"),
        (lambda s: OTDistillationTask(s, network(1), nn.MSELoss()), TypeError, "loss: got MSELoss"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make(network(0))


class _Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5], x


@pytest.mark.parametrize(
    ("student", "second", "says"),
    [
        (network(0), nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), r"teachers\[1\]: .* \(8, 1\)"),
        (network(0), nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), r"\[1\]: .* shape, \(8, 5\)"),
        (network(0), _Pair(), r"teachers\[1\]: it returned tuple"),
        (_Pair(), network(2), r"student: it returned tuple; accepted: .* logits \(B, K\)"),
    ],
)
def test_modules_that_return_something_else(student, second, says):
    with pytest.raises(ValueError, match=says):
        OTDistillationTask(student, [network(1), second])(*batch())


def test_the_loop_of_the_readme_learns():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "OTDistillationTask(" in block]
    assert len(code.splitlines()) <= 22
    torch.manual_seed(0)
    images = torch.randn(16, 3, 2, 2)
    teachers = [network(1), network(2)]
    labels = sum(teacher(images) for teacher in teachers).argmax(1)
    loader = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    names = {"student": network(0), "teachers": teachers, "loader": loader, "epochs": 60}
    exec(code, names)
    assert (names["student"](images).argmax(1) == labels).float().mean() > 0.9
    assert set(names["logs"]) == {"loss", "ce_loss", "mse_loss", "ot_loss", "beta_2"}
