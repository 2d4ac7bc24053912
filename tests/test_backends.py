import importlib.util
import subprocess
import sys

import pytest
import torch

from otdd import backends
from otdd.backends import BackendError, choose
from otdd.ops import cost_matrix, pointers


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine where cpu and reference run, whatever this one is."""
    monkeypatch.delenv("OTDD_BACKEND", raising=False)
    reasons = {"cuda": "no device", "cpu": None, "triton": "not installed", "reference": None}
    monkeypatch.setattr(backends, "_REASONS", reasons)
    return reasons


def test_available_names_every_backend_and_reference_always_runs():
    assert tuple(backends.available()) == backends.NAMES
    assert backends.available()["reference"] is None


def test_first_candidate_without_a_reason_is_chosen():
    assert choose("op", {"cpu": None, "reference": None}) == "cpu"
    assert choose("op", {"cpu": "inputs are elsewhere", "reference": None}) == "reference"
    assert choose("op", {"cuda": None, "reference": None}) == "reference"


def test_explicit_backend_is_used_even_if_another_comes_first():
    assert choose("op", {"cpu": None, "reference": None}, "reference") == "reference"


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ({"cuda": None, "reference": None}, "no device"),
        ({"reference": None}, "no device"),
    ],
)
def test_machine_reason_refuses_an_explicit_backend(candidates, reason):
    with pytest.raises(BackendError, match=f"op: backend='cuda' cannot be used: {reason}"):
        choose("op", candidates, "cuda")


def test_op_reason_and_missing_candidate_refuse_an_explicit_backend():
    with pytest.raises(BackendError, match="wrong dtype"):
        choose("op", {"cpu": "wrong dtype", "reference": None}, "cpu")
    with pytest.raises(BackendError, match="no such backend"):
        choose("op", {"reference": None}, "cpu")


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="'gpu'; choose from cuda, cpu, triton, reference"):
        choose("op", {"cpu": None}, "gpu")


def test_no_usable_candidate_tells_every_reason():
    with pytest.raises(BackendError, match="cuda: no device; cpu: wrong dtype"):
        choose("op", {"cuda": None, "cpu": "wrong dtype"})


def test_environment_variable_is_the_default_backend(monkeypatch):
    monkeypatch.setenv("OTDD_BACKEND", "reference")
    assert choose("op", {"cpu": None, "reference": None}) == "reference"
    assert choose("op", {"cpu": None, "reference": None}, "cpu") == "cpu"
    monkeypatch.setenv("OTDD_BACKEND", "cuda")
    with pytest.raises(BackendError, match="OTDD_BACKEND='cuda' cannot be used: no device"):
        choose("op", {"cpu": None, "reference": None})
    monkeypatch.setenv("OTDD_BACKEND", "fpga")
    with pytest.raises(ValueError, match="unknown OTDD_BACKEND='fpga'"):
        choose("op", {"cpu": None, "reference": None})
    monkeypatch.setenv("OTDD_BACKEND", "")
    assert choose("op", {"cpu": None, "reference": None}) == "cpu"


def test_choice_traces_under_torch_compile():
    def add_one_on_cpu(x):
        return x + (1 if choose("op", {"cpu": None, "reference": None}) == "cpu" else 2)

    compiled = torch.compile(add_one_on_cpu, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1


@pytest.mark.parametrize(
    ("installed", "interpreted", "gpus", "says"),
    [
        (False, False, 1, "triton is not installed"),
        (False, True, 0, "triton is not installed"),
        (True, False, 0, "no GPU that torch sees (TRITON_INTERPRET=1"),
        (True, False, 1, None),
        (True, True, 0, None),
    ],
)
def test_triton_needs_itself_and_a_gpu_or_its_interpreter(
    installed, interpreted, gpus, says, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(backends, "INTERPRETED", interpreted)
    reason = backends._why_not_triton()
    assert reason is None if says is None else reason.startswith(says)


def test_the_interpreter_is_asked_for_by_the_environment():
    """As triton reads it; each value in a fork of one process, that imports otdd anew."""
    pytest.importorskip("triton")
    code = """
import os, torch
from triton import knobs
for value in ("1", "true", "0", None):
    os.environ.pop("TRITON_INTERPRET", None)
    if value is not None:
        os.environ["TRITON_INTERPRET"] = value
    if not os.fork():
        from otdd import backends
        assert backends.INTERPRETED == knobs.runtime.interpret == (value in ("1", "true")), value
        os._exit(0)
    assert os.wait()[1] == 0, value
print("as triton does")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "as triton does\n", result.stderr


@pytest.mark.parametrize(
    ("interpreted", "device", "says"),
    [
        (True, "cpu", None),
        (True, "cuda", "the inputs are on cuda:0, not on the CPU, where TRITON_INTERPRET=1 runs"),
        (False, "cuda", None),
        (False, "cpu", "the inputs are on cpu, not on a GPU"),
        (False, "meta", "the inputs are on meta, not on a GPU"),
    ],
)
def test_where_triton_wants_its_inputs(interpreted, device, says, monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETED", interpreted)
    with torch._subclasses.FakeTensorMode():
        t = torch.empty(2, device=device)
    assert pointers.triton_refusal(t) == says


def test_triton_comes_after_native_code_and_before_reference(machine):
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    assert tuple(pointers.refusals(cpu)) == backends.NAMES == ("cuda", "cpu", "triton", "reference")
    machine["triton"] = None
    assert choose("op", pointers.refusals(cpu)) == "cpu"
    assert choose("op", pointers.refusals(meta)) == "reference"
    assert choose("op", {"cuda": None, "cpu": "elsewhere", "triton": None}) == "triton"
    assert pointers.refusals(meta, triton="too large")["triton"].startswith(
        "the inputs are on meta"
    )


def test_triton_is_refused_where_it_is_not_installed():
    with pytest.raises(BackendError, match="'triton' cannot be used: not installed"):
        cost_matrix(torch.rand(2, 3), torch.rand(4, 3), backend="triton")


@pytest.mark.parametrize(
    ("isa", "allowed"), [("baseline", {"baseline"}), ("avx2", {"baseline", "avx2"})]
)
def test_instruction_set_can_be_lowered(isa, allowed, monkeypatch):
    pytest.importorskip("otdd._native")
    monkeypatch.setenv("OTDD_CPU_ISA", isa)
    code = "from otdd import backends; print(backends.native().cpu_isa())"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() in allowed
