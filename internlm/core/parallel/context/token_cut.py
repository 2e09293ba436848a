"""Which tokens of a sample each context rank owns. Pure arithmetic on document lengths.

Every rank owns equally many tokens, in ascending order. A query sees the keys before it in its document, so the work of
a rank depends on where its tokens lie:

- contiguous: rank r owns one range. The last rank has almost twice the mean work of one long document, but with short
  documents or a sliding window, few keys are needed from other ranks.
- zigzag: of 2c chunks of the sample, rank r owns chunks r and 2c - 1 - r, so that one long document is balanced.
- document_zigzag: the same within each document, so that any long documents are balanced, in more and smaller pieces.

Source of the zigzag: Brandon et al. 2023, https://arxiv.org/abs/2311.09431, and Llama 3, https://arxiv.org/abs/2407.21783.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

CutName = Literal["contiguous", "zigzag", "document_zigzag"]

CUT_NAMES: tuple[CutName, ...] = get_args(CutName)


class TokenRange(NamedTuple):
    """Tokens `start` to `stop` - 1 of a sample, or rows of a tensor."""

    start: int
    stop: int


@dataclass(frozen=True)
class TokenCut:
    """The tokens of each context rank.

    Attributes:
        name: how they were cut.
        ranges: by rank, the ranges that it owns, ascending, not empty and not adjacent; equally many tokens a rank.
    """

    name: CutName
    ranges: tuple[tuple[TokenRange, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Number of context ranks."""
        return len(self.ranges)

    @cached_property
    def tokens_per_rank(self) -> int:
        """Number of tokens of each rank."""
        return sum(stop - start for start, stop in self.ranges[0])

    def indices(self, rank: int) -> NDArray[np.int64]:
        """The tokens of a rank in their local order, as indices into the sample, `[tokens_per_rank]`."""
        return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in self.ranges[rank]])


def cut_tokens(lengths: Sequence[int], num_ranks: int, name: CutName) -> TokenCut:
    """Deal the tokens of a sample to context ranks.

    Args:
        lengths: of the documents of the sample; their sum is a multiple of `num_ranks`. Zeros are allowed.
        num_ranks: number of context ranks.
        name: of the cut; see the module docstring.
    """
    num_tokens = sum(lengths)
    assert num_tokens > 0 and num_tokens % num_ranks == 0, "pad the sample to a multiple of the ranks"
    if name == "contiguous":
        share = num_tokens // num_ranks
        return TokenCut(name, tuple((TokenRange(r * share, (r + 1) * share),) for r in range(num_ranks)))
    owned: list[list[TokenRange]] = [[] for _ in range(num_ranks)]
    counts = [0] * num_ranks
    start = 0
    for length in (num_tokens,) if name == "zigzag" else lengths:
        for rank, chunk in zip(_zigzag_order(num_ranks), _chunk_sizes(length, counts), strict=True):
            if chunk:
                _append(owned[rank], TokenRange(start, start + chunk))
                counts[rank] += chunk
                start += chunk
    return TokenCut(name, tuple(tuple(ranges) for ranges in owned))


def _zigzag_order(num_ranks: int) -> list[int]:
    """The rank of each of the 2c chunks."""
    return [*range(num_ranks), *reversed(range(num_ranks))]


def _chunk_sizes(length: int, counts: Sequence[int]) -> list[int]:
    """Sizes of the 2c chunks of a document, which differ by at most one token.

    The tokens that remain after equal chunks go to the ranks that own the fewest so far, so that the totals of the
    ranks never differ by more than one token, and not at all at the end of a sample that can be dealt evenly.
    """
    num_ranks = len(counts)
    size, rest = divmod(length, 2 * num_ranks)
    sizes = [size] * (2 * num_ranks)
    by_count = sorted(range(num_ranks), key=lambda rank: (counts[rank], rank))
    # A rank's second token of the rest goes to its second chunk.
    for place in itertools.islice(itertools.chain(by_count, (2 * num_ranks - 1 - rank for rank in by_count)), rest):
        sizes[place] += 1
    return sizes


def _append(ranges: list[TokenRange], new: TokenRange) -> None:
    """Append a range, joined with the last one if they are adjacent."""
    if ranges and ranges[-1].stop == new.start:
        ranges[-1] = TokenRange(ranges[-1].start, new.stop)
    else:
        ranges.append(new)
