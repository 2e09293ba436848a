"""Who sends whose keys and values to whom, and when: the movements of context parallelism, as data.

The queries of a rank stay; keys and values move between the ranks, and in backward their gradients move home. A
movement knows nothing of documents: an attention plan leaves out what nobody needs.

- direct: in step h, rank r computes with the keys of rank r - h, which sent them straight to it. A message has only the
  rows that its receiver needs, so with a sliding window this is an exchange of halos.
- ring: the same steps, but keys are passed on from neighbour to neighbour. Source: Liu et al. 2023,
  https://arxiv.org/abs/2310.01889.
- double_ring: rings within windows of ranks, and between the rings of windows, so that each window gets every block
  once: if a window is a node, all its ranks receive from another node at the same time, one block in w steps. Source:
  LoongTrain, Gu et al. 2024, https://arxiv.org/abs/2406.18485.
- all_gather: the keys of all ranks at once, while the first step computes with the rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

MovementName = Literal["direct", "ring", "double_ring", "all_gather"]

MOVEMENT_NAMES: tuple[MovementName, ...] = get_args(MovementName)


class Transfer(NamedTuple):
    """A block of keys and values, or of their gradients, that one rank sends to another.

    Attributes:
        source: the rank that owns the keys.
        sender, receiver: context ranks.
        step: in which it is sent: keys before the computation of this step, gradients after it.
        arrival: the step before whose computation the receiver needs it.
    """

    source: int
    sender: int
    receiver: int
    step: int
    arrival: int


@dataclass(frozen=True)
class Movement:
    """All transfers between the context ranks of a sample in one attention layer.

    Attributes:
        num_ranks: number of context ranks.
        sources: `[rank][step]`, the ranks with whose keys a rank computes in a step.
        keys: of keys and values, in forward and again in backward.
        gradients: of their gradients, in backward. A rank sends what it computed for a source, plus all that it has
            received for it, until the source has them.
        passes_on: whether ranks send blocks of others, so that all of them need the same rows of a block.
    """

    num_ranks: int
    sources: tuple[tuple[tuple[int, ...], ...], ...]
    keys: tuple[Transfer, ...]
    gradients: tuple[Transfer, ...]
    passes_on: bool

    @property
    def num_steps(self) -> int:
        """Number of steps, with those at the end in which gradients only arrive."""
        return max([len(self.sources[0]), *(transfer.arrival + 1 for transfer in (*self.keys, *self.gradients))])


@cache
def make_movement(name: MovementName, num_ranks: int, windows: tuple[tuple[int, ...], ...] = ()) -> Movement:
    """The movement of a name.

    Args:
        name: see the module docstring.
        num_ranks: number of context ranks.
        windows: for double_ring: the context ranks of each window, equally many, in the order of their ring.
    """
    if name == "all_gather":
        return _all_gather(num_ranks)
    if name == "direct":
        return _direct(num_ranks)
    return _double_ring(windows if name == "double_ring" else (tuple(range(num_ranks)),))


def _direct(num_ranks: int) -> Movement:
    c = num_ranks
    return Movement(
        c,
        tuple(tuple(((rank - step) % c,) for step in range(c)) for rank in range(c)),
        tuple(Transfer(r, r, (r + h) % c, h - 1, h) for h in range(1, c) for r in range(c)),
        tuple(Transfer((r - h) % c, r, (r - h) % c, h, h + 1) for h in range(1, c) for r in range(c)),
        passes_on=False,
    )


def _all_gather(num_ranks: int) -> Movement:
    c = num_ranks
    others = [tuple((rank - h) % c for h in range(1, c)) for rank in range(c)]
    return Movement(
        c,
        tuple(((rank,), others[rank]) for rank in range(c)),
        tuple(Transfer(r, r, (r + h) % c, 0, 1) for h in range(1, c) for r in range(c)),
        tuple(Transfer((r - h) % c, r, (r - h) % c, 1, 2) for h in range(1, c) for r in range(c)),
        passes_on=False,
    )


def _double_ring(windows: Sequence[Sequence[int]]) -> Movement:
    """In outer step o, window i has the blocks of window i - o, and passes them around its ring of w ranks.

    Meanwhile each rank sends the block with which it began to the same place of the next window. A plain ring is one
    window.
    """
    n, w = len(windows), len(windows[0])
    steps: list[list[tuple[int, ...]]] = [[] for _ in range(n * w)]
    keys: list[Transfer] = []
    gradients: list[Transfer] = []
    for outer in range(n):
        first = outer * w
        for i, window in enumerate(windows):
            sources = windows[(i - outer) % n]
            for p, rank in enumerate(window):
                following = window[(p + 1) % w]
                for inner in range(w):
                    source, step = sources[(p - inner) % w], first + inner
                    steps[rank].append((source,))
                    if inner < w - 1:
                        keys.append(Transfer(source, rank, following, step, step + 1))
                    if inner > 0:
                        # The gradients of a block begin at the rank after its entry, and end at the entry.
                        gradients.append(Transfer(source, rank, following, step, step + 1))
                if outer < n - 1:
                    receiver = windows[(i + 1) % n][p]
                    keys.append(Transfer(sources[p], rank, receiver, first, first + w))
                if outer > 0:
                    step = first + w if w > 1 else first
                    gradients.append(Transfer(sources[p], rank, sources[p], step, step + 1))
    return Movement(n * w, tuple(tuple(each) for each in steps), tuple(keys), tuple(gradients), passes_on=True)
