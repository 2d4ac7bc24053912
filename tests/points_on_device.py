"""What `sinkhorn_points` has to hold on a device: each check takes the device and the sizes.

tests/gpu runs them on a GPU, tests/ops/test_points_on_device.py on the CPU with small ones.
"""

from collections.abc import Callable

import torch
from references import (
    clouds,
    clouds_oracle,
    dataset_distance_oracle,
    plan_error,
    plan_oracle,
    plan_rows,
    sinkhorn_oracle,
    some_rows,
    squared_distances,
)
from torch import Tensor

from otdd.losses import DatasetDistance
from otdd.ops import sinkhorn_points

Size = tuple[int, int, int, int]  # B, N, M, D


def digits_of(dtype: torch.dtype, D: int) -> float:
    """Relative error of plans: of sums of D products, in float32 where matrix units may cut."""
    return 1e-10 if dtype == torch.float64 else 4e-6 + 1e-7 * D


def problem(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.to(device) for t in clouds(*size, dtype))


def strength(x: Tensor, y: Tensor) -> float:
    """A fifth of the standard deviation of the costs."""
    return 0.2 * squared_distances(x[:1, :50].double(), y[:1, :50].double()).std().item()


def wide(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double() for t in tensors]


def close(seen: Tensor, exact: Tensor, digits: float) -> None:
    """In L1, relative."""
    error = ((seen.double() - exact).abs().sum() / exact.abs().sum()).item()
    assert error <= digits, error


def solved(leaves: list[Tensor], **options: object) -> tuple:
    """A result, with the gradients of its value."""
    leaves = [t.clone().requires_grad_() for t in leaves]
    r = sinkhorn_points(*leaves, **options)
    return r, torch.autograd.grad(r.value.sum(), leaves)


def agrees(backend: str, size: Size, dtype: torch.dtype, device: str, zeros: bool = False) -> None:
    """Potentials, values and all gradients, against costs in float64."""
    x, y, a, b = problem(size, dtype, device)
    if zeros:
        a[:, ::3], b[:, 1::4] = 0, 0
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    eps, digits = strength(x, y), digits_of(dtype, size[-1])
    r, (dx, dy, da, db) = solved([x, y, a, b], eps=eps, max_iter=10, backend=backend)
    exact = clouds_oracle(x, y, a, b, eps=eps, max_iter=10)
    f, g = exact["f"], exact["g"]
    assert r.backend == backend
    seen, exact_rows = (
        plan_rows(x, y, a, b, *fg, eps, some_rows(x)) for fg in ((r.f, r.g), (f, g))
    )
    assert plan_error(seen, exact_rows) <= digits
    close(r.value, exact["value"], digits)
    close(dx, exact["dx"], 4 * digits)
    x, y, a, b = wide((x, y, a, b))
    C = squared_distances(x, y)
    P = plan_oracle(C, f, g, a, b, eps)
    close(dy, 2 * (y * P.sum(-2).unsqueeze(-1) - P.mT @ x), 4 * digits)
    close(r.cost, (P * C).sum((-1, -2)), digits)
    for slope, potential, weight in ((da, f, a), (db, g, b)):
        own = (weight > 0).double()  # up to a constant: masked ones are not asked for
        centred = (own * (slope - potential)).sum(-1, keepdim=True) / own.sum(-1, keepdim=True)
        off = (own * (slope - potential - centred)).abs().max()
        assert off <= digits * C.amax(), off


def with_labels(backend: str, size: Size, device: str) -> None:
    """Costs between labels, and their gradient."""
    x, y, a, b = problem(size, torch.float32, device)
    generator = torch.Generator().manual_seed(0)
    B, N, M, _ = size
    labels_x, labels_y = (torch.randint(7, (B, n), generator=generator) for n in (N, M))
    labels_x, labels_y = labels_x.to(device), labels_y.to(device)
    W = (5 * torch.rand(B, 7, 7, generator=generator)).to(device).requires_grad_()
    options = {"eps": strength(x, y), "max_iter": 10}
    labels = {"labels_x": labels_x, "labels_y": labels_y, "label_cost": W}
    r = sinkhorn_points(x, y, a, b, **options, **labels, backend=backend)
    dW = torch.autograd.grad(r.value.sum(), W)[0]
    x, y, a, b = wide((x, y, a, b))
    batch = torch.arange(B, device=device)[:, None, None]
    between = W.detach().double()[batch, labels_x.unsqueeze(-1), labels_y.unsqueeze(-2)]
    exact = sinkhorn_oracle(squared_distances(x, y) + between, a, b, **options)
    close(r.value, exact["value"], 5e-5)
    cells = (labels_x.unsqueeze(-1) * 7 + labels_y.unsqueeze(-2)).flatten(1)
    mass = torch.zeros(B, 49, dtype=torch.float64, device=device)
    mass.scatter_add_(1, cells, exact["plan"].flatten(1))
    close(dW, mass.reshape(B, 7, 7), 5e-4)


def between_data_sets(backend: str, points: tuple[int, int], classes: int, device: str) -> None:
    """`DatasetDistance` and its gradients, against its definition with all costs in float64."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for n in points:
        labels = torch.randperm(n, generator=generator) % classes
        shift = torch.randn(classes, 3, generator=generator, dtype=torch.float64)
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64) + shift[labels]
        sides.append((x.to(device).requires_grad_(), labels.to(device)))
    (x, lx), (y, ly) = sides
    options = {"eps": 12.0, "max_iter": 100}
    got = DatasetDistance(**options, tol=1e-8, backend=backend)(x, lx, y, ly)
    want = dataset_distance_oracle(x, lx, y, ly, **options)
    close(got, want, 1e-6)
    slopes = (torch.autograd.grad(value, (x, y)) for value in (got, want))
    for seen, exact in zip(*slopes, strict=True):
        close(seen, exact, 1e-5)


def plan_keeps_digits(backend: str, row: dict, device: str) -> None:
    """The plan's error is at most twice what emulated units gave, and what they leave out.

    `row` is one of benchmarks/results/precision.json. The plan is the backend's own: rows of it,
    from costs that its kernels made. Left out are the solve in float32, and that matrix units cut
    off what they add to a sum rather than round it: half a last digit for each 8 features of 3
    products, on products of centred points of size sqrt(D).
    """
    N, M, D, offset = (row[key] for key in ("N", "M", "D", "offset"))
    generator = torch.Generator().manual_seed(N + D)
    x, y = (torch.randn(1, n, D, generator=generator) + offset for n in (N, M))
    x, y = x.to(device), y.to(device)
    a, b = (t.new_full(t.shape[:2], 1 / t.shape[1]) for t in (x, y))
    sample = some_rows(x)
    centre = y.double().mean(-2, keepdim=True)
    C = squared_distances(x.double()[:, sample] - centre, y.double() - centre)
    eps = row["eps"] * C.median().item()
    options = {"eps": eps, "max_iter": 50, "precision": row["precision"], "backend": backend}
    r = sinkhorn_points(x, y, a, b, **options)
    exact = clouds_oracle(x, y, a, b, eps=eps, max_iter=50)
    wanted = plan_rows(x, y, a, b, exact["f"], exact["g"], eps, sample)
    chosen = torch.zeros(1, N, len(sample), device=device)
    chosen[0, sample, torch.arange(len(sample), device=device)] = 1
    seen = r.apply(chosen, transpose=True).mT
    error = plan_error(seen, wanted)
    cuts = 3 * D / 16 * 2**-24 * 2 * D**0.5 / eps
    assert error <= 2 * row["plan_error"] + cuts + 5e-6, error


def repeats(backend: str, size: Size, device: str) -> None:
    """The same bits twice."""
    x, y, a, b = problem(size, torch.float32, device)
    options = {"eps": strength(x, y), "max_iter": 10, "backend": backend}
    (r, dr), (s, ds) = (solved([x, y, a, b], **options) for _ in range(2))
    once, twice = (r.f, r.g, r.value, r.cost, *dr), (s.f, s.g, s.value, s.cost, *ds)
    for seen, again in zip(once, twice, strict=True):
        assert torch.equal(seen, again)


def nan_stays(backend: str, size: Size, device: str, monkeypatch) -> None:
    """In the problem that has it."""
    monkeypatch.setattr("otdd.ops.checks.values_are_checked", lambda t: False)
    x, y, a, b = problem(size, torch.float32, device)
    eps = strength(x, y)
    want = sinkhorn_points(x, y, a, b, eps=eps, max_iter=5, tol=1e-3, backend=backend)
    x[1, 3, 0] = torch.nan
    r = sinkhorn_points(x, y, a, b, eps=eps, max_iter=5, tol=1e-3, backend=backend)
    assert not r.converged[1]
    others = torch.arange(size[0], device=device) != 1
    assert torch.isnan(r.cost).tolist() == (~others).tolist()
    assert torch.equal(r.f[others], want.f[others])
    assert torch.equal(r.n_iter[others], want.n_iter[others])


def tolerance_holds(
    backend: str, size: Size, device: str, without_sync: Callable, share: float, tol: float
) -> None:
    """Problems stop by themselves, the host never waiting for any; the gradient as well.

    `share` of the usual eps: with less of it they take more iterations.
    """
    x, y, a, b = problem(size, torch.float32, device)
    options = {"eps": share * strength(x, y), "max_iter": 2000, "tol": tol, "backend": backend}
    solved([x, y, a, b], **options)
    r, _ = without_sync(lambda: solved([x, y, a, b], **options))
    assert r.converged.all()
    assert (r.n_iter < 2000).all()


def fixed_point(backend: str, size: Size, device: str, without_sync: Callable) -> None:
    """Derivatives of the fixed point, the host never waiting for what was launched last."""
    x, y, a, b = problem(size, torch.float32, device)
    options = {"eps": 2 * strength(x, y), "max_iter": 8, "grad": "implicit"}

    def gradients(backend: str, *leaves: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in leaves]
        r = sinkhorn_points(*leaves, **options, backend=backend)
        return torch.autograd.grad((r.cost + (r.f * leaves[2]).sum(-1)).sum(), leaves[:2])

    gradients(backend, x, y, a, b)
    seen = without_sync(lambda: gradients(backend, x, y, a, b))
    for got, want in zip(seen, gradients("reference", *wide((x, y, a, b))), strict=True):
        close(got, want, 1e-3)


def captured(backend: str, size: Size, device: str, capture: Callable, tol: float = 0.0) -> None:
    """A solve and its gradient as a CUDA graph, replayed with other points.

    `capture` turns a function into one that replays it.
    """
    x, y, a, b = problem(size, torch.float32, device)
    x = x.requires_grad_()
    options = {"eps": strength(x.detach(), y), "max_iter": 5, "tol": tol, "backend": backend}

    def step() -> tuple[Tensor, Tensor]:
        r = sinkhorn_points(x, y, a, b, **options)
        return r.value, torch.autograd.grad(r.value.sum(), x)[0]

    replay = capture(step)
    for _ in range(2):
        with torch.no_grad():
            x.mul_(0.9)
        for seen, want in zip(replay(), step(), strict=True):
            assert torch.equal(seen, want)


def large(backend: str | None, size: Size, device: str) -> None:
    """Value and gradient of clouds whose costs would take far more memory than is used."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    x, y, a, b = problem(size, torch.float32, device)
    eps = strength(x, y)
    x.requires_grad_()
    r = sinkhorn_points(x, y, a, b, eps=eps, max_iter=3, backend=backend)
    dx = torch.autograd.grad(r.value.sum(), x)[0]
    used = torch.cuda.max_memory_allocated() - before if device != "cpu" else 0
    exact = clouds_oracle(x.detach(), y, a, b, eps=eps, max_iter=3)
    close(r.value, exact["value"], 5e-6)
    close(dx, exact["dx"], 2e-5)
    assert used < 1e9, used
