"""The checks of tests/gpu/test_points_on_gpu.py on the CPU, by the emulator and the interpreter."""

import points_on_device as checks
import pytest
import torch
from points_backends import points_backend
from references import clouds, clouds_oracle, cost_oracle, plan_rows, sinkhorn_oracle, some_rows

WAYS = ("reference", "cpu", "cuda", "triton", "triton stored", "triton panels", "triton resident")
DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("entries", [1, 200, 1 << 26])
@pytest.mark.parametrize("D", [3, 70])
def test_the_streamed_oracle_is_the_oracle(D, entries):
    x, y, a, b = clouds(2, 20, 30, D, torch.float64)
    a[:, ::4] = 0
    a = a / a.sum(-1, keepdim=True)
    x.requires_grad_()
    eps = 0.3 * D
    C = cost_oracle(x, y, "sqeuclidean")
    want = sinkhorn_oracle(C.detach(), a, b, eps=eps, max_iter=7)
    got = clouds_oracle(x.detach(), y, a, b, eps=eps, max_iter=7, entries=entries)
    for name in ("f", "g", "value"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10)
    P = want["plan"]
    dx = torch.autograd.grad((P * C).sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(got["dx"], dx, rtol=1e-9, atol=1e-12)
    mass = P.sum(-1, keepdim=True)
    met = torch.where(mass > 0, a.unsqueeze(-1) * P / mass, 0)
    dx = torch.autograd.grad((met * C).sum(), x)[0]
    torch.testing.assert_close(got["dx_met"], dx, rtol=1e-9, atol=1e-12)
    rows = some_rows(x, 3)
    assert rows.tolist() == [0, 6, 12, 18]
    some = plan_rows(x.detach(), y, a, b, want["f"], want["g"], eps, rows)
    torch.testing.assert_close(some, P[:, rows], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("D", [3, 20])
def test_agrees_with_the_oracle(D, way, zeros, monkeypatch):
    backend = points_backend(way, monkeypatch)
    checks.agrees(backend, (2, 20, 30, D), DTYPES[zeros], "cpu", zeros)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "cpu"])
def test_labels(way, monkeypatch):
    checks.with_labels(points_backend(way, monkeypatch), (2, 20, 30, 4), "cpu")


@pytest.mark.parametrize("way", ["cuda", "triton resident"])
def test_between_data_sets(way, monkeypatch):
    checks.between_data_sets(points_backend(way, monkeypatch), (6, 5), 2, "cpu")


@pytest.mark.parametrize("way", ["reference", "triton"])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_keep_their_digits(precision, way):
    """The interpreter multiplies in float32, but the points are those of TF32 where allowed."""
    error = 3e-4 if precision == "high" else 0
    row = {"N": 20, "M": 30, "D": 40, "offset": 5.0, "eps": 0.1, "plan_error": error}
    checks.plan_keeps_digits(way, {**row, "precision": precision}, "cpu")


@pytest.mark.parametrize("way", WAYS)
def test_what_else_is_checked_on_a_gpu(way, monkeypatch):
    backend, size = points_backend(way, monkeypatch), (2, 12, 9, 4)
    checks.repeats(backend, size, "cpu")
    if way == backend:  # nothing is captured here: the other ways are repeated above
        checks.captured(backend, size, "cpu", lambda step: step)
    checks.tolerance_holds(backend, size, "cpu", lambda call: call(), 2.0, 1e-2)
    checks.fixed_point(backend, size, "cpu", lambda call: call())
    checks.large(backend, (1, 20, 30, 3), "cpu")
    if backend != "cpu":
        checks.nan_stays(backend, size, "cpu", monkeypatch)


def test_a_wrong_result_is_told():
    x = torch.ones(3, 2)
    with pytest.raises(AssertionError):
        checks.close(x, (x + 1e-3).double(), 1e-4)
