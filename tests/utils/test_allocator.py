"""Memory of freed tensors stays with a process that asked for it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from internlm.utils.allocator import keep_freed_memory

# Above the largest size from which glibc maps memory of its own accord, 32 MiB.
SIZE = 64 * 2**20


class _Mallinfo2(ctypes.Structure):
    """What mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


def _glibc_state() -> _Mallinfo2 | None:
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    state: _Mallinfo2 = mallinfo2()
    return state


def _mapped_and_kept() -> tuple[int, int]:
    """Bytes of a large tensor that are mapped separately, and bytes that stay free in the heap after it."""
    before = _glibc_state()
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    during = _glibc_state()
    del tensor
    after = _glibc_state()
    assert before is not None and during is not None and after is not None
    return during.hblkhd - before.hblkhd, after.fordblks - before.fordblks


def _compare() -> None:
    mapped, kept = _mapped_and_kept()
    assert mapped >= SIZE > 2 * kept, (mapped, kept)
    assert keep_freed_memory()
    mapped, kept = _mapped_and_kept()
    assert mapped == 0 and 2 * kept > SIZE, (mapped, kept)


@pytest.mark.skipif(_glibc_state() is None, reason="mallinfo2 is glibc's, from 2.33 on")
def test_freed_memory_stays() -> None:
    # Not a forked process: an earlier test may have asked for it in this one.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    _compare()
