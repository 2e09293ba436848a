"""Deals the tokens of a sample to the context ranks, on the host, and plans its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from internlm.core.parallel.context.attention_plan import AttentionPlan, make_plan
from internlm.core.parallel.context.cut_choice import choose_cut
from internlm.core.parallel.context.key_gathering import KeyGathering, make_key_gathering
from internlm.core.parallel.context.movement import MovementName, make_movement
from internlm.core.parallel.context.token_cut import CUT_NAMES, CutName, TokenCut, cut_tokens
from internlm.core.parallel.context.token_pieces import TokenPieces
from internlm.data.batch import IGNORE_INDEX, LaterTokens, MicroBatch
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.utils.errors import ConfigError

Plan = TypeVar("Plan")

Exchange = Literal["auto", "ring", "direct", "all_gather"]

EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)

_CACHED_PLANS = 16
"""Samples of which the plans are kept: rows of one length have one."""


@dataclass(frozen=True)
class ContextOptions:
    """How context ranks share the attention of a sample. No option changes a result beyond rounding.

    Attributes:
        cut: which tokens a rank owns; "auto": the fastest by `choose_cut`.
        exchange: how keys and values travel; "auto": the double ring if there are windows, else straight.
        windows: the context ranks of each window of the double ring, in the order of their ring; empty: no windows.

    Raises:
        ConfigError: there is no such cut or exchange, or windows are to exchange otherwise than in a ring.
    """

    cut: Literal["auto"] | CutName = "auto"
    exchange: Exchange = "auto"
    windows: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("cut", ("auto", *CUT_NAMES)), ("exchange", EXCHANGES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} = {value!r}: it must be one of {', '.join(map(repr, allowed))}")
        if self.windows and self.exchange not in ("auto", "ring"):
            raise ConfigError(f"exchange = {self.exchange!r} does not work with windows, which are a double ring")

    @property
    def movement(self) -> MovementName:
        """The movement of keys and values."""
        if self.windows:
            return "double_ring"
        return "direct" if self.exchange == "auto" else self.exchange


class ByWindow(dict[int | None, Plan]):
    """Sliding window (None: no limit) -> what one rank does in attention with it; made when it is first asked for.

    Args:
        make: window -> its plan.
        windows: that are asked for at once.
    """

    def __init__(self, make: Callable[[int | None], Plan], windows: Iterable[int | None]) -> None:
        super().__init__()
        self._make: Callable[[int | None], Plan] = make
        for window in windows:
            self[window]

    def __missing__(self, window: int | None) -> Plan:
        self[window] = self._make(window)
        return self[window]


@dataclass(frozen=True)
class SplitDocuments(VarlenMetadata):
    """The documents of a sample whose tokens are dealt to context ranks.

    Attributes:
        plans: sliding window (None: no limit) -> the plan of attention with it.
        gatherings: the same for attention that gathers keys before they are expanded.
    """

    plans: Mapping[int | None, AttentionPlan] = field(default_factory=dict)
    gatherings: Mapping[int | None, KeyGathering] = field(default_factory=dict)


class ContextPlans(NamedTuple):
    """How the ranks share a sample.

    Attributes:
        cut: the tokens of each rank.
        pieces: of its documents.
        plans, gatherings: of one rank, see `SplitDocuments`; one of them is made at once for the windows of the model.
    """

    cut: TokenCut
    pieces: TokenPieces
    plans: Mapping[int | None, AttentionPlan]
    gatherings: Mapping[int | None, KeyGathering]


class SplitSample(NamedTuple):
    """What one rank needs of a sample.

    Attributes:
        micro_batch: this rank's tokens, `[1, T / c]`; `cu_seqlens` and `lengths` are those of the whole sample.
        plans: how the ranks share the sample; None if the rank has all tokens.
    """

    micro_batch: MicroBatch
    plans: ContextPlans | None = None

    def documents(self, on_device: MicroBatch) -> VarlenMetadata | None:
        """The documents of the sample, as attention gets them; None: each row is one.

        Args:
            on_device: the micro-batch on the device.
        """
        if on_device.lengths is None:
            return None
        assert on_device.cu_seqlens is not None
        documents = on_device.cu_seqlens, on_device.lengths, max(on_device.lengths)
        if self.plans is None:
            return VarlenMetadata(*documents)
        return SplitDocuments(*documents, on_device.token_indices, self.plans.plans, self.plans.gatherings)


def padded_lengths(lengths: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """Lengths of the documents of a sample, with a document of padding if its tokens are no multiple of `multiple`."""
    num_padding = -sum(lengths) % multiple
    return (*lengths, num_padding) if num_padding else lengths


class ContextSplit:
    """Deals samples to context ranks; equal on all ranks of a sample, as they have the same lengths.

    Args:
        rank: context rank.
        num_ranks: number of context ranks.
        tensor_size: number of ranks that divide the tokens of a context rank further.
        layers: sliding window (None: no limit) -> number of layers of the whole model that have it.
        options: see `ContextOptions`.
        gathers_keys: attention gathers keys before they are expanded, straight from their owners.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        tensor_size: int,
        layers: Mapping[int | None, int],
        options: ContextOptions,
        *,
        gathers_keys: bool = False,
    ) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._multiple = num_ranks * tensor_size
        self._layers = dict(layers)
        self._options = options
        self._gathers_keys = gathers_keys
        self._cached_plan = lru_cache(maxsize=_CACHED_PLANS)(self._plan)

    def plan(self, lengths: tuple[int, ...]) -> ContextPlans:
        """Cut a sample, and plan its attention on this rank.

        Args:
            lengths: of its documents; their sum is a multiple of the ranks that share it.
        """
        return self._cached_plan(lengths)

    def split(self, micro: MicroBatch) -> SplitSample:
        """Take this rank's tokens of a micro-batch on the host.

        Rows without packing become documents. If the ranks do not divide the number of tokens, the sample gets a
        document of padding at its end, without labels.
        """
        rows, width = micro.input_ids.shape
        lengths = padded_lengths(micro.lengths or (width,) * rows, self._multiple)
        num_padding = sum(lengths) - rows * width
        is_padding = micro.is_padding
        if num_padding:
            is_padding = torch.zeros(rows, width, dtype=torch.bool) if is_padding is None else is_padding
        plans = self.plan(lengths)
        indices = torch.from_numpy(plans.cut.indices(self._rank))

        def own(values: Tensor, padding: int = 0) -> Tensor:
            """`[B, S, ...]` -> `[1, T / c, ...]`."""
            flat = values.flatten(0, 1)
            if num_padding:
                flat = torch.cat([flat, flat.new_full((num_padding, *flat.shape[1:]), padding)])
            return flat[indices].unsqueeze(0)

        part = MicroBatch(
            input_ids=own(micro.input_ids),
            labels=own(micro.labels, IGNORE_INDEX),
            position_ids=own(micro.position_ids),
            type_ids=own(micro.type_ids),
            cu_seqlens=VarlenMetadata.of(lengths).cu_seqlens,
            lengths=lengths,
            num_valid_tokens=micro.num_valid_tokens,
            num_documents=micro.num_documents,
            is_padding=None if is_padding is None else own(is_padding, True),
            num_padding_tokens=micro.num_padding_tokens + num_padding,
            token_indices=indices.unsqueeze(0),
            later=[LaterTokens(own(ids), own(labels, IGNORE_INDEX)) for ids, labels in micro.later],
            extra={name: own(values) for name, values in micro.extra.items()},
            images=micro.images,
        )
        return SplitSample(part, plans)

    def _plan(self, lengths: tuple[int, ...]) -> ContextPlans:
        options = self._options
        if options.cut == "auto":
            cut = choose_cut(lengths, self._num_ranks, self._layers)
        else:
            cut = cut_tokens(lengths, self._num_ranks, options.cut)
        pieces = TokenPieces.of(lengths, cut)
        movement = make_movement(options.movement, self._num_ranks, options.windows)
        plans = ByWindow(
            lambda window: make_plan(pieces, movement, self._rank, window), () if self._gathers_keys else self._layers
        )
        gatherings = ByWindow(
            lambda window: make_key_gathering(pieces, self._rank, window), self._layers if self._gathers_keys else ()
        )
        return ContextPlans(cut, pieces, plans, gatherings)
