"""Passes of a Hugging Face class without storage: how its modules call attention, and the FLOPs of its GEMMs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internlm.model.roles import HeadShape
from internlm.utils.errors import ConfigError

PROBE_NAME = "internlm-probe"
"""Name of `note_call` in transformers' registry."""

_TOKENS = 8


@dataclass(frozen=True)
class AttentionCall:
    """How a module calls attention: the same in every call.

    Attributes:
        heads: query heads, key-value heads, and channels of a query.
        value_dim: channels of a value.
        scale: of the scores.
        window: number of keys that a query attends to, itself included; None: no limit.
        softcap: c, where scores s become c tanh(s / c); None: they are s.
        has_sinks: whether each head has a logit of an attention sink.
        dropout: share of the attention weights that are dropped.
        is_causal: whether a token attends to earlier ones only.
    """

    heads: HeadShape
    value_dim: int
    scale: float | None
    window: int | None
    softcap: float | None
    has_sinks: bool
    dropout: float
    is_causal: bool


def note_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """In place of `attend`: append the call to `module.noted_calls`, and return a tensor of its shape."""
    call = AttentionCall(
        heads=HeadShape(query.shape[1], key.shape[1], query.shape[-1]),
        value_dim=value.shape[-1],
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
    probe, noted = _noting_copy(base)
    _run(probe, hidden_size, dtype, _TOKENS)
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


def gemm_flops_per_token(base: nn.Module, hidden_size: int, dtype: torch.dtype) -> float | None:
    """FLOPs of a forward pass for one token: those of all GEMMs but attention's, and of the experts that it chooses.

    Args:
        base, hidden_size, dtype: see `attention_calls`.

    Returns:
        None if twice the tokens do not have twice the FLOPs: something besides attention passes from token to token.
    """
    from torch.utils.flop_counter import FlopCounterMode  # It imports the compiler, which takes a second.

    counted = []
    for tokens in (_TOKENS, 2 * _TOKENS):
        probe, _ = _noting_copy(base)
        with FlopCounterMode(display=False) as counter:
            _run(probe, hidden_size, dtype, tokens)
        counted.append(counter.get_total_flops())
    return counted[0] / _TOKENS if counted[1] == 2 * counted[0] else None


def _noting_copy(base: nn.Module) -> tuple[nn.Module, dict[str, list[AttentionCall]]]:
    """(a copy on the meta device whose attention is `note_call`, the calls of each module by its name)."""
    probe = copy.deepcopy(base).to("meta").train()
    noted: dict[str, list[AttentionCall]] = {}
    for name, module in probe.named_modules():
        module.noted_calls = noted[name] = []
    probe.config._attn_implementation = PROBE_NAME  # type: ignore[union-attr]
    # The one implementation of experts whose shapes depend on no values, in every dtype.
    probe.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]
    return probe, noted


def _run(probe: nn.Module, hidden_size: int, dtype: torch.dtype, tokens: int) -> None:
    try:
        with torch.device("meta"), torch.no_grad():
            embedded = torch.empty(1, tokens, hidden_size, dtype=dtype)
            positions = torch.empty(1, tokens, dtype=torch.int64)
            probe(inputs_embeds=embedded, position_ids=positions, use_cache=False)
    except Exception as error:  # The code of any class runs here.
        raise ConfigError(
            f"{type(probe).__name__} cannot run from embedded tokens and positions: {type(error).__name__}: {error}"
        ) from error
