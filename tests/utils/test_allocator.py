"""Memory of freed tensors stays with a process that asked for it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from internlm.utils.allocator import keep_freed_memory

SIZE = 16 * 2**20
ROUNDS = 64


def _faults() -> int:
    """Pages that are mapped while a tensor is made and freed again and again, after the first."""
    torch.ones(SIZE, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _compare() -> None:
    mapped = _faults()
    assert keep_freed_memory()
    # A huge page is 2 MiB.
    assert mapped >= ROUNDS * SIZE // 2**21 > 4 * _faults()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_pages_are_mapped_once() -> None:
    # Not a forked process: an earlier test may have asked for it in this one.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    _compare()
