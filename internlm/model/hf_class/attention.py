"""Attention of Hugging Face classes by this project's kernels: over packed documents, and between ranks.

transformers looks attention up by name and calls `attend` with queries, keys and values. Each attention module has an
`InnerAttention` as a child, which parallel modes replace as they do in a `Decoder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internlm.model.hf_class.probe import PROBE_NAME, AttentionCall, note_call
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.utils.errors import ConfigError

NAME = "internlm"
"""Name of `attend` in transformers' registry."""


@dataclass
class Documents:
    """The documents of the micro-batch that a model computes; shared by its modules.

    Attributes:
        varlen: of a packed row; None: each row is one document.
    """

    varlen: VarlenMetadata | None = None


def register_attention() -> None:
    """Make `attend` and `note_call` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    AttentionInterface.register(PROBE_NAME, note_call)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: an attention module with an `inner_attention` and `documents`.
        query, key, value: `[B, H, S, D]` and `[B, K, S, D]`; key-value heads are not repeated.
        attention_mask: must be None: documents take its place.
        dropout, scaling, sliding_window, softcap: as when the model was probed.
        s_aux: `[H]`, the logits of attention sinks.

    Returns:
        `[B, S, H, D]`, and no attention weights.
    """
    if attention_mask is not None:
        raise ConfigError(f"{type(module).__name__} needs a mask of its own, which packed documents cannot have")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = module.inner_attention(q, k, v, module.documents.varlen, s_aux)  # type: ignore[operator, union-attr]
    return out.contiguous(), None


def install_attention(base: nn.Module, calls: dict[str, AttentionCall], documents: Documents, backend: str) -> None:
    """Give every module that calls attention what `attend` needs.

    Args:
        base: the model.
        calls: from `attention_calls`.
        documents: of the model.
        backend: `model.attention_backend`, or "off" for `use_flash_attn = False`.
    """
    for name, call in calls.items():
        module = base.get_submodule(name)
        arguments = (call.window, "auto" if backend == "off" else backend, backend != "off", call.scale)
        inner = InnerAttention(*arguments) if call.softcap is None else CappedAttention(*arguments, cap=call.softcap)
        module.inner_attention = inner
        module.heads = call.heads  # type: ignore[assignment]
        module.documents = documents  # type: ignore[assignment]


class CappedAttention(InnerAttention):
    """Attention whose scores s become c tanh(s / c), document by document: no kernel computes it.

    Source: Gemma 2, https://arxiv.org/abs/2408.00118, section 2.

    Args:
        cap: c.
    """

    def __init__(self, *arguments: Any, cap: float) -> None:
        super().__init__(*arguments)
        self.cap = cap

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None, sinks: Tensor | None = None
    ) -> Tensor:
        """As `InnerAttention.forward`; memory is that of the scores of the longest document."""
        if sinks is not None:
            raise ConfigError("attention with capped scores and sinks is not supported")
        lengths = [q.shape[1]] if varlen is None else list(varlen.lengths)
        parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([self._document(*part) for part in parts if part[0].shape[1]], dim=1)

    def forward_with_lse(self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None) -> tuple[Tensor, Tensor]:
        raise ConfigError("parallel.context.size above 1: attention with capped scores cannot be combined from parts")

    def _document(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One document, `[B, S, H, D]` and `[B, S, K, D]`."""
        repeats = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        scores = self.cap * torch.tanh(scores / self.cap)
        tokens = torch.arange(q.shape[1], device=q.device)
        distance = tokens[:, None] - tokens
        is_hidden = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        weights = scores.masked_fill(is_hidden, float("-inf")).float().softmax(-1).to(v.dtype)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)
