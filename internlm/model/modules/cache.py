"""Keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Preallocated keys and values of every layer; K key-value heads of dimension D.

    All rows have the same number of tokens. A forward pass appends its tokens to every layer with `update`; the decoder
    then advances the common length with `advance`.

    Args:
        head_dim: D, of keys.
        value_dim: dimension of values; None: D.

    Attributes:
        length: number of cached tokens per row.
        max_length: capacity per row, in tokens.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        value_dim: int | None = None,
    ) -> None:
        self.length = 0
        self.max_length = max_length
        shape = (num_layers, batch_size, max_length, num_kv_heads)
        self._keys = torch.empty(*shape, head_dim, dtype=dtype, device=device)
        self._values = torch.empty(*shape, value_dim or head_dim, dtype=dtype, device=device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B, S, K, D]` keys and values to a layer; returns all of its `[B, length + S, K, D]` (views).

        Raises:
            ValueError: they exceed `max_length`.
        """
        stop = self.length + k.shape[1]
        if stop > self.max_length:
            raise ValueError(f"the key-value cache has room for {self.max_length} tokens, not for {stop}")
        self._keys[layer, :, self.length : stop] = k
        self._values[layer, :, self.length : stop] = v
        return self._keys[layer, :, :stop], self._values[layer, :, :stop]

    def advance(self, num_tokens: int) -> None:
        """Increase the length by the tokens that every layer has appended."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Discard the tokens from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        """Replace row i by the old row `rows[i]` (beam search); `rows` is int64 `[B]`."""
        for store in (self._keys, self._values):
            store[:, :, : self.length] = store[:, rows, : self.length]
