"""How likely given tokens are: one forward pass without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from internlm.apis.engine import GenerativeModel, Logprob, logprob_of
from internlm.utils.errors import ConfigError

LOGITS_AT_ONCE = 1 << 24
"""Logits in memory: 64 MiB in fp32."""


@torch.inference_mode()
def score_tokens(
    model: GenerativeModel, ids: Sequence[int], num_top: int = 0, num_tokens: int | None = None
) -> list[Logprob]:
    """How likely each token of a text but the first is, given those before it.

    Args:
        model: in evaluation mode.
        ids: N tokens, at least one.
        num_top, num_tokens: see `logprob_of`.

    Returns:
        N - 1 results, of the tokens 1 to N - 1.

    Raises:
        ConfigError: there is no token.
    """
    if not ids:
        raise ConfigError("a text to score must have a token")
    if len(ids) == 1:
        return []
    assert isinstance(model, nn.Module)
    device = next(model.parameters()).device
    inputs = torch.tensor([list(ids[:-1])], device=device)
    hidden = model(inputs, torch.arange(len(ids) - 1, device=device)[None])[0]
    found: list[Logprob] = []
    start, rows = 0, 1
    while start < len(hidden):
        logprobs = model.logits(hidden[start : start + rows]).float().log_softmax(dim=-1)
        found += [logprob_of(id, row, num_top, num_tokens) for id, row in zip(ids[start + 1 :], logprobs, strict=False)]
        start += len(logprobs)
        rows = max(1, LOGITS_AT_ONCE // logprobs.shape[1])
    return found
