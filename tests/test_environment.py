import json
import subprocess
import sys

import pytest

import otdd
from otdd import backends, environment

NATIVE = {
    "compiler": "g++ 12",
    "isas": "baseline",
    "openmp": "no",
    "cuda": "",
    "cuda_archs": "",
    "cuda_reason": "OTDD_CUDA=0",
}


def test_environment_holds_versions_backends_and_machine():
    info = environment.environment()
    assert info["otdd"] == otdd.__version__
    assert info["backends"] == backends.available()
    assert info["cpu"]["threads"] >= 1
    assert info["cpu"]["cores"] >= 1
    assert info["packages"]["torch"]
    assert json.loads(json.dumps(info))["otdd"] == otdd.__version__


def test_report_gives_each_backend_with_its_reason():
    info = environment.environment() | {"backends": {"cpu": "it is broken", "reference": None}}
    lines = environment.report(info).splitlines()
    assert [line.split(None, 1) for line in lines if line.startswith(("  cpu", "  ref"))] == [
        ["cpu", "it is broken"],
        ["reference", "yes"],
    ]


def test_report_of_a_build_without_cuda_and_of_one_with_devices():
    info = environment.environment() | {"native": NATIVE, "cuda": None}
    text = environment.report(info)
    assert "no OpenMP; no CUDA (OTDD_CUDA=0)" in text
    device = {"name": "Card", "capability": (9, 0), "multiprocessors": 132, "memory": 80 * 2**30}
    cuda = {"runtime": 13000, "driver": 13010, "devices": [device], "error": ""}
    native = NATIVE | {"cuda": "13.0", "cuda_archs": "9.0"}
    text = environment.report(info | {"native": native, "cuda": cuda})
    assert "CUDA 13.0 for 9.0" in text
    assert "driver 13.1, runtime 13.0" in text
    assert "0: Card, compute capability 9.0, 80 GiB" in text


def test_torch_that_does_not_load_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    info = environment.environment()
    assert "torch does not load" in environment.report(info)


def test_native_module_that_is_missing_is_told(monkeypatch):
    def native():
        raise backends.BackendError("it was left out")

    monkeypatch.setattr(backends, "native", native)
    info = environment.environment()
    assert info["native"] is None
    assert info["native_reason"] == "it was left out"
    assert environment.report(info)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_command(flags):
    command = [sys.executable, "-m", "otdd", "env", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if flags:
        assert set(json.loads(result.stdout)["backends"]) == set(backends.NAMES)
    else:
        assert "reference  yes" in result.stdout


def test_cuda_query_has_devices_or_a_reason():
    native = pytest.importorskip("otdd._native")
    if not hasattr(native, "cuda_devices"):
        pytest.skip("built without CUDA")
    found = native.cuda_devices()
    assert found["devices"] or found["error"] or found["driver"]
    assert found["runtime"] >= 11000
