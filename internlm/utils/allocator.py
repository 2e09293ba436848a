"""Settings of the host memory allocator."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for later tensors instead of returning it to the system.

    By default, glibc returns large tensors to the system when they are freed, and the next step pays for mapping and
    zeroing the pages of tensors of the same size. Peak memory does not change. See mallopt(3).

    Returns:
        Whether it took effect: False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, _LARGEST_INT) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
