import subprocess
import sys

import pytest
import torch

from otdd import backends
from otdd.backends import BackendError, choose


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine where cpu and reference run, whatever this one is."""
    monkeypatch.delenv("OTDD_BACKEND", raising=False)
    reasons = {"cuda": "no device", "triton": "not installed", "cpu": None, "reference": None}
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
    with pytest.raises(ValueError, match="'gpu'; choose from cuda, triton, cpu, reference"):
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
    ("isa", "allowed"), [("baseline", {"baseline"}), ("avx2", {"baseline", "avx2"})]
)
def test_instruction_set_can_be_lowered(isa, allowed, monkeypatch):
    pytest.importorskip("otdd._native")
    monkeypatch.setenv("OTDD_CPU_ISA", isa)
    code = "from otdd import backends; print(backends.native().cpu_isa())"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() in allowed
