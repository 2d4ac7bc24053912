import importlib
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from otdd import _torchvision

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.fixture
def declared(monkeypatch):
    calls = []
    monkeypatch.setattr(_torchvision, "_declare_operators", lambda: calls.append(1))
    return calls


def imports(monkeypatch, *outcomes):
    """Make importing torchvision give these outcomes, one after the other."""
    left = list(outcomes)

    def import_module(name):
        assert name == "torchvision"
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(importlib, "import_module", import_module)
    return left


def test_sound_torchvision_is_left_alone(monkeypatch, declared):
    sound = ModuleType("torchvision")
    imports(monkeypatch, sound)
    assert _torchvision.repair() is sound
    assert not declared


def test_missing_operator_is_declared_and_the_import_repeated(monkeypatch, declared):
    repaired = ModuleType("torchvision")
    left = imports(monkeypatch, RuntimeError(_torchvision.SYMPTOM), repaired)
    monkeypatch.setitem(sys.modules, "torchvision.half", ModuleType("torchvision.half"))
    assert _torchvision.repair() is repaired
    assert declared == [1]
    assert not left
    assert "torchvision.half" not in sys.modules


@pytest.mark.parametrize(
    "error", [RuntimeError("operator other::nms does not exist"), ImportError("no torchvision")]
)
def test_other_errors_pass_through(monkeypatch, declared, error):
    imports(monkeypatch, error)
    with pytest.raises(type(error), match=str(error)):
        _torchvision.repair()
    assert not declared


def test_the_torchvision_of_this_machine_works_after_repair():
    sound = run("import torchvision").returncode == 0
    result = run(
        "from otdd._torchvision import repair, _declare_operators\n"
        "module = repair()\n"
        "assert repair() is module\n"
        "import torch, torchvision.transforms.v2, timm\n"
        "assert torchvision.models.resnet18()(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)\n"
        "print(_declare_operators.cache_info().misses)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0" if sound else "1"]
