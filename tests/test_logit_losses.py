"""The distillation loss: its formula, shares, checks, and batches of several processes."""

import os
import subprocess
import sys
from pathlib import Path

import gathered_run
import pytest
import torch
from torch.nn import functional as F

from otdd.losses import OTDistillationLoss, OTLogitLoss

DRIVER = Path(gathered_run.__file__)
torch.manual_seed(0)
STUDENT, TEACHER = torch.randn(2, 6, 4, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def student():
    return STUDENT.clone().requires_grad_()


def kl(s, t, tau):
    p, q = torch.softmax(t / tau, 1), torch.softmax(s / tau, 1)
    return tau**2 * (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("soft", ["mse", "kl"])
def test_is_its_formula(soft, reduction):
    x = student()
    ot = OTLogitLoss(tau=3.0, reduction=reduction, grad="unrolled")
    temperature = None if soft == "mse" else 1.5
    loss = OTDistillationLoss(0.5, 2.0, soft=soft, temperature=temperature, ot=ot)
    got, parts = loss(x, TEACHER, LABELS, parts=True)
    middle = F.mse_loss(x, TEACHER) if soft == "mse" else kl(x, TEACHER, 1.5)
    beta = {"mean": 0.08, "sum": 8e-4}[reduction]
    ce = F.cross_entropy(x, LABELS)
    want = 0.5 * ce + 2 * middle + beta * ot(x, TEACHER)
    torch.testing.assert_close(got, want)
    assert list(parts) == ["ce", soft, "ot", "beta_2"]
    assert parts["ce"] == ce
    assert parts["beta_2"] == beta
    assert not any(v.requires_grad for v in parts.values())
    seen, exact = (torch.autograd.grad(t, x)[0] for t in (got, want))
    torch.testing.assert_close(seen, exact)


def test_temperature_of_kl_is_that_of_the_transport():
    loss = OTDistillationLoss(0, 1, 0, soft="kl", ot=OTLogitLoss(tau=3.0))
    torch.testing.assert_close(loss(STUDENT, TEACHER), kl(STUDENT, TEACHER, 3.0))


def test_options_set_later_count():
    loss = OTDistillationLoss(0.5, 2.0, soft="kl")
    loss.ot.tau, loss.kappa_1 = 3.0, 0.25  # the temperature is that of the transport
    ot = OTLogitLoss(tau=3.0)
    want = OTDistillationLoss(0.25, 2.0, soft="kl", ot=ot)(STUDENT, TEACHER, LABELS)
    assert loss(STUDENT, TEACHER, LABELS) == want
    for name in ("kappa_1", "kappa_2", "beta_2", "soft", "temperature"):
        old = getattr(loss, name)
        setattr(loss, name, -1)
        with pytest.raises(ValueError, match=f"^{name}: got -1"):
            loss(STUDENT, TEACHER, LABELS)
        setattr(loss, name, old)


def test_terms_without_weight_are_not_computed():
    for weights, names in (((1, 0, 0), {"ce"}), ((0, 1, 0), {"mse"}), ((0, 0, 1), {"ot"})):
        _, parts = OTDistillationLoss(*weights)(STUDENT, TEACHER, LABELS, parts=True)
        assert parts.keys() - {"beta_2"} == names


@pytest.mark.parametrize("kappa_1", [0.0, 0.5])
@pytest.mark.parametrize("beta_2", [0.0, 0.3])
def test_logits_of_minus_infinity_are_masks(kappa_1, beta_2):
    """Classes that the teacher masks have no part in the divergence, whatever the student says."""
    masked = torch.full((6, 1), -torch.inf, dtype=torch.float64)
    loss = OTDistillationLoss(kappa_1, 1.0, beta_2, soft="kl")
    narrow, wide = student(), torch.cat([STUDENT, masked], 1).requires_grad_()
    teacher = torch.cat([TEACHER, masked], 1)
    want, got = loss(narrow, TEACHER, LABELS), loss(wide, teacher, LABELS)
    torch.testing.assert_close(got, want)
    (exact,), (seen,) = (torch.autograd.grad(t, x) for t, x in ((want, narrow), (got, wide)))
    torch.testing.assert_close(seen[:, :4], exact)
    assert bool((seen[:, 4] == 0).all())
    only = TEACHER.clone()
    only[:, 0] = -torch.inf  # of the teacher alone
    x = student()
    value = OTDistillationLoss(0, 1, 0, soft="kl")(x, only)
    q, p = torch.softmax(x / 2, 1)[:, 1:], torch.softmax(only / 2, 1)[:, 1:]
    torch.testing.assert_close(value, 4 * (p * (p / q).log()).sum(1).mean())
    assert torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize("beta_2", [0.0, None])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf])
def test_mse_takes_finite_logits(beta_2, bad):
    logits = STUDENT.clone()
    logits[2, 1] = bad
    loss = OTDistillationLoss(beta_2=beta_2)
    for args, name in (((logits, TEACHER), "student"), ((STUDENT, logits), "teacher")):
        with pytest.raises(ValueError, match=rf"^{name}_logits: got {bad} at index \(2, 1\)"):
            loss(*args, LABELS)


@pytest.mark.parametrize("share", [0.1, 2.0])
def test_share_is_of_the_gradient_norm(share):
    x = student()
    loss = OTDistillationLoss(0.5, 2.0, beta_2_share=share)
    got, parts = loss(x, TEACHER, LABELS, parts=True)
    (others,) = torch.autograd.grad(OTDistillationLoss(0.5, 2.0, 0.0)(x, TEACHER, LABELS), x)
    (all_of_it,) = torch.autograd.grad(got, x)
    assert (all_of_it - others).norm() == pytest.approx(share * float(others.norm()))
    with torch.no_grad():
        again, same = loss(STUDENT, TEACHER, LABELS, parts=True)
    with torch.inference_mode():
        third = loss(STUDENT + 0, TEACHER + 0, LABELS + 0)
    torch.testing.assert_close(again, got.detach())
    torch.testing.assert_close(third, again)
    assert same["beta_2"] == parts["beta_2"]
    assert not again.requires_grad


def test_share_runs_the_student_once():
    calls = []
    model = torch.nn.Linear(4, 4).double()
    model.register_forward_hook(lambda *_: calls.append(0))
    model.register_full_backward_hook(lambda *_: calls.append(1))
    OTDistillationLoss(beta_2_share=0.5)(model(student()), TEACHER, LABELS).backward()
    assert calls == [0, 1]


def test_share_of_a_transport_without_gradient_is_nothing():
    x = student()
    loss, parts = OTDistillationLoss(1, 0, beta_2_share=1.0)(
        x[:1], TEACHER[:1] * 0 + STUDENT[:1], LABELS[:1], parts=True
    )
    loss.backward()
    assert parts["beta_2"] == 0
    assert x.grad.isfinite().all()


def test_half_logits_are_computed_in_single_precision():
    half = STUDENT.half().requires_grad_()
    loss = OTDistillationLoss(beta_2_share=0.5)(half, TEACHER.half(), LABELS)
    assert loss.dtype == torch.float32
    loss.backward()
    assert half.grad.dtype == torch.float16


def test_teacher_is_detached():
    x, t = student(), TEACHER.clone().requires_grad_()
    OTDistillationLoss(soft="kl")(x, t, LABELS).backward()
    assert t.grad is None


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: OTDistillationLoss(-1), ValueError, "kappa_1: got -1"),
        (lambda: OTDistillationLoss(kappa_2="1"), TypeError, "kappa_2: got str"),
        (lambda: OTDistillationLoss(beta_2=float("nan")), ValueError, "beta_2: got nan"),
        (lambda: OTDistillationLoss(0, 0, 0), ValueError, "got 0, 0, 0; accepted: one of them"),
        (lambda: OTDistillationLoss(0, 0, beta_2_share=1), ValueError, "one of them > 0"),
        (lambda: OTDistillationLoss(beta_2_share=0), ValueError, "beta_2_share: got 0"),
        (lambda: OTDistillationLoss(beta_2=1, beta_2_share=1), ValueError, "beta_2: got 1"),
        (lambda: OTDistillationLoss(soft="l1"), ValueError, "soft: got 'l1'; accepted: mse, kl"),
        (lambda: OTDistillationLoss(temperature=2.0), ValueError, "temperature: got 2.0; .*None"),
        (lambda: OTDistillationLoss(soft="kl", temperature=0), ValueError, "temperature: got 0"),
        (lambda: OTDistillationLoss(ot=F.mse_loss), TypeError, "ot: got function"),
        (lambda: OTDistillationLoss()(STUDENT[0], TEACHER, LABELS), ValueError, "student_logits"),
        (lambda: OTDistillationLoss()(STUDENT, TEACHER[:2], LABELS), ValueError, "teacher_logits"),
        (lambda: OTDistillationLoss()(STUDENT, TEACHER), ValueError, "labels: got None"),
        (lambda: OTDistillationLoss()(STUDENT, TEACHER, LABELS.int()), TypeError, "torch.int32"),
        (
            lambda: OTDistillationLoss()(STUDENT, TEACHER, LABELS[:2]),
            ValueError,
            "labels: got shape",
        ),
        (lambda: OTDistillationLoss()(STUDENT, TEACHER, LABELS + 1), ValueError, "labels: got 4"),
        (lambda: OTDistillationLoss()(STUDENT, TEACHER, LABELS - 1), ValueError, "labels: got -1"),
        (
            lambda: OTDistillationLoss(gather=True)(STUDENT, TEACHER, LABELS),
            RuntimeError,
            "gather: got True without a process group",
        ),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    command = [sys.executable, str(DRIVER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    made = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in gathered_run.KINDS:
        whole = gathered_run.step(gathered_run.network(), kind)
        for one in made:
            torch.testing.assert_close(one[str(kind)], whole)
    for one in made:
        assert "student_logits: got shapes [(3, 5), (4, 5)]" in one["refusal"]
