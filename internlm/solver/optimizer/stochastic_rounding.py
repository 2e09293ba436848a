"""Stochastic rounding of fp32 to bf16: unbiased, so small updates are not lost on average.

In a step with small gradients, AdamW's second moment changes by at most a fraction 1 - beta2 of itself. bf16 has 8
significant bits: with round-to-nearest, relative changes below 2**-9 are lost, and with beta2 = 0.999 the moment would
never fall. A random number between 0 and the distance of the two neighbours, added before truncation, rounds up with
the right probability (Gupta et al. 2015, arXiv:1502.02551).

The random numbers are a pure function of the number of updates and of an element's position in the global tensor, so
rounding is the same in a resumed run, on all replicas and in every layout. An element at (i, j) gets `table0[i + a] xor
table1[j + b]`, where a and b depend on the tensor's name. The numbers are uniform and pairwise independent, so errors
neither drift nor accumulate. Four numbers at the corners of a rectangle are dependent, which averages out over updates,
as each has new tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from internlm.core.parallel.shard_spec import Box

NUM_STARTS = 2**14
"""Number of positions in a table at which the numbers of a tensor may begin."""

_LOW_BITS = 0xFFFF
_WORD = 0xFFFFFFFF


class StochasticRounding:
    """Random numbers for one update at a time.

    Args:
        shapes: shapes of all global tensors, with at most 15 dimensions, each below 2**27.
        device: device of the numbers.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        num_tables = max([1, *map(len, shapes)])
        length = NUM_STARTS + max([1, *(extent for shape in shapes for extent in shape)])
        # The keys of a table do not depend on its length: another rank may have other tensors.
        starts = torch.arange(num_tables, device=device)[:, None] << 28
        self._keys = _mixed(starts + torch.arange(length, device=device))
        self._tables = torch.zeros_like(self._keys, dtype=torch.int32)

    def draw(self, num_updates: Tensor) -> None:
        """Draw the numbers of update `num_updates`, a scalar tensor on the device."""
        # 2**32 / golden ratio spreads consecutive numbers.
        keys = (self._keys + num_updates.to(torch.int64) * 0x9E3779B1) & _WORD
        self._tables.copy_(_mixed(keys) & _LOW_BITS)

    def add(self, bits: Tensor, box: Box, key: str) -> None:
        """Add random numbers below 2**16 to the bits of fp32 elements.

        Args:
            bits: int32, of the shape of `box`.
            box: position of the elements in the global tensor.
            key: name of the tensor; different names get different numbers.
        """
        # A scalar is a row of one element.
        offsets, extents = (box.global_offset, box.size) if box.size else ((0,), (1,))
        numbers = bits.new_zeros(())
        for dimension, (offset, extent) in enumerate(zip(offsets, extents, strict=True)):
            start = crc32(f"{key}/{dimension}".encode()) % NUM_STARTS + offset
            row = self._tables[dimension, start : start + extent]
            numbers = numbers ^ row.view(-1, *[1] * (len(extents) - 1 - dimension))
        bits.add_(numbers.view(bits.shape))


def store_truncated(target: Tensor, source: Tensor) -> None:
    """Store flat fp32 elements in bf16 by truncating the lower 16 bits, without rounding."""
    target.copy_(source.view(torch.bfloat16)[1::2])  # little-endian: the upper half comes second


def _mixed(keys: Tensor) -> Tensor:
    """A 32-bit hash of each int64 below 2**32: multiply, shift and xor, twice; no product reaches 2**63."""
    for _ in range(2):
        keys = (((keys >> 16) ^ keys) * 0x45D9F3B) & _WORD
    return (keys >> 16) ^ keys
