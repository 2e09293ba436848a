"""Kernels for tiles of an attention matrix: PyTorch's flash attention on CPU and on CUDA, and batched GEMMs.

Each gives the result and the log-sum-exp of its keys alone, and in backward, from those over all keys, the part of the
gradients that its keys contribute; see `partial_attention.py`.

Shapes: n tiles of one shape, Sq queries and Sk keys of a tile, H query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from internlm.model.ops.attention.attention_tiles import Tile, additive_mask, needs_mask, pieces, row_bands, trimmed
from internlm.model.ops.attention.cuda_backends import use_flash_implementation

_SCORES = 1 << 22
"""Maximum number of scores that batched GEMMs have in memory (at least those of one query)."""


class PartialKernel(Protocol):
    """A kernel for tiles of queries `[n, Sq, H, D]`, keys and values `[n, Sk, K, D]`.

    Attributes:
        head_dim_multiple: D must be a multiple of this.
    """

    head_dim_multiple: int

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that queries, keys and values must have, for those of a model in `dtype`."""
        ...

    def split(self, tiles: Iterable[Tile], window: int | None, num_heads: int) -> Iterator[Tile]:
        """The tiles as tiles that the kernel computes; each of their queries sees a key."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention to the keys of a tile `[n, Sq, H, D]`, and the log-sum-exp of its scores `[n, Sq, H]`."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients that the keys of a tile contribute to q, k and v; `out` and `lse` are those over all keys."""
        ...


class CpuFlash:
    """PyTorch's flash attention on CPU, in fp32 or float64, so that no part of a result is rounded to 16 bits."""

    head_dim_multiple = 1

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def split(self, tiles: Iterable[Tile], window: int | None, num_heads: int) -> Iterator[Tile]:
        return pieces(tiles, window)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        mask = additive_mask(tile, window, q) if needs_mask(tile, window) else None
        is_causal = mask is None and tile.is_causal_square
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = additive_mask(tile, window, q) if needs_mask(tile, window) else None
        is_causal = mask is None and tile.is_causal_square
        by_head = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *by_head, lse.transpose(1, 2).contiguous(), 0.0, is_causal, attn_mask=mask, scale=scale
        )
        grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
        return grad_q, grad_k, grad_v


class CudaFlash:
    """PyTorch's flash attention 2 on CUDA, in 16 bits, with windows that are shifted to the tile.

    Queries and keys are aligned at their ends there: query i is at key Sk - Sq + i.
    """

    head_dim_multiple = 8

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def split(self, tiles: Iterable[Tile], window: int | None, num_heads: int) -> Iterator[Tile]:
        return (rest for tile in tiles if (rest := trimmed(tile, window)) is not None)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        use_flash_implementation(None)
        is_causal, left, right = self._window(tile, window)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, None, None, tile.num_queries, tile.num_keys, 0.0, is_causal, False),
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse.transpose(1, 2)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        use_flash_implementation(None)
        is_causal, left, right = self._window(tile, window)
        # The state of random numbers, which only dropout reads.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        by_head = lse.transpose(1, 2).contiguous()
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            *(grad_out, q, k, v, out, by_head, None, None, tile.num_queries, tile.num_keys, 0.0, is_causal, *state),
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return grads

    @staticmethod
    def _window(tile: Tile, window: int | None) -> tuple[bool, int, int]:
        """(is_causal, keys that a query sees before its own, keys that it sees behind it); -1: no limit."""
        if tile.distance is None:
            return False, -1, -1
        # A query is `shift` keys further than the kernel assumes. Not negative: the last query of a trimmed tile is at
        # its last key or behind it.
        shift = tile.distance + tile.num_queries - tile.num_keys
        left = -1 if window is None else window - 1 - shift
        return (True, -1, 0) if shift == 0 and left == -1 else (False, left, shift)


class BatchedGemms:
    """The formulas of attention as batched GEMMs over bands of queries, in fp32 or float64, on any device."""

    head_dim_multiple = 1

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def split(self, tiles: Iterable[Tile], window: int | None, num_heads: int) -> Iterator[Tile]:
        for tile in tiles:
            if (rest := trimmed(tile, window)) is not None:
                yield from row_bands(rest, window, max(1, _SCORES // (num_heads * rest.num_keys)))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        queries, keys, values = (self._by_head(x, k.shape[2]) for x in (q, k, v))
        scores = self._scores(queries, keys, tile, window, scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp_() @ values
        return self._from_heads(out, q), self._from_heads(lse.unsqueeze(-1), q).squeeze(-1)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads, queries, keys, values = (self._by_head(x, k.shape[2]) for x in (grad_out, q, k, v))
        row_lse = self._by_head(lse.unsqueeze(-1), k.shape[2])
        mean = self._by_head((grad_out * out).sum(-1, keepdim=True), k.shape[2])
        probabilities = self._scores(queries, keys, tile, window, scale).sub_(row_lse).exp_()
        grad_scores = (grads @ values.mT).sub_(mean).mul_(probabilities).mul_(scale)
        return (
            self._from_heads(grad_scores @ keys, q),
            self._from_heads(grad_scores.mT @ queries, k),
            self._from_heads(probabilities.mT @ grads, v),
        )

    @staticmethod
    def _scores(q: Tensor, k: Tensor, tile: Tile, window: int | None, scale: float) -> Tensor:
        """`[n, K, H / K Sq, Sk]`, -inf where a key is masked."""
        scores = (q @ k.mT).mul_(scale)
        if tile.distance is not None:
            scores.view(*scores.shape[:2], -1, tile.num_queries, tile.num_keys).add_(additive_mask(tile, window, q))
        return scores

    @staticmethod
    def _by_head(x: Tensor, kv_heads: int) -> Tensor:
        """`[n, S, H, D]` -> `[n, K, H / K S, D]`."""
        return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    @staticmethod
    def _from_heads(by_head: Tensor, like: Tensor) -> Tensor:
        """`[n, K, H / K S, D]` -> `[n, S, H, D]`, with H and S of `like`."""
        num_tiles, length, num_heads, _ = like.shape
        grouped = by_head.unflatten(2, (num_heads // by_head.shape[1], length))
        return grouped.permute(0, 3, 1, 2, 4).reshape(num_tiles, length, num_heads, -1)
