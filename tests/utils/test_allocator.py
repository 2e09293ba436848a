"""Memory of freed tensors stays with a process that asked for it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import Forked

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
def test_pages_are_mapped_once(tmp_path: Path) -> None:
    process = Forked(_compare, tmp_path / "out.txt")
    assert process.wait() == 0, process.output
