"""What a decoder layer is made of, chosen by its number: which attention and which feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from internlm.model.modules.attention import Attention
from internlm.model.modules.feed_forward import FeedForward
from internlm.model.roles import Role

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture

SubBlock = Callable[["Architecture", int], nn.Module]
"""Builds a part of a layer from the architecture and the layer's number, under `torch.device("meta")`."""


def standard_attention(architecture: Architecture, layer: int) -> nn.Module:
    """Grouped-query softmax attention, with the layer's window."""
    return Attention(architecture, layer)


def standard_feed_forward(architecture: Architecture, layer: int) -> nn.Module:
    """A gated feed-forward."""
    return FeedForward(architecture)


@dataclass(frozen=True)
class LayerKind:
    """The parts of a decoder layer.

    Attributes:
        name: in errors, and where models are compared: two kinds of one name compute the same function.
        attention: builds a module called as `attention(x, rotary, varlen, cache)`, `[B, S, h]` -> `[B, S, h]`.
        feed_forward: builds a module called as `feed_forward(x)`, `[B, S, h]` -> `[B, S, h]`.
        roles: roles of its weights, by glob pattern below `layers.N.`; they come after the decoder's own patterns, so
            they win.
    """

    name: str
    attention: SubBlock = standard_attention
    feed_forward: SubBlock = standard_feed_forward
    roles: Mapping[str, Role] = field(default_factory=dict)


STANDARD = LayerKind("standard")
"""The kind of every layer that `Architecture.layer_kinds` does not name."""
