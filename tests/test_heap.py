"""What the commands do with freed memory."""

import os
import subprocess
import sys

import pytest

from otdd import heap

FAULTS = """
import ctypes, resource, sys, torch
from otdd import heap
kept = heap.keep_freed() if sys.argv[1] == "keep" else None
torch.set_num_threads(1)
for _ in range(30):  # until the blocks of the heap have their sizes
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10_000_000)
found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, found, ctypes.CDLL(None).mallopt(heap.MMAP_THRESHOLD, heap.LARGE))
"""
glibc = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and os.confstr("CS_GNU_LIBC_VERSION")),
    reason="glibc alone hands freed blocks back in this way",
)


def faults(way: str, **environment: str) -> tuple[str, int, bool]:
    plain = {k: v for k, v in os.environ.items() if k not in heap.OF_THE_USER} | environment
    command = [sys.executable, "-c", FAULTS, way]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    kept, count, allowed = done.stdout.split()
    return kept, int(count), allowed == "1"


@glibc
def test_freed_blocks_are_used_again():
    """40 MB are 10 000 pages, mapped anew each time or not at all."""
    _, handed_back, allowed = faults("leave")
    kept, found, _ = faults("keep")
    assert kept == "True"
    if not allowed:
        pytest.skip("older glibc maps blocks of more than 32 MB whatever it is asked")
    assert found < handed_back / 10


@glibc
@pytest.mark.parametrize("name", heap.OF_THE_USER)
def test_what_the_user_has_chosen_stays(name):
    chosen = {"GLIBC_TUNABLES": "glibc.malloc.perturb=0", "LD_PRELOAD": ""}.get(name, "131072")
    assert faults("keep", **{name: chosen})[0] == "False"


def test_other_systems_have_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not heap.keep_freed()
