"""The Triton kernels compile for GPUs that are not here, and what they need of a chip is there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_cases.py")
# Of a block, at most: sm_80 is held to what its cheaper relatives (sm_86, sm_89) have.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
LDS = 64 << 10  # of all of AMD's
# For AMD those that take most of a chip, one of each kind; `triton_cases.py gfx942` does them all.
HARDEST = {
    "gfx942": [
        "solve_resident float32 64x128",
        "solve_streamed float64 400x500 bare",
        "backward_unrolled float32 400x500",
        "plan float32",
        "values float32",
        "l1_",
        "softmin_kernel float32 1 False True product sqeuclidean True",
        "softmin_kernel float32 1 False True product sqeuclidean False bf16",
        "tile_kernel float32 True False product sqeuclidean True",
        "merge_kernel float32",
        "decide_kernel float32",
    ],
    "gfx1100": [
        "backward_unrolled float32 400x500",
        "softmin_kernel float32 1 False True product sqeuclidean True",
        "tile_kernel float32 True False product sqeuclidean False bf16",
    ],
}


def compiled(arch, *words):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), arch, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


def faults(name, needs, shared):
    if needs["stack"]:
        yield f"{name}: spills into {needs['stack']} bytes of stack"
    if needs["shared"] > shared:
        yield f"{name}: {needs['shared']} bytes of shared memory"
    if needs["matrix"] and not needs["products"]:
        yield f"{name}: no matrix instructions"


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_kernels_compile_within_a_chip(arch):
    found = compiled(arch)
    wrong = [fault for item in found.items() for fault in faults(*item, SHARED[arch])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("arch", HARDEST)
def test_kernels_compile_within_a_chip_of_amd(arch):
    found = compiled(arch, *HARDEST[arch])
    assert all(any(word in name for name in found) for word in HARDEST[arch])
    assert any(needs["matrix"] for needs in found.values())
    wrong = [fault for item in found.items() for fault in faults(*item, LDS)]
    for name, needs in found.items():
        if needs["spills"]:
            wrong.append(f"{name}: {needs['spills']} registers spill")
        if needs["fences"] < needs["barriers"]:
            wrong.append(f"{name}: a barrier that does not order memory")
    assert not wrong, "\n".join(wrong)
