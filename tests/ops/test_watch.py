"""The host sees late that a batch has stopped: what it waits for; results do not show it."""

import pytest
import torch
from references import clouds
from torch._subclasses.fake_tensor import FakeTensorMode

from otdd.ops import cost_matrix, sinkhorn, sinkhorn_points, watch
from otdd.ops.points import implicit as points_implicit
from otdd.ops.sinkhorn import implicit
from otdd.ops.watch import Watch


@pytest.fixture
def looks(monkeypatch):
    """Sets up what looks tell, one after the other, and after how many questions each arrives."""
    log = []

    class Scripted:
        delay, answers = 0, []

        def __init__(self, flag):
            assert flag.shape == ()
            self.asked, self.here = 0, False
            log.append("look")

        def wait(self):
            log.append("wait")
            self.here = True

        def arrived(self):
            self.asked += 1
            return self.here or self.asked > self.delay

        def told(self):
            return self.answers.pop(0)

    def scripted(delay, *answers):
        Scripted.delay, Scripted.answers = delay, list(answers)
        return log

    monkeypatch.setattr(watch, "Look", Scripted)
    return scripted


def iterations(seen: Watch) -> int:
    going = torch.empty(3, dtype=torch.bool, device="meta")  # whose values cannot be looked at
    return next(k for k in range(1000) if seen.over(k, going))


@pytest.mark.parametrize("delay", [0, 5, 100])
def test_who_waits_is_at_most_two_looks_late(looks, delay):
    log = looks(delay, True, True, False)  # still going at iterations 0 and 8, over at 16
    ended = iterations(Watch(8, waits=True))
    assert 16 < ended <= 24
    assert log.count("look") == 3
    assert log.count("wait") == (0 if delay < 8 else 3)


def test_who_does_not_wait_sees_it_when_it_arrives(looks):
    log = looks(50, True, False)
    assert iterations(Watch(16, waits=False)) == 64 + 51
    assert log == ["look", "look"]


def test_on_the_cpu_every_iteration_is_looked_at():
    seen, going = Watch(8, waits=True), torch.ones(3, dtype=torch.bool)
    assert not seen.over(0, going)
    assert not seen.over(1, going & torch.tensor([False, True, False]))
    assert seen.over(2, ~going)


def test_conjugate_gradients_look_at_no_value_but_now_and_then(looks):
    """On `meta`, where a look at any value fails."""
    log = looks(0, True, True, False)
    products = []

    def times(z):
        products.append(z)
        return torch.empty(2, 9, device="meta", dtype=torch.float64)

    r = torch.empty(2, 9, device="meta", dtype=torch.float64)
    implicit.adjoint(times, times, r[:, :1], r[:, :1], r, r, 1e-6)
    steps = (len(products) - 5) / 2  # five before and after
    assert steps == 17
    assert log == ["look"] * 3


def test_a_cuda_graph_of_conjugate_gradients_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        rhs = torch.empty(2, 9, device="cuda")
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            implicit._conjugate_gradients(lambda z: z, rhs, rhs, 1e-6)


class Late(Watch):
    """Sees the end some iterations after it was there."""

    def __init__(self, every, *, waits):
        super().__init__(every, waits=waits)
        self.past = []

    def over(self, iteration, going):
        self.past.append(bool(going.any()))
        return len(self.past) > 11 and not self.past[-12]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rho", [None, 0.7])
def test_results_do_not_depend_on_how_late_the_end_is_seen(rho, kept, monkeypatch):
    monkeypatch.setattr(points_implicit, "KEPT", 1 << 20 if kept else 0)
    x, y, a, b = (t.requires_grad_() for t in clouds(3, 12, 10, 2, torch.float64))
    eps = torch.tensor([0.05, 0.5, 5.0], dtype=torch.float64)  # of very different conditions
    options = {"eps": eps, "rho_a": rho, "max_iter": 20, "grad": "implicit"}

    def gradients():
        r = sinkhorn_points(x, y, a, b, **options, backend="reference")
        s = sinkhorn(cost_matrix(x, y, "l2"), a, b, **options, backend="reference")
        return torch.autograd.grad((r.cost + r.f[:, 0] + s.cost + s.g[:, 1]).sum(), (x, y, a, b))

    at_once = gradients()
    monkeypatch.setattr(implicit, "Watch", Late)
    for seen, want in zip(gradients(), at_once, strict=True):
        assert torch.isfinite(want).all()
        assert torch.equal(seen, want)
