"""`backend="cuda"` on the CPU: the kernels themselves, run by the emulator."""

import emulated
import pytest

from otdd import backends
from otdd.ops import pointers


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The module of the emulated kernels, which stand in for those of the GPU."""
    module = emulated.module()
    monkeypatch.setattr(pointers, "emulated", module)
    monkeypatch.setitem(backends._REASONS, "cuda", None)
    module.set_chip(4, 227 << 10, 16)
    module.set_order(emulated.ORDERS["forward"])
    return module


@pytest.fixture(autouse=True)
def _emulated_where_asked_for(request):
    case = getattr(request.node, "callspec", None)
    if case and case.params.get("backend") == "cuda":
        request.getfixturevalue("emulated_cuda")
