"""Stochastic rounding of fp32 to bf16: unbiased, so that small updates are not lost on average.

AdamW's second moment changes by a share of 1 - beta2 of itself at most in a quiet step. bf16 has 8 bits: rounded to the
nearest, a change below 2**-9 is no change, and with beta2 = 0.999 the moment would never fall. With a random number
between 0 and the distance of the two neighbours added before the cut, it gets to the upper one as often as it should
(stochastic rounding, Gupta et al. 2015, arXiv:1502.02551).

The random numbers are a pure function of the number of updates and of an element's place in the global tensor: a
resumed run rounds as the other one would have, every rank that holds a copy of an element rounds it alike, and so does
every layout. An element at (i, j) gets `table0[i + a] xor table1[j + b]`, where a and b depend on the tensor's name.
Each such number is uniform, and any two are independent, so that errors neither drift nor add up; four at the corners
of a rectangle are not, which averages out from one update to the next, as each has other tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from internlm.core.parallel.shard_spec import Box

NUM_STARTS = 2**14
"""Places in a table at which the numbers of a tensor may begin."""

_LOW_BITS = 0xFFFF
_WORD = 0xFFFFFFFF


class StochasticRounding:
    """Random numbers for one update at a time.

    Args:
        shapes: of all global tensors, of at most 15 dimensions of less than 2**27 elements.
        device: where the numbers are needed.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        num_tables = max([1, *map(len, shapes)])
        length = NUM_STARTS + max([1, *(extent for shape in shapes for extent in shape)])
        # The keys of a table do not depend on its length: another rank may hold other tensors.
        starts = torch.arange(num_tables, device=device)[:, None] << 28
        self._keys = _mixed(starts + torch.arange(length, device=device))
        self._tables = torch.zeros_like(self._keys, dtype=torch.int32)

    def draw(self, num_updates: Tensor) -> None:
        """Take the numbers of the update that makes it `num_updates`; a scalar on the device."""
        # 2**32 / golden ratio spreads consecutive numbers.
        keys = (self._keys + num_updates.to(torch.int64) * 0x9E3779B1) & _WORD
        self._tables.copy_(_mixed(keys) & _LOW_BITS)

    def add(self, bits: Tensor, box: Box, key: str) -> None:
        """Add numbers below 2**16 to the bits of fp32 elements.

        Args:
            bits: int32, of the shape of `box`.
            box: where in the global tensor they are.
            key: name of the tensor; other names get other numbers.
        """
        # A scalar is a row of one element.
        offsets, extents = (box.global_offset, box.size) if box.size else ((0,), (1,))
        noise = bits.new_zeros(())
        for dimension, (offset, extent) in enumerate(zip(offsets, extents, strict=True)):
            start = crc32(f"{key}/{dimension}".encode()) % NUM_STARTS + offset
            row = self._tables[dimension, start : start + extent]
            noise = noise ^ row.view(-1, *[1] * (len(extents) - 1 - dimension))
        bits.add_(noise.view(bits.shape))


def store_truncated(target: Tensor, source: Tensor) -> None:
    """Cut the lower 16 bits off flat fp32 elements and store what remains in bf16, without any rounding."""
    target.copy_(source.view(torch.bfloat16)[1::2])  # little-endian: the upper half comes second


def _mixed(keys: Tensor) -> Tensor:
    """A hash of 32 bits of each int64 below 2**32: multiply, shift and xor, twice; no product reaches 2**63."""
    for _ in range(2):
        keys = (((keys >> 16) ^ keys) * 0x45D9F3B) & _WORD
    return (keys >> 16) ^ keys
