"""Names and forms of gpt-oss's weights that are unlike those of other families, in files and in memory.

All experts of a layer are in one tensor, whose last dimension is the output: `gate_up_proj` `[E, h, 2f]`, where gate
and up alternate, and `down_proj` `[E, f, h]`.
"""

from __future__ import annotations

import re

from torch import Tensor

_NAMES = {
    "attention.sinks.weight": "self_attn.sinks",
    "feed_forward.router.weight": "mlp.router.weight",
    "feed_forward.router.bias": "mlp.router.bias",
    "feed_forward.experts.w13": "mlp.experts.gate_up_proj",
    "feed_forward.experts.w13_bias": "mlp.experts.gate_up_proj_bias",
    "feed_forward.experts.w2": "mlp.experts.down_proj",
    "feed_forward.experts.w2_bias": "mlp.experts.down_proj_bias",
}
_THEIR_NAMES = {theirs: ours for ours, theirs in _NAMES.items()}
_OURS = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, _NAMES))})")
_THEIRS = re.compile(rf"model\.layers\.(\d+)\.({'|'.join(map(re.escape, _THEIR_NAMES))})")


def to_gpt_oss(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """Translate one of our weights; None if it has the name that it has in other families."""
    match = _OURS.fullmatch(name)
    if match is None:
        return None
    part = match[2].rpartition(".")[2]
    if part == "w13":
        tensor = tensor.unflatten(1, (2, -1)).permute(0, 3, 2, 1).flatten(2)
    elif part == "w13_bias":
        tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    elif part == "w2":
        tensor = tensor.transpose(1, 2).contiguous()
    return f"model.layers.{match[1]}.{_NAMES[match[2]]}", tensor


def from_gpt_oss(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """The inverse of `to_gpt_oss`."""
    match = _THEIRS.fullmatch(name)
    if match is None:
        return None
    part = match[2].rpartition(".")[2]
    if part == "gate_up_proj":
        tensor = tensor.unflatten(2, (-1, 2)).permute(0, 3, 2, 1).flatten(1, 2)
    elif part == "gate_up_proj_bias":
        tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
    elif part == "down_proj":
        tensor = tensor.transpose(1, 2).contiguous()
    return f"layers.{match[1]}.{_THEIR_NAMES[match[2]]}", tensor
