"""How this process gets memory from the system."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, for the next tensors, instead of going back to the system.

    By default glibc gives large tensors back when they are freed, and a step that makes the same ones anew pays for
    mapping and clearing their pages. The peak does not change. See mallopt(3).

    Returns:
        Whether it is so: False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, _LARGEST_INT) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
