"""Names and forms of expert weights in Hugging Face files.

Our weights hold all experts of a layer: `experts.w13` [E, 2f, h] (gate rows, then up rows) and `experts.w2` [E, h, f].
Most files have a tensor per expert and projection; transformers 5 has tensors like ours in memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.utils.errors import CheckpointError

_OURS = re.compile(r"layers\.(\d+)\.feed_forward\.experts\.(w13|w2)")


@dataclass(frozen=True)
class _Names:
    """The module of a layer's experts, and the projections of an expert in it."""

    module: str
    gate: str
    up: str
    down: str


_TRANSFORMERS = _Names("mlp.experts", "gate_proj", "up_proj", "down_proj")
_NAMES = {"mixtral": _Names("block_sparse_moe.experts", "w1", "w3", "w2")}
"""Layout -> its names; all others have transformers' names."""
_FUSED = {"w13": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj"}
_FUSED_NAME = re.compile(rf"model\.layers\.(\d+)\.({'|'.join(map(re.escape, _FUSED.values()))})")


def split_experts(name: str, tensor: Tensor, layout: str) -> dict[str, Tensor] | None:
    """Translate an expert weight to Hugging Face names; the results are views.

    Args:
        name: one of our names.
        tensor: the weight.
        layout: see `weight_names`.

    Returns:
        Hugging Face name -> tensor, expert by expert; None if `name` is of another weight.
    """
    match = _OURS.fullmatch(name)
    if match is None:
        return None
    prefix, ours = f"model.layers.{match[1]}.", match[2]
    if layout == "fused_experts":
        return {f"{prefix}{_FUSED[ours]}": tensor}
    names = _NAMES.get(layout, _TRANSFORMERS)
    projections = (names.gate, names.up) if ours == "w13" else (names.down,)
    return {
        f"{prefix}{names.module}.{expert}.{projection}.weight": rows
        for expert, weight in enumerate(tensor)
        for projection, rows in zip(projections, weight.chunk(len(projections)), strict=True)
    }


class ExpertStacks:
    """Joins the expert weights of Hugging Face files. `add` copies a weight, which the caller may free.

    Args:
        names: Hugging Face names of all weights that will be added; they determine the number of experts.
        layout: see `weight_names`.
    """

    def __init__(self, names: Iterable[str], layout: str) -> None:
        self._names = _NAMES.get(layout, _TRANSFORMERS)
        parts = "|".join((self._names.gate, self._names.up, self._names.down))
        self._single = re.compile(rf"model\.layers\.(\d+)\.{re.escape(self._names.module)}\.(\d+)\.({parts})\.weight")
        self._num_experts: dict[str, int] = {}
        for match in filter(None, map(self._single.fullmatch, names)):
            self._num_experts[match[1]] = max(self._num_experts.get(match[1], 0), int(match[2]) + 1)
        self._stacks: dict[str, Tensor] = {}
        self._missing: Counter[str] = Counter()

    def add(self, name: str, tensor: Tensor) -> bool:
        """Copy a weight into its stack.

        Returns:
            Whether the weight is one of experts.

        Raises:
            CheckpointError: its shape differs from that of other experts.
        """
        fused = _FUSED_NAME.fullmatch(name)
        if fused is not None:
            part = "w2" if fused[2] == _FUSED["w2"] else "w13"
            self._stacks[f"layers.{fused[1]}.feed_forward.experts.{part}"] = tensor
            return True
        single = self._single.fullmatch(name)
        if single is None:
            return False
        layer, expert, projection = single[1], int(single[2]), single[3]
        is_down, rows = projection == self._names.down, tensor.shape[0]
        ours = f"layers.{layer}.feed_forward.experts.{'w2' if is_down else 'w13'}"
        shape = (self._num_experts[layer], rows if is_down else 2 * rows, *tensor.shape[1:])
        if ours not in self._stacks:
            self._stacks[ours] = tensor.new_empty(shape)
            self._missing[ours] = shape[0] * (1 if is_down else 2)
        stack = self._stacks[ours]
        if stack.shape != shape:
            raise CheckpointError(f"'{name}' has shape {list(tensor.shape)}, unlike the weights of other experts")
        dtype = torch.promote_types(stack.dtype, tensor.dtype)
        if dtype != stack.dtype:
            stack = self._stacks[ours] = stack.to(dtype)
        first = rows if projection == self._names.up else 0
        stack[expert, first : first + rows].copy_(tensor)
        self._missing[ours] -= 1
        return True

    def tensors(self) -> dict[str, Tensor]:
        """The joined weights by our names.

        Raises:
            CheckpointError: the weight of an expert is missing.
        """
        incomplete = [
            f"'{name}': {count} weights of experts are missing" for name, count in self._missing.items() if count
        ]
        if incomplete:
            raise CheckpointError("; ".join(incomplete))
        return self._stacks
