"""Bytes that a rank sends in a collective.

Of n bytes, an all-gather or a reduce-scatter over k ranks sends `n (k-1)/k`, an all-reduce twice that; an all-to-all of
n bytes on each rank sends `n (k-1)/k`.
"""

from __future__ import annotations


def all_gather_bytes(num_bytes: float, ranks: int) -> float:
    """Bytes sent by an all-gather, a reduce-scatter or an all-to-all.

    Args:
        num_bytes: bytes of the full tensor; for an all-to-all, bytes of each rank's input.
        ranks: number of ranks in the group.
    """
    return num_bytes * (ranks - 1) / ranks


def all_reduce_bytes(num_bytes: float, ranks: int) -> float:
    """Bytes sent by an all-reduce of `num_bytes` over `ranks`: a reduce-scatter and an all-gather."""
    return 2 * all_gather_bytes(num_bytes, ranks)
