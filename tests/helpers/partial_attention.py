"""Attention of all ranks of a ring in one process, and plain attention in float64 to compare it with."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.model.ops.attention.partial_attention import Tile, add_partial_attention, partial_attention_backward


@dataclass(frozen=True)
class Cut:
    """Documents in one row, and the ranges of its tokens that each rank owns, in their local order."""

    lengths: tuple[int, ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def rows(self, rank: int) -> Tensor:
        """Indices of the rank's tokens."""
        return torch.cat([torch.arange(0), *(torch.arange(*own) for own in self.ranges[rank])])

    def tiles(self, query_rank: int, key_rank: int) -> list[Tile]:
        """One tile for every range of queries, range of keys and document that have a visible pair."""
        found = []
        bounds = list(itertools.accumulate(self.lengths, initial=0))
        q_offset = 0
        for q_range in self.ranges[query_rank]:
            k_offset = 0
            for k_range in self.ranges[key_rank]:
                for first, last in itertools.pairwise(bounds):
                    q = max(q_range[0], first), min(q_range[1], last)
                    k = max(k_range[0], first), min(k_range[1], last)
                    if q[0] < q[1] and k[0] < min(k[1], q[1]):
                        q_at, k_at = q_offset - q_range[0], k_offset - k_range[0]
                        found.append(Tile(q[0] + q_at, q[1] + q_at, k[0] + k_at, k[1] + k_at, q[0] - k[0]))
                k_offset += k_range[1] - k_range[0]
            q_offset += q_range[1] - q_range[0]
        return found


def random_cut(draw: random.Random, num_tokens: int, num_ranks: int) -> Cut:
    """Documents of random lengths, cut at random tokens and dealt to ranks in a random order; ranks may own nothing."""
    limits = sorted(draw.sample(range(1, num_tokens), min(draw.randint(0, 6), num_tokens - 1)))
    cuts = sorted(draw.sample(range(1, num_tokens), min(draw.randint(0, 3 * num_ranks), num_tokens - 1)))
    own: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for piece in itertools.pairwise((0, *cuts, num_tokens)):
        own[draw.randrange(num_ranks)].append(piece)
    for ranges in own:
        draw.shuffle(ranges)
    lengths = tuple(last - first for first, last in itertools.pairwise((0, *limits, num_tokens)))
    return Cut(lengths, tuple(map(tuple, own)))


def zigzag(num_tokens: int, num_ranks: int, lengths: tuple[int, ...] | None = None) -> Cut:
    """Rank r owns the chunks r and 2 c - 1 - r of 2 c."""
    bounds = [num_tokens * i // (2 * num_ranks) for i in range(2 * num_ranks + 1)]
    chunks = list(itertools.pairwise(bounds))
    own = tuple((chunks[rank], chunks[2 * num_ranks - 1 - rank]) for rank in range(num_ranks))
    return Cut(lengths or (num_tokens,), own)


def visible(cut: Cut, window: int | None) -> Tensor:
    """`[T, T]`: which token sees which."""
    document = torch.arange(len(cut.lengths)).repeat_interleave(torch.tensor(cut.lengths))
    token = torch.arange(cut.num_tokens)
    distance = token[:, None] - token
    return (document[:, None] == document) & (distance >= 0) & (distance < (window or cut.num_tokens))


def plain(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result and gradients of q, k and v in float64."""
    leaves = [x.detach().double().clone().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in leaves[1:])
    scores = torch.einsum("ihd,jhd->hij", leaves[0], keys) * scale
    out = torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask.to(q.device), -math.inf).softmax(-1), values)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, grad_out.double())
    return out.detach(), grad_q, grad_k, grad_v


def by_parts(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, cut: Cut, window: int | None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, by the ranks of a cut: rank r gets the keys of rank r, r - 1, ... one after the other."""
    wide = torch.promote_types(q.dtype, torch.float32)
    results = [torch.zeros(x.shape, dtype=wide, device=q.device) for x in (grad_out, q, k, v)]
    num_ranks = len(cut.ranges)
    for rank in range(num_ranks):
        rows = cut.rows(rank).to(q.device)
        own_q, own_grad = q[rows], grad_out[rows]
        out = torch.zeros_like(own_grad, dtype=wide)
        lse = torch.full(own_q.shape[:2], -math.inf, dtype=wide, device=q.device)
        sources = [(rank - step) % num_ranks for step in range(num_ranks)]
        for source in sources:
            keys = cut.rows(source).to(q.device)
            tiles = cut.tiles(rank, source)
            add_partial_attention(out, lse, own_q, k[keys], v[keys], tiles, window=window, scale=scale)
        assert lse.isfinite().all()
        grad_q = torch.zeros_like(own_q, dtype=wide)
        for source in sources:
            keys = cut.rows(source).to(q.device)
            grads = [torch.zeros_like(x[keys], dtype=wide) for x in (k, v)]
            partial_attention_backward(
                *(own_grad, own_q, k[keys], v[keys], out, lse, cut.tiles(rank, source)),
                window=window,
                scale=scale,
                grad_q=grad_q,
                grad_k=grads[0],
                grad_v=grads[1],
            )
            for total, part in zip(results[2:], grads, strict=True):
                total.index_add_(0, keys, part)
        results[0][rows], results[1][rows] = out, grad_q
    return results[0], results[1], results[2], results[3]


def inputs(
    num_tokens: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """q, k, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    return [torch.randn(num_tokens, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def relative_errors(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[float]:
    """Norm of the error, relative to that of the truth, of each tensor."""
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(ours, theirs, strict=True)]


def largest_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    # Not `max`, which can lose a NaN.
    return torch.stack([(x.double() - y).abs().max() for x, y in zip(ours, theirs, strict=True)]).max().item()
