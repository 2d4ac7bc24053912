"""Peaks of memory in processes of their own."""

import os
import subprocess
import sys


def printed(script: str, *arguments: object) -> float:
    """The number that a Python script prints.

    glibc gives blocks of a fixed size back: otherwise its gaps, which differ from run to run, can
    be more than what is measured.
    """
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=fixed)
    return float(done.stdout)
