"""Native calls beside other threads, after a fork, and under Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from references import problem

from otdd.ops import sinkhorn

LONG = """
import torch
from otdd.ops import sinkhorn
torch.set_num_threads({threads})
C = torch.rand({batch}, {size}, {size}, requires_grad=True)
result = sinkhorn(C, eps=0.05, max_iter={steps}, grad={grad!r}, backend="cpu")
print("solving", flush=True)
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
SOLVE = "sinkhorn(C, eps=0.05, max_iter=10**9, backend='cpu')"
BACKWARD = "[result.value.sum().backward(retain_graph=True) for _ in range(10**6)]"


def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    C, a, b = problem(6, 40, 50, dtype)
    C.requires_grad_()
    result = sinkhorn(C, a, b, eps=0.05, max_iter=30, grad="unrolled", backend="cpu")
    return result.f.detach(), torch.autograd.grad(result.cost.sum(), C)[0]


@pytest.mark.parametrize(
    ("batch", "size", "threads", "steps", "grad", "call"),
    [
        (1, 300, 1, 1, "envelope", SOLVE),
        (1, 600, 2, 1, "envelope", SOLVE),
        (3, 30, 2, 1, "envelope", SOLVE),  # the last problem is left to a thread that cannot ask
        (20000, 16, 1, 50, "unrolled", BACKWARD),
    ],
)
def test_ctrl_c_ends_a_long_call(batch, size, threads, steps, grad, call):
    script = LONG.format(batch=batch, size=size, threads=threads, steps=steps, grad=grad, call=call)
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "solving\n"
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        rest, _ = run.communicate(timeout=20)
    finally:
        run.kill()
    assert rest == "interrupted\n"
    assert run.returncode == 0


def test_a_handler_that_returns_does_not_end_a_call():
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        C = torch.rand(1, 200, 200)
        steps = 100
        while len(seen) < 3:  # however fast the machine, a call in which signals arrive
            result = sinkhorn(C, eps=0.05, max_iter=steps, backend="cpu")
            steps *= 4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (result.marginal_error < 1e-4).all()


def test_two_threads_at_once():
    dtypes = (torch.float32, torch.float64)
    expected = [gradients(dtype) for dtype in dtypes]
    seen: list[list[tuple]] = [[], []]

    def work(k: int) -> None:
        torch.set_num_threads(2)
        for _ in range(30):
            seen[k].append(gradients(dtypes[k]))

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    for k in range(2):
        assert len(seen[k]) == 30
        for f, dC in seen[k]:
            assert torch.equal(f, expected[k][0])
            assert torch.equal(dC, expected[k][1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_solves():
    script = """
import os, sys, torch
from otdd.ops import sinkhorn
torch.manual_seed(0)
torch.set_num_threads(2)
C = torch.rand(4, 30, 30)
expected = sinkhorn(C, eps=0.05, backend="cpu").f  # two threads have run
child = os.fork()
if child == 0:
    seen = sinkhorn(C, eps=0.05, backend="cpu").f
    os._exit(0 if torch.equal(seen, expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


class Solves(torch.utils.data.Dataset):
    """Items are solved where they are loaded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> torch.Tensor:
        return sinkhorn(problem(2, 20, 30, seed=k)[0], eps=0.05, backend="cpu").f


def test_in_data_loader_workers():
    expected = list(torch.utils.data.DataLoader(Solves(), batch_size=None))
    seen = torch.utils.data.DataLoader(
        Solves(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for f, exact in zip(seen, expected, strict=True):
        assert torch.equal(f, exact)
