"""`backend="cuda"` and `backend="triton"` on the CPU: the kernels themselves, run by an emulator.

That of Triton is its own interpreter (see tests/conftest.py).
"""

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
    asked = case.params.values() if case else ()
    backends_asked = {value.split()[0] for value in asked if isinstance(value, str) and value}
    if "cuda" in backends_asked:
        request.getfixturevalue("emulated_cuda")
    if "triton" in backends_asked:
        reason = backends.available()["triton"]
        if reason is None and not backends.INTERPRETED:
            reason = "these tensors are on the CPU: set TRITON_INTERPRET=1"
        if reason is not None:
            pytest.skip(reason)
