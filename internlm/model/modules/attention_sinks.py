"""The learned logits of attention sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from internlm.model.initialization import set_initializer

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


class AttentionSinks(nn.Module):
    """One logit for each query head; see `ops/attention/sink_attention.py`.

    Attributes:
        weight: `[H]`, of this rank's heads.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.weight = nn.Parameter(torch.empty(a.num_heads, dtype=a.dtype))
        set_initializer(self.weight, a.init.initializer(a.init.attention_other))
