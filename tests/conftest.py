"""Settings for every test. The environment is set before torch, or otdd, is imported."""

import os
import signal

# A job in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a busy machine two spinning OpenMP threads can be ten times slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

if torch.cuda.device_count() == 0:
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("otdd", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("otdd")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
