"""What the commands do with freed memory."""

import os
import subprocess
import sys

import pytest

from otdd import heap

FAULTS = """
import resource, sys, torch
from otdd import heap
kept = heap.keep_freed() if sys.argv[1] == "keep" else None
torch.set_num_threads(1)
for _ in range(30):  # until the blocks of the heap have their sizes
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10_000_000)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and os.confstr("CS_GNU_LIBC_VERSION")),
    reason="glibc alone hands freed blocks back in this way",
)


def faults(way: str, **environment: str) -> tuple[str, int]:
    plain = {k: v for k, v in os.environ.items() if k not in heap.OF_THE_USER} | environment
    command = [sys.executable, "-c", FAULTS, way]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@glibc
def test_freed_blocks_are_used_again():
    """40 MB are 10 000 pages, mapped anew each time or not at all."""
    _, handed_back = faults("leave")
    kept, found = faults("keep")
    assert kept == "True"
    assert found < handed_back / 10


@glibc
@pytest.mark.parametrize("name", heap.OF_THE_USER)
def test_what_the_user_has_chosen_stays(name):
    chosen = {"GLIBC_TUNABLES": "glibc.malloc.perturb=0", "LD_PRELOAD": ""}.get(name, "131072")
    assert faults("keep", **{name: chosen})[0] == "False"


def test_other_systems_have_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not heap.keep_freed()
