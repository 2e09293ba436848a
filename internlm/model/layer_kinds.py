"""Kinds of decoder layers: the attention and feed-forward modules of a layer, chosen by layer number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from internlm.model.modules.attention import Attention
from internlm.model.modules.feed_forward import FeedForward
from internlm.model.modules.latent_attention import LatentAttention
from internlm.model.moe.feed_forward import MoeFeedForward
from internlm.model.moe.settings import ExpertSettings
from internlm.model.roles import Role

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture

SubBlock = Callable[["Architecture", int], nn.Module]
"""(architecture, layer number) -> attention or feed-forward module; called under `torch.device("meta")`."""


def standard_attention(architecture: Architecture, layer: int) -> nn.Module:
    """Grouped-query or latent softmax attention, as the architecture has it, with the layer's window."""
    return Attention(architecture, layer) if architecture.latent is None else LatentAttention(architecture, layer)


def standard_feed_forward(architecture: Architecture, layer: int) -> nn.Module:
    """Gated feed-forward network."""
    return FeedForward(architecture)


@dataclass(frozen=True)
class LayerKind:
    """The modules of a decoder layer.

    Attributes:
        name: for errors, and to compare models: kinds with equal names must compute the same function.
        attention: builds a module that is called as `attention(x, rotary, varlen, cache)`, `[B, S, h]` -> `[B, S, h]`.
        feed_forward: builds a module that is called as `feed_forward(x)`, `[B, S, h]` -> `[B, S, h]`.
        roles: roles of its weights, by glob pattern below `layers.N.`; they override the decoder's own patterns.
    """

    name: str
    attention: SubBlock = field(default=standard_attention, compare=False)
    feed_forward: SubBlock = field(default=standard_feed_forward, compare=False)
    roles: Mapping[str, Role] = field(default_factory=dict, compare=False)


def expert_layers(settings: ExpertSettings, num_layers: int) -> dict[int, LayerKind]:
    """The kinds of the layers with experts."""

    def feed_forward(architecture: Architecture, layer: int) -> nn.Module:
        return MoeFeedForward(architecture, settings, layer)

    kind = LayerKind("experts", feed_forward=feed_forward)
    return dict.fromkeys(settings.layers(num_layers), kind)


STANDARD = LayerKind("standard")
"""The kind of every layer that is not in `Architecture.layer_kinds`."""
