"""The members of a blend: sources and groups with their weights and ends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from internlm.data.permutation import derive_key
from internlm.data.sources.blend_order import GroupShare, SourceShare, to_fraction
from internlm.data.sources.sample_stream import SampleStream
from internlm.utils.errors import ConfigError

Weight = float | Sequence[tuple[int, float]]
"""A weight, or (tokens, weight) in ascending order: each weight from that many tokens of the blend on."""
OnEnd = Literal["stop", "repeat", "drop"]


@dataclass(frozen=True)
class BlendSource:
    """A stream in a blend.

    Attributes:
        name: unique in the blend; a resumed run recognizes the source by it.
        stream: of its samples.
        weight: see `Weight`; weights need not add up to 1.
        epochs_max: epochs after which the source ends; needs a stream with `samples_per_epoch`. None: it never does.
        on_end: "stop" ends the blend when the source would be read after its end, "drop" continues with the other
            sources, whose weights keep their proportions. "repeat" is for a source without an end.
    """

    name: str
    stream: SampleStream
    weight: Weight
    epochs_max: float | None = None
    on_end: OnEnd = "repeat"


@dataclass(frozen=True)
class BlendGroup:
    """Sources that share a weight in proportion to their own.

    Attributes:
        weight: of all together; see `Weight`.
        members: sources and groups.
    """

    weight: Weight
    members: Sequence[BlendSource | BlendGroup]


def source_seed(seed: int, name: str) -> int:
    """The seed of the order of a source: of its name alone, so that other sources do not change its order."""
    return derive_key(seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def sources_of(members: Sequence[BlendSource | BlendGroup]) -> Iterator[BlendSource]:
    """All sources, also those in groups."""
    for member in members:
        if isinstance(member, BlendSource):
            yield member
        else:
            yield from sources_of(member.members)


def share_of(member: BlendSource | BlendGroup, tokens_per_sample: int) -> SourceShare | GroupShare:
    """Weights and limits of a member in samples, instead of tokens and epochs.

    Raises:
        ConfigError: weights are negative or do not ascend, or the end of a source is ambiguous or unknown.
    """
    name = f"source '{member.name}'" if isinstance(member, BlendSource) else "a group"
    weights = _schedule(member.weight, tokens_per_sample, name)
    if isinstance(member, BlendGroup):
        return GroupShare(weights, tuple(share_of(each, tokens_per_sample) for each in member.members))
    if member.on_end == "repeat":
        if member.epochs_max is not None:
            raise ConfigError(f"{name} has epochs_max, so on_end must be 'stop' or 'drop', not 'repeat'")
        return SourceShare(member.name, weights)
    if member.epochs_max is None:
        raise ConfigError(f"{name} has on_end = '{member.on_end}', so it needs epochs_max")
    samples = member.stream.samples_per_epoch
    if samples is None:
        raise ConfigError(
            f"{name} has epochs_max = {member.epochs_max:g}, but the number of its samples is not known before they "
            "are read; leave epochs_max and on_end out"
        )
    limit = int(to_fraction(member.epochs_max) * samples)
    if limit < 1:
        raise ConfigError(
            f"{name} has epochs_max = {member.epochs_max:g} of {samples:,} samples, which is less than one sample; "
            "raise it, or remove the source"
        )
    return SourceShare(member.name, weights, limit, member.on_end)


def _schedule(weight: Weight, tokens_per_sample: int, name: str) -> tuple[tuple[int, Fraction], ...]:
    """(first sample, weight) of a weight: each is in effect from the first sample before which its tokens were read.

    Raises:
        ConfigError: a weight is negative, or tokens do not ascend from 0.
    """
    steps = [(0, weight)] if isinstance(weight, float | int) else list(weight)
    tokens = [first for first, _ in steps]
    if not steps or tokens[0] != 0 or any(first >= second for first, second in pairwise(tokens)):
        raise ConfigError(f"{name}: the tokens of its weights must ascend, the first from 0: {weight}")
    if any(value < 0 for _, value in steps):
        raise ConfigError(f"{name}: its weights must be at least 0: {weight}")
    by_sample = {-(-int(first) // tokens_per_sample): to_fraction(value) for first, value in steps}
    return tuple(by_sample.items())
