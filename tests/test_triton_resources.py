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


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_kernels_compile_within_a_chip(arch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), arch]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    wrong = []
    for name, needs in json.loads(done.stdout).items():
        if needs["stack"]:
            wrong.append(f"{name}: spills into {needs['stack']} bytes of stack")
        if needs["shared"] > SHARED[arch]:
            wrong.append(f"{name}: {needs['shared']} bytes of shared memory")
        if needs["matrix"] and not needs["products"]:
            wrong.append(f"{name}: no matrix instructions")
    assert not wrong, "\n".join(wrong)
