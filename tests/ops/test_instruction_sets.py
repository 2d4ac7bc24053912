"""The CPU kernels of every instruction set this processor has give the same answers."""

import os
import subprocess
import sys

import pytest
import torch

from otdd import backends

SCRIPT = """
import sys, torch
from otdd import backends
from otdd.ops import cost_matrix, sinkhorn, sinkhorn_points
from otdd.ops.points import cpu
cpu.STORED = 0
torch.manual_seed(0)
out = []
for dtype in (torch.float32, torch.float64):
    x = torch.randn(2, 9, 37, dtype=dtype, requires_grad=True)
    y = torch.randn(2, 70, 37, dtype=dtype)
    for eps in (10.0, 0.1):
        C = cost_matrix(x, y, backend="cpu")
        r = sinkhorn(C, eps=eps, max_iter=20, grad="unrolled", backend="cpu")
        (dx,) = torch.autograd.grad(r.cost.sum(), x)
        out += [t.detach().double() for t in (C, r.f, r.g, r.plan, r.cost, dx)]
    # Tiny problems, one in a lane, of a size that fills the cache lines of no instruction set.
    r = sinkhorn(torch.rand(33, 15, 17, dtype=dtype), eps=0.1, max_iter=20, backend="cpu")
    out += [t.double() for t in (r.f, r.g, r.plan, r.cost)]
    lx, ly = torch.randint(0, 3, (9,)), torch.randint(0, 4, (70,))
    W = (torch.rand(3, 4, dtype=dtype) - 0.5).requires_grad_()
    for metric in ("l1", "l2", "sqeuclidean"):
        labels = {"labels_x": lx, "labels_y": ly, "label_cost": W}
        options = {"metric": metric, "eps": 3.0, "max_iter": 20, "backend": "cpu"}
        r = sinkhorn_points(x, y, **options, **labels)
        dx, dW = torch.autograd.grad(r.value.sum(), (x, W))
        out += [t.detach().double() for t in (r.f, r.g, r.cost, dx, dW)]
torch.save((backends.native().cpu_isa(), out), sys.argv[1])
"""


def run(isa: str, folder) -> tuple[str, list[torch.Tensor]]:
    path = folder / f"{isa}.pt"
    env = os.environ | {"OTDD_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], env=env, check=True)
    return torch.load(path, weights_only=True)


def test_instruction_sets_agree(tmp_path):
    order = ["baseline", "avx2", "avx512"]
    best = backends.native().cpu_isa()
    if best == "baseline":
        pytest.skip("this processor has only the baseline")
    name, expected = run("baseline", tmp_path)
    assert name == "baseline"
    for isa in order[1 : order.index(best) + 1]:
        name, seen = run(isa, tmp_path)
        assert name == isa
        for k, (x, y) in enumerate(zip(seen, expected, strict=True)):
            tol = 1e-3 if k < len(expected) // 2 else 1e-10  # float32 first, then float64
            torch.testing.assert_close(x, y, rtol=tol, atol=tol * y.abs().max().item())
