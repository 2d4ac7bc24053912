"""`DatasetDistance` against its definition written out in float64, and the laws of a distance."""

import functools
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import printed
from references import bures_oracle, dataset_distance_oracle

from otdd.losses import DatasetDistance
from otdd.ops import METRICS, classes
from otdd.ops.points import cpu

LABELS = ("sinkhorn", "gaussian")


@pytest.fixture(params=["reference", "stored", "streamed"])
def backend(request, monkeypatch) -> str:
    monkeypatch.setattr(cpu, "STORED", 0 if request.param == "streamed" else 1 << 20)
    return "reference" if request.param == "reference" else "cpu"


def labelled(sizes: tuple[int, ...], D: int, seed: int = 0, *, names=None) -> tuple:
    """Points ``(N, D)`` around a mean for each class, shuffled, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    means = torch.randn(len(sizes), D, generator=generator, dtype=torch.float64)
    spread = 0.3 + torch.rand(len(sizes), D, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), D, generator=generator, dtype=torch.float64)
    points = means[labels] + spread[labels] * noise
    return points, labels if names is None else torch.tensor(names)[labels]


def both(seed: int = 0) -> tuple:
    """Two data sets: other sizes, other classes, one of a single point, labels with gaps."""
    x, lx = labelled((7, 1, 4), 2, seed, names=[3, 100, 7])
    y, ly = labelled((5, 9), 2, seed + 1)
    return x, lx, y + 0.5, ly


@functools.cache
def expected(**options) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Value and gradients of `both`."""
    x, lx, y, ly = both()
    x.requires_grad_(), y.requires_grad_()
    value = dataset_distance_oracle(x, lx, y, ly, max_iter=50, **options)
    return value.detach(), torch.autograd.grad(value, (x, y))


@pytest.mark.parametrize(
    ("labels", "metric"), [("gaussian", "sqeuclidean")] + [("sinkhorn", m) for m in METRICS]
)
@pytest.mark.parametrize(
    ("debias", "debias_labels", "lambda_x", "lambda_y"),
    [(True, True, 1.0, 1.0), (True, False, 0.4, 1.5), (False, True, 2.0, 1.0)],
)
def test_definition(backend, labels, metric, debias, debias_labels, lambda_x, lambda_y):
    options = {"eps": 4.0, "eps_labels": 3.0, "metric": metric, "debias": debias, "labels": labels}
    options |= {"debias_labels": debias_labels, "lambda_x": lambda_x, "lambda_y": lambda_y}
    want, exact = expected(**options)
    x, lx, y, ly = both()
    x.requires_grad_(), y.requires_grad_()
    got = DatasetDistance(**options, max_iter=50, backend=backend)(x, lx, y, ly)
    assert got.shape == ()
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(got, (x, y)), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("labels", LABELS)
def test_finite_differences(labels):
    """Gradients come through both terms: neither alone passes."""
    x, lx, y, ly = both(3)
    loss = DatasetDistance(eps=3.0, labels=labels, max_iter=100)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(loss(x, lx, y, ly), x)
    torch.manual_seed(0)
    for _ in range(3):
        v = torch.randn_like(x)
        with torch.no_grad():
            up, down = (loss(x + h * v, lx, y, ly) for h in (1e-4, -1e-4))
        torch.testing.assert_close((dx * v).sum(), (up - down) / 2e-4, rtol=1e-5, atol=1e-7)
    parts = []
    for lambda_y in (0.0, 1.0):
        loss = DatasetDistance(eps=3.0, labels=labels, max_iter=100, lambda_y=lambda_y)
        parts.append(torch.autograd.grad(loss(x, lx, y, ly), x)[0])
    assert (parts[0] - parts[1]).abs().max() > 1e-2 * dx.abs().max()


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("count", [None, (5, 4)])
def test_batches_are_problems_of_their_own(labels, count):
    """With classes that some problems do not have, and one that no problem has."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 13, 2).double(), torch.randn(3, 11, 2).double()
    lx, ly = torch.randint(0, 3, (2, 3, 13)), torch.randint(0, 4, (11,))
    lx[0, 0], lx[1, 2] = lx[0, 0].clamp(max=1), 2
    x.requires_grad_()
    options = {"eps": 2.0, "labels": labels, "max_iter": 60}
    together = DatasetDistance(**options, num_classes=count)(x, lx, y, ly)
    assert together.shape == (2, 3)
    alone = torch.stack(
        [
            torch.stack([DatasetDistance(**options)(x[i, j], lx[i, j], y[j], ly) for j in range(3)])
            for i in range(2)
        ]
    )
    torch.testing.assert_close(together, alone)
    seen, exact = (torch.autograd.grad(t.sum(), x)[0] for t in (together, alone))
    torch.testing.assert_close(seen, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 40), (1, 8, 30, 9, 2), (12,)])
@pytest.mark.parametrize("labels", LABELS)
def test_classes_of_very_different_sizes(labels, sizes):
    x, lx = labelled(sizes, 3)
    y, ly = labelled(sizes[::-1], 3, 1)
    want = dataset_distance_oracle(x, lx, y, ly, eps=8.0, labels=labels, max_iter=200)
    got = DatasetDistance(eps=8.0, labels=labels, max_iter=200)(x, lx, y, ly)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_groups_of_classes_hold_at_most_twice_the_points():
    points, labels = labelled((1, 2, 3, 3, 8, 9, 40), 2)
    counts = classes.sizes_of(labels[None], 7)
    found = classes.classes_of(points[None], labels[None], counts, sorted(counts[0].tolist()))
    sizes = [group.sizes for group in found.groups]
    assert sizes == [(1, 2), (3, 3), (8, 9), (40,)]
    held = sum(group.tensors[0].shape[1] * group.tensors[0].shape[2] for group in found.groups)
    assert held <= 2 * len(points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_is_the_bures_wasserstein_distance(dtype):
    """Between normal distributions in more dimensions than there are points, too."""
    for sizes, D in (((30, 40), 3), ((5, 4), 8), ((1, 1), 2), ((1, 6), 3)):
        x, lx = labelled(sizes, D)
        y, ly = labelled((20, 3), D, 1)
        loss = DatasetDistance(labels="gaussian", debias=False)
        tables = loss._tables(x.to(dtype), lx, 2, y.to(dtype), ly, 2)
        want = [[bures_oracle(x[lx == k], y[ly == m]) for m in (0, 1)] for k in (0, 1)]
        tol = 1e-9 if dtype == torch.float64 else 1e-4
        got = tables[0].double()
        torch.testing.assert_close(got, torch.tensor(want).double(), rtol=tol, atol=tol)


def test_a_given_cost_of_labels():
    x, lx = labelled((5, 4, 3), 2)
    y, ly = labelled((6, 2), 2, 1)
    W = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 3.0], [1.0, 3.0, 0.0]], dtype=torch.float64)
    for debias, table in ((True, W), (False, W), (False, W[:, :2])):
        loss = DatasetDistance(eps=3.0, labels=table, debias=debias, lambda_y=1.5)
        options = {"eps": 3.0, "debias": debias, "lambda_y": 1.5, "max_iter": 100}
        want = dataset_distance_oracle(x, lx, y, ly, labels=W, **options)
        torch.testing.assert_close(loss(x, lx, y, ly), want)
    assert DatasetDistance(labels=W).double().table.dtype == torch.float64
    assert list(DatasetDistance(labels=W).state_dict()) == ["table"]


def test_labels_without_weight_leave_the_divergence():
    """lambda_y = 0 is `sinkhorn_divergence` of the points alone."""
    x, lx, y, ly = both()
    want = dataset_distance_oracle(x, lx, y, ly, eps=2.0, lambda_y=0.0, max_iter=100)
    got = DatasetDistance(eps=2.0, lambda_y=0)(x, lx, y, ly)
    torch.testing.assert_close(got, want)
    other = DatasetDistance(eps=2.0, lambda_y=0)(x, lx.flip(0), y, ly)
    torch.testing.assert_close(got, other)


def test_the_classes_count_where_the_points_do_not():
    """The same points with other classes: only the label term tells them apart."""
    x, _ = labelled((40,), 2)
    split, other = (x[:, 0] > 0).long(), (x[:, 1] > 0).long()
    loss = DatasetDistance(eps=0.3)
    assert loss(x, split, x, split) < 1e-6
    assert loss(x, split, x, 1 - split) < 1e-6  # names do not matter
    assert loss(x, split, x, other) > 0.05
    assert DatasetDistance(eps=0.3, lambda_y=0)(x, split, x, other) < 1e-6


def test_a_step_against_the_gradient_brings_data_sets_together():
    x, lx, y, ly = both()
    x.requires_grad_()
    loss = DatasetDistance(eps=0.5)
    optimiser = torch.optim.Adam([x], lr=0.1)
    seen = []
    for _ in range(25):
        optimiser.zero_grad()
        value = loss(x, lx, y, ly)
        value.backward()
        optimiser.step()
        seen.append(value.item())
    assert seen[-1] < 0.3 * seen[0]
    assert all(b < 1.05 * a for a, b in pairwise(seen))


SETS = st.tuples(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 1000),
)


def made(sets: tuple) -> tuple:
    first, second, D, seed = sets
    return *labelled(tuple(first), D, seed), *labelled(tuple(second), D, seed + 1)


@pytest.mark.parametrize("labels", LABELS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(sets=SETS)
def test_laws(labels, sets):
    x, lx, y, ly = made(sets)
    loss = DatasetDistance(eps=3.0, labels=labels, max_iter=400, tol=1e-11)
    value = loss(x, lx, y, ly)
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(loss(y, ly, x, lx), value, **close)
    i, j = torch.randperm(len(x)), torch.randperm(len(y))
    torch.testing.assert_close(loss(x[i], lx[i], y[j], ly[j]), value, **close)
    names = torch.tensor([41, -3, 7])
    torch.testing.assert_close(loss(x, names[lx], y, ly), value, **close)
    by = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)[: x.shape[-1]]
    torch.testing.assert_close(loss(x + by, lx, y + by, ly), value, **close)
    torch.testing.assert_close(loss(x, lx, x[i], lx[i]), torch.zeros_like(value), **close)
    assert value >= -1e-7


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sets=SETS, max_iter=st.integers(1, 3), eps=st.sampled_from([0.05, 0.5, 5.0]))
def test_never_negative_on_a_line(sets, max_iter, eps):
    """Of normal distributions on a line, W is a squared distance of (mean, deviation)."""
    x, lx, y, ly = made((*sets[:2], 1, sets[3]))
    for set_y, labels_y in ((y, ly), (x + 1e-3, lx)):
        loss = DatasetDistance(eps=eps, labels="gaussian", max_iter=max_iter)
        assert loss(x, lx, set_y, labels_y) >= -1e-10


@pytest.mark.parametrize("labels", ["sinkhorn", torch.tensor([[0, 2.0], [2.0, 0]]).double()])
@pytest.mark.parametrize("debias", [True, False])
def test_second_derivatives_by_finite_differences(labels, debias):
    generator = torch.Generator().manual_seed(1)
    x, y, w = (torch.randn(n, 2, generator=generator).double() for n in (9, 8, 9))
    lx, ly = torch.arange(9) % 2, torch.arange(8) % 2
    loss = DatasetDistance(eps=1.0, labels=labels, debias=debias, max_iter=1500)

    def slope(x):
        x = x.requires_grad_()
        return x, torch.autograd.grad(loss(x, lx, y, ly), x, create_graph=True)[0]

    leaf, dx = slope(x.clone())
    (got,) = torch.autograd.grad((dx * w).sum(), leaf)
    up, down = (slope(x + step * w)[1].detach() for step in (1e-5, -1e-5))
    torch.testing.assert_close(got, (up - down) / 2e-5, rtol=1e-4, atol=1e-5)


def test_gaussian_labels_have_no_second_derivatives():
    x, lx, y, ly = both()
    value = DatasetDistance(eps=0.5, labels="gaussian")(x.requires_grad_(), lx, y, ly)
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="'gaussian' has no second derivatives"):
        dx.square().sum().backward()


def test_options_set_later_count():
    x, lx, y, ly = both()
    loss = DatasetDistance(eps=0.1)
    loss.eps, loss.lambda_x, loss.lambda_y, loss.max_iter, loss.debias_labels = 0.7, 2, 3, 9, False
    options = {"lambda_x": 2, "lambda_y": 3, "max_iter": 9, "debias_labels": False}
    assert loss(x, lx, y, ly) == DatasetDistance(0.7, **options)(x, lx, y, ly)
    loss.labels = "gaussian"
    assert loss(x, lx, y, ly) == DatasetDistance(0.7, labels="gaussian", **options)(x, lx, y, ly)
    want, loss.num_classes = loss(x, lx, y, ly), 50
    torch.testing.assert_close(loss(x, lx % 50, y, ly % 50), want)
    names = ("eps", "eps_labels", "lambda_x", "lambda_y", "metric", "max_iter", "labels")
    for name in (*names, "num_classes"):
        old = getattr(loss, name)
        setattr(loss, name, -1)
        with pytest.raises(ValueError, match=f"^{name}: got -1"):
            loss(x, lx, y, ly)
        setattr(loss, name, old)


def test_options_set_later_beside_given_costs_of_labels():
    x, lx, y, ly = both()
    W = torch.rand(9, 8, dtype=torch.float64)
    loss = DatasetDistance(0.5, labels=W, debias=False)
    lx, ly = lx % 9, ly % 8
    assert loss(x, lx, y, ly).isfinite()
    loss.debias = True
    with pytest.raises(ValueError, match=r"^labels: got shape \(9, 8\); accepted: \(K, K\), or"):
        loss(x, lx, y, ly)
    loss.debias, loss.labels = False, "sinkhorn"
    with pytest.raises(ValueError, match=r"^labels: got 'sinkhorn'; accepted: 'given', as the"):
        loss(x, lx, y, ly)


@pytest.mark.parametrize("labels", LABELS)
def test_torch_func_transforms(labels):
    x, lx, y, ly = both()
    loss = DatasetDistance(eps=0.5, labels=labels)
    x.requires_grad_()
    want = torch.autograd.grad(loss(x, lx, y, ly), x)[0]
    many = torch.stack([x.detach(), 2 * x.detach()])
    torch.testing.assert_close(torch.func.grad(lambda z: loss(z, lx, y, ly))(x.detach()), want)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda z: loss(z, lx, y, ly)))(many)[0], want
    )
    values = torch.func.vmap(lambda z: loss(z, lx, y, ly))(many)
    torch.testing.assert_close(values, torch.stack([loss(z, lx, y, ly) for z in many]))
    rows = torch.func.jacrev(lambda z: loss(z, lx, y, ly))(many)
    torch.testing.assert_close(rows[0, 0], want)
    if labels == "gaussian":
        with pytest.raises(NotImplementedError, match="'gaussian' has no second derivatives"):
            torch.func.jacrev(torch.func.grad(lambda z: loss(z, lx, y, ly)))(x.detach())


@pytest.mark.parametrize("num_classes", [None, (5, 4)])
def test_labels_under_vmap_are_refused_but_beside_their_costs(num_classes):
    x, y = torch.rand(3, 6, 2), torch.rand(5, 2)
    lx, ly = torch.randint(4, (3, 6)), torch.randint(4, (5,))
    loss = DatasetDistance(eps=0.5, num_classes=num_classes)
    vmap = torch.func.vmap
    for run in (loss, torch.func.grad(loss)):
        with pytest.raises(
            ValueError, match=r"^labels_x: got labels that torch\.func\.vmap batches"
        ):
            vmap(run, in_dims=(0, 0, None, None))(x, lx, y, ly)
        with pytest.raises(
            ValueError, match=r"^labels_y: got labels that torch\.func\.vmap batches"
        ):
            vmap(run, in_dims=(None, None, 0, 0))(y, ly, x, lx)
    W = torch.rand(4, 4)
    given = DatasetDistance(eps=0.5, labels=W + W.T)
    got = vmap(given, in_dims=(0, 0, None, None))(x, lx, y, ly)
    torch.testing.assert_close(got, given(x, lx, y.expand(3, 5, 2), ly.expand(3, 5)))


def test_half_precision_and_other_numbers():
    x, lx, y, ly = both()
    loss = DatasetDistance(eps=np.float32(0.5))
    got = loss(x.bfloat16(), lx, y.bfloat16(), ly)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(x.bfloat16().float(), lx, y.bfloat16().float(), ly))
    assert "eps=0.5, metric='sqeuclidean', labels='sinkhorn'" in repr(DatasetDistance(0.5))


MEMORY = """
import resource, torch
from otdd.losses import DatasetDistance
def run(n):
    x, y = torch.randn(n, 3, requires_grad=True), torch.randn(n, 3)
    lx, ly = torch.arange(n) % 12, torch.arange(n) % 10
    DatasetDistance(eps=5.0, max_iter=1, backend="cpu")(x, lx, y, ly).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
first = run(3000)
print(run(8000) - first)
"""


def test_memory_is_not_that_of_the_costs():
    """8000 x 8000 costs are 244 MiB, and those of the classes together as many."""
    assert printed(MEMORY) < 110


@pytest.mark.parametrize("labels", LABELS)
def test_precision_inside_autocast(labels):
    x, lx, y, ly = (t.float() if t.is_floating_point() else t for t in both())
    x, loss = x.requires_grad_(), DatasetDistance(0.5, labels=labels)

    def made() -> list[torch.Tensor]:
        value = loss(x, lx, y, ly)
        return [value, *torch.autograd.grad(value, x)]

    want = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = made()
    torch.testing.assert_close(got, want)
