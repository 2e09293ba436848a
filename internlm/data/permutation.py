"""A keyed pseudo-random permutation of [0, n), evaluated at any index in O(1) time and memory.

A Feistel network (Luby and Rackoff 1988) on the mixed radix (a, b) with a * b >= n; the few values beyond n are
cycle-walked (Black and Rogaway 2002).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_BLOCK = 1 << 14
"""Indices evaluated together; their temporaries stay in the cache of a core, which halves the time."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def derive_key(*parts: int) -> int:
    """Derive a 64-bit key from integers by splitmix64."""
    state = 0
    for part in parts:
        state = _splitmix((state ^ (part & _MASK)) & _MASK)
    return state


def permute(indices: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Map `indices` by the permutation of [0, size) that `key` selects.

    Args:
        indices: int64 of any shape, each in [0, size).
        size: at least 1.
        key: any integer; different keys give unrelated permutations.

    Returns:
        int64, of the same shape.
    """
    rows = math.isqrt(size - 1) + 1 if size > 1 else 1
    columns = -(-size // rows)
    keys = [np.uint64(derive_key(key, i)) for i in range(_ROUNDS)]
    flat = np.asarray(indices).astype(np.uint64).reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        values = _feistel(flat[start : start + _BLOCK], np.uint64(rows), np.uint64(columns), keys)
        # Cycle walking: iterating a bijection of [0, rows * columns) from a value below size returns to one below size.
        while (outside := values >= size).any():
            values[outside] = _feistel(values[outside], np.uint64(rows), np.uint64(columns), keys)
        flat[start : start + _BLOCK] = values
    return flat.astype(np.int64).reshape(np.shape(indices))


def _feistel(
    values: NDArray[np.uint64], rows: np.uint64, columns: np.uint64, keys: list[np.uint64]
) -> NDArray[np.uint64]:
    left, right = values // columns, values % columns
    for round_index, key in enumerate(keys):
        # A round adds a function of one half to the other half, so it is invertible.
        if round_index % 2 == 0:
            left = (left + _mix(right, key) % rows) % rows
        else:
            right = (right + _mix(left, key) % columns) % columns
    return left * columns + right


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _splitmix(state: int) -> int:
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
