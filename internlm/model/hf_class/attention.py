"""Attention of Hugging Face classes by this project's kernels: over packed documents, and between ranks.

transformers looks attention up by name and calls `attend` with queries, keys and values. Each attention module has an
`InnerAttention` as a child, which parallel modes replace as they do in a `Decoder`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.roles import HeadShape
from internlm.utils.errors import ConfigError

NAME, PROBE_NAME = "internlm", "internlm-probe"
"""Names of `attend` and `note_call` in transformers' registry."""

_PROBE_TOKENS = 8


@dataclass
class Documents:
    """The documents of the micro-batch that a model computes; shared by its modules.

    Attributes:
        varlen: of a packed row; None: each row is one document.
    """

    varlen: VarlenMetadata | None = None


@dataclass(frozen=True)
class AttentionCall:
    """How a module calls attention: the same in every call.

    Attributes:
        heads: query heads, key-value heads, and channels of a query.
        scale: of the scores.
        window: number of keys that a query attends to, itself included; None: no limit.
        softcap: c, where scores s become c tanh(s / c); None: they are s.
        has_sinks: whether each head has a logit of an attention sink.
        dropout: share of the attention weights that are dropped.
        is_causal: whether a token attends to earlier ones only.
    """

    heads: HeadShape
    scale: float | None
    window: int | None
    softcap: float | None
    has_sinks: bool
    dropout: float
    is_causal: bool


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


def note_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """In place of `attend`: append the call to `module.noted_calls`, and return a tensor of its shape."""
    call = AttentionCall(
        heads=HeadShape(query.shape[1], key.shape[1], query.shape[-1]),
        scale=options.get("scaling"),
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        has_sinks=options.get("s_aux") is not None,
        dropout=options.get("dropout", 0.0),
        is_causal=getattr(module, "is_causal", True),
    )
    module.noted_calls.append(call)  # type: ignore[operator, union-attr]
    return value.new_empty(*query.transpose(1, 2).shape[:3], value.shape[-1]), None


def attention_calls(base: nn.Module, hidden_size: int, dtype: torch.dtype) -> dict[str, AttentionCall]:
    """How each module of a model calls attention, by its name; the model runs once without storage.

    Args:
        base: a model of transformers without a head.
        hidden_size: of its residual stream.
        dtype: of its residual stream.

    Raises:
        ConfigError: a module calls attention in a way that has no counterpart here, or the model cannot run so.
    """
    probe = copy.deepcopy(base).to("meta").train()
    noted: dict[str, list[AttentionCall]] = {}
    for name, module in probe.named_modules():
        module.noted_calls = noted[name] = []
    probe.config._attn_implementation = PROBE_NAME  # type: ignore[union-attr]
    # The one implementation of experts whose shapes depend on no values, in every dtype.
    probe.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]
    try:
        with torch.device("meta"), torch.no_grad():
            embedded = torch.empty(1, _PROBE_TOKENS, hidden_size, dtype=dtype)
            positions = torch.empty(1, _PROBE_TOKENS, dtype=torch.int64)
            probe(inputs_embeds=embedded, position_ids=positions, use_cache=False)
    except Exception as error:  # The code of any class runs here.
        raise ConfigError(
            f"{type(base).__name__} cannot run from embedded tokens and positions: {type(error).__name__}: {error}"
        ) from error
    found: dict[str, AttentionCall] = {}
    for name, made in noted.items():
        if not made:
            continue
        if len(set(made)) > 1:
            raise ConfigError(f"'{name}' of {type(base).__name__} calls attention in several ways: {made}")
        call = made[0]
        if call.dropout:
            raise ConfigError(
                f"'{name}' of {type(base).__name__} drops {call.dropout:.0%} of its attention weights, which no kernel "
                "here does; set its dropout to 0 in hf.cfg_extra_kwargs"
            )
        if not call.is_causal:
            raise ConfigError(f"'{name}' of {type(base).__name__} is not causal: only language models are trained")
        found[name] = call
    return found


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
