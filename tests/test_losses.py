"""The loss modules."""

import numpy as np
import pytest
import torch
from references import cost_oracle, sinkd_oracle, sinkhorn_oracle

from otdd.losses import OTLogitLoss, SinkhornLoss
from otdd.ops import METRICS

NAN = torch.full((3, 4), torch.nan)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("debias", [False, True])
def test_sinkhorn_loss(metric, debias):
    torch.manual_seed(0)
    x = (0.5 * torch.randn(2, 6, 3, dtype=torch.float64)).requires_grad_()
    y = 0.5 * torch.randn(2, 5, 3, dtype=torch.float64) + 0.3
    a = torch.softmax(torch.randn(2, 6, dtype=torch.float64), -1)
    b = torch.softmax(torch.randn(2, 5, dtype=torch.float64), -1)

    def oracle(p, q, u, v):
        return sinkhorn_oracle(cost_oracle(p, q, metric), u, v, eps=1.0, max_iter=1000)["value"]

    want = oracle(x, y, a, b)
    if debias:
        want = want - (oracle(x, x, a, a) + oracle(y, y, b, b)) / 2
    got = SinkhornLoss(metric, eps=1.0, debias=debias, max_iter=1000)(x, y, a, b)
    assert got.shape == (2,)
    torch.testing.assert_close(got, want)
    (seen,), (exact,) = (torch.autograd.grad(t.sum(), x) for t in (got, want))
    torch.testing.assert_close(seen, exact, rtol=1e-6, atol=1e-8)


def test_clouds_and_weights_broadcast():
    x, y = torch.rand(2, 4, 3), torch.rand(5, 3)
    a, b = (torch.softmax(torch.randn(2, n), -1) for n in (4, 5))
    got = SinkhornLoss(eps=0.5)(x, y, a, b)
    torch.testing.assert_close(got, SinkhornLoss(eps=0.5)(x, y.expand(2, 5, 3), a, b))


def test_divergence_of_a_cloud_from_itself_is_zero():
    x = torch.randn(30, 4)
    assert SinkhornLoss(eps=1.0)(x, x.clone()).abs() < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("marginals", ["measure", "sinkd"])
def test_logit_loss_is_sinkd_up_to_its_mass(reduction, marginals):
    torch.manual_seed(0)
    student = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    p, q = torch.softmax(student / 2, -1), torch.softmax(teacher / 2, -1)
    C = cost_oracle(p, q, "l1")
    want = (sinkd_oracle(C, 0.1, 20) * C).sum() / (7 if reduction == "mean" else 1)
    loss = OTLogitLoss(reduction=reduction, marginals=marginals, grad="unrolled")
    got = loss(student, teacher)
    torch.testing.assert_close(got, want)
    (exact,) = torch.autograd.grad(want, student)
    got.backward()
    torch.testing.assert_close(student.grad, exact)
    assert teacher.grad is None


def test_logit_loss_pulls_the_student_to_the_teacher():
    torch.manual_seed(0)
    student = torch.randn(16, 5, requires_grad=True)
    teacher = 3 * torch.randn(16, 5)
    loss = OTLogitLoss()
    optimiser = torch.optim.Adam([student], lr=0.1)
    first = loss(student, teacher).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss(student, teacher).backward()
        optimiser.step()
    assert loss(student, teacher).item() < 0.5 * first


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: OTLogitLoss(tau=0), "tau: got 0"),
        (lambda: OTLogitLoss(eps=-1), "eps: got -1"),
        (lambda: OTLogitLoss(reduction="max"), "reduction: got 'max'"),
        (lambda: SinkhornLoss(max_iter=0), "max_iter: got 0"),
        (lambda: SinkhornLoss(grad="x"), "grad: got 'x'"),
        (lambda: SinkhornLoss(backend="gpu"), "backend: got 'gpu'"),
        (lambda: OTLogitLoss(marginals="x"), "marginals: got 'x'"),
        (lambda: OTLogitLoss()(torch.rand(0, 3, 4), torch.rand(0, 3, 4)), "not empty"),
        (lambda: OTLogitLoss()(torch.rand(4), torch.rand(4)), "student_logits: got shape"),
        (lambda: SinkhornLoss("manhattan"), "metric: got 'manhattan'"),
        (lambda: SinkhornLoss(eps=0), "eps: got 0"),
        (lambda: OTLogitLoss()(torch.rand(3, 4), torch.rand(4, 4)), "teacher_logits: got"),
        (lambda: OTLogitLoss()(NAN, torch.rand(3, 4)), "^student_logits, .* got nan"),
        (lambda: OTLogitLoss()(torch.rand(3, 4), NAN), "^teacher_logits, .* got nan"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_numbers_are_numbers():
    logits = torch.rand(3, 4), torch.rand(3, 4)
    torch.testing.assert_close(OTLogitLoss(np.float32(2))(*logits), OTLogitLoss(2.0)(*logits))
    for tau in (True, "a", torch.tensor(2.0)):
        with pytest.raises(TypeError, match=r"^tau: got .*; accepted: a number"):
            OTLogitLoss(tau=tau)
    for name in ("eps", "rho_a", "rho_b"):
        with pytest.raises(TypeError, match=f"^{name}: got Tensor; accepted: a number"):
            SinkhornLoss(**{name: torch.tensor([0.1, 0.2])})
    with pytest.raises(TypeError, match=r"^eps: got Tensor; accepted: a number"):
        OTLogitLoss(eps=torch.tensor([0.1, 0.2]))


def test_logits_of_minus_infinity_are_masks():
    student, teacher = torch.rand(3, 4), torch.rand(3, 4)
    wide = [torch.cat([t, torch.full((3, 1), -torch.inf)], -1) for t in (student, teacher)]
    torch.testing.assert_close(OTLogitLoss()(*wide), OTLogitLoss()(student, teacher))


@pytest.mark.parametrize("debias", [True, False])
def test_masses_that_differ_are_refused(debias):
    """Between met marginals the value would depend on the number of iterations."""
    x, y = torch.rand(2, 6, 3), torch.rand(5, 3)
    a, b = torch.full((6,), 1 / 6), torch.ones(5)
    accepted = "^a and b: got masses of 1 and 5; accepted: equal masses, or penalties"
    for rho in (None, float("inf")):
        with pytest.raises(ValueError, match=accepted):
            SinkhornLoss(eps=0.5, debias=debias, rho_a=rho)(x, y, a, b)
    assert SinkhornLoss(eps=0.5, debias=debias, rho_a=1.0)(x, y, a, b).isfinite().all()
    with pytest.raises(ValueError, match=r"^a: got shape \(2, 1\); accepted: \(2, 6\)"):
        SinkhornLoss(debias=debias)(x, y, a[:2, None], b)


def test_options_set_later_count():
    """As users set them who anneal; they are checked as those of the start."""
    x, y = torch.rand(5, 2), torch.rand(4, 2)
    for debias in (True, False):
        loss = SinkhornLoss(eps=0.05, debias=debias)
        loss.eps, loss.metric, loss.max_iter, loss.rho_b = 2.0, "l1", 7, 0.5
        want = SinkhornLoss("l1", 2.0, debias, max_iter=7, rho_b=0.5)(x, y)
        assert loss(x, y) == want
        for name in ("eps", "metric", "max_iter", "tol", "rho_a", "grad"):
            old = getattr(loss, name)
            setattr(loss, name, -1)
            with pytest.raises(ValueError, match=f"^{name}: got -1"):
                loss(x, y)
            setattr(loss, name, old)
    logits = torch.rand(3, 4), torch.rand(3, 4)
    loss = OTLogitLoss()
    loss.tau, loss.eps, loss.reduction = 0.5, 0.02, "sum"
    assert loss(*logits) == OTLogitLoss(0.5, 0.02, reduction="sum")(*logits)
    for name in ("tau", "eps", "max_iter", "reduction", "marginals", "grad", "backend"):
        old = getattr(loss, name)
        setattr(loss, name, -1)
        with pytest.raises(ValueError, match=f"^{name}: got -1"):
            loss(*logits)
        setattr(loss, name, old)
