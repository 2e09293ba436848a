"""Keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from internlm.utils.errors import UserError


class KeyValueCache:
    """Preallocated keys and values of every layer, in rows that hold one text each.

    A forward pass works on neighbouring rows, see `rows`. K key-value heads of dimension D.

    Args:
        num_rows: texts at a time.
        max_length: capacity of a row, in tokens.
        head_dim: D, of keys.
        value_dim: dimension of values; None: D.

    Attributes:
        lengths: number of cached tokens of each row.
        max_length: capacity of a row, in tokens.

    Raises:
        UserError: the device has no room for it.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        value_dim: int | None = None,
    ) -> None:
        self.lengths = [0] * num_rows
        self.max_length = max_length
        shape = (num_layers, num_rows, max_length, num_kv_heads)
        try:
            # Not `empty`: a masked key may be anything but NaN.
            self.keys = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
            self.values = torch.zeros(*shape, value_dim or head_dim, dtype=dtype, device=device)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            needed = math.prod(shape) * (head_dim + (value_dim or head_dim)) * dtype.itemsize / 2**30
            raise UserError(
                f"{device} has no room for the keys and values of {num_rows} texts of {max_length:,} tokens, "
                f"{needed:,.1f} GiB: fewer texts at a time (--batch) or shorter ones (--max-length, --max-new-tokens) "
                "need less"
            ) from error

    def rows(self, start: int = 0, stop: int | None = None) -> CachedRows:
        """The rows from `start` to before `stop` (None: all), for one forward pass."""
        return CachedRows(self, start, len(self.lengths) if stop is None else stop)

    def truncate(self, row: int, length: int) -> None:
        """Discard the tokens of a row from position `length` on."""
        assert 0 <= length <= self.lengths[row]
        self.lengths[row] = length

    def clear(self, row: int) -> None:
        """Empty a row whose keys or values may be NaN or inf, which would spoil the results of its neighbours."""
        for store in (self.keys, self.values):
            store[:, row, : self.lengths[row]] = 0
        self.lengths[row] = 0

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` equal to row `source`."""
        if source == target:
            return
        length = self.lengths[target] = self.lengths[source]
        for store in (self.keys, self.values):
            store[:, target, :length] = store[:, source, :length]

    def reorder(self, sources: Tensor) -> None:
        """Replace row i by the old row `sources[i]` (beam search); `sources` is int64 `[n]`, for the first n rows."""
        count = sources.shape[0]
        lengths = [self.lengths[source] for source in sources.tolist()]
        longest = max(lengths, default=0)
        for store in (self.keys, self.values):
            store[:, :count, :longest] = store[:, sources, :longest]
        self.lengths[:count] = lengths


class CachedRows:
    """Neighbouring rows of a cache during one forward pass, which appends as many tokens to each of them.

    Every layer appends its keys and values with `update`; the decoder then adds their number to the lengths with
    `advance`. B is the number of rows, S that of new tokens of each.
    """

    def __init__(self, cache: KeyValueCache, start: int, stop: int) -> None:
        self._cache = cache
        self._rows = slice(start, stop)
        self._lengths = cache.lengths[self._rows]
        self._device = cache.keys.device
        self._is_even = len(set(self._lengths)) == 1
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._places: tuple[Tensor, Tensor] | None = None

    def position_ids(self, num_tokens: int) -> Tensor:
        """Positions of the next tokens, int64 `[B, num_tokens]`."""
        starts = torch.tensor(self._lengths, device=self._device)
        return starts[:, None] + torch.arange(num_tokens, device=self._device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B, S, K, D]` keys and values to a layer.

        Returns:
            Views of its keys and values, `[B, T, K, D]`, T being the largest length with the new tokens. What is behind
            the end of a shorter row is not defined; see `mask`.

        Raises:
            ValueError: they exceed `max_length`.
        """
        count = k.shape[1]
        stop = max(self._lengths) + count
        if stop > self._cache.max_length:
            raise ValueError(f"the key-value cache has room for {self._cache.max_length} tokens, not for {stop}")
        keys, values = self._cache.keys[layer, self._rows], self._cache.values[layer, self._rows]
        if self._is_even:
            keys[:, stop - count : stop], values[:, stop - count : stop] = k, v
        else:
            if self._places is None:
                rows = torch.arange(len(self._lengths), device=self._device)[:, None]
                self._places = rows, self.position_ids(count)
            keys[self._places], values[self._places] = k, v
        return keys[:, :stop], values[:, :stop]

    def mask(self, num_tokens: int, window: int | None) -> Tensor | None:
        """Which keys each new token attends to.

        Args:
            num_tokens: S.
            window: maximum number of keys that a token attends to, itself included; None: no limit.

        Returns:
            bool `[B, 1, S, T]`; None if the rows have equal lengths, so that attention is causal as without a cache.
        """
        if self._is_even:
            return None
        key = (num_tokens, window)
        if key not in self._masks:
            last = max(self._lengths) + num_tokens
            distance = self.position_ids(num_tokens)[:, :, None] - torch.arange(last, device=self._device)
            visible = distance >= 0
            self._masks[key] = (visible if window is None else visible & (distance < window)).unsqueeze(1)
        return self._masks[key]

    def advance(self, num_tokens: int) -> None:
        """Increase the lengths by the tokens that every layer has appended."""
        self._cache.lengths[self._rows] = [length + num_tokens for length in self._lengths]
