"""The capacity of experts: its defaults, and notices on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from internlm.config.schema import Config, ModelConfig

_SECTION = "model.moe_layer_kwargs"


def expert_capacity(model: ModelConfig) -> tuple[float, float, int] | None:
    """Capacity factor of experts in training and in evaluation, and their least capacity; None: no limit."""
    keys, kind = model.moe_layer_kwargs, model.moe_type
    has_limit = kind in ("GShard", "MegaBlock") or (kind == "Dropless" and keys.capacity_factor is not None)
    if not has_limit or keys.drop_tokens is False:
        return None
    factor = 1.0 if keys.capacity_factor is None else keys.capacity_factor
    # In InternEvo, GShard alone has a factor for evaluation; its default is not that of training.
    in_evaluation, least = (1.0, 4) if kind == "GShard" else (factor, 0)
    return (
        factor,
        in_evaluation if keys.eval_capacity_factor is None else keys.eval_capacity_factor,
        least if keys.min_capacity is None else keys.min_capacity,
    )


def capacity_notices(config: Config, given: Callable[[str], Any]) -> Iterator[str]:
    """What is dropped, and keys without effect; one line each.

    Args:
        config: a valid config of a mixture.
        given: path -> the value that the user gave for it, or None.
    """
    model, keys = config.model, config.model.moe_layer_kwargs
    capacity = expert_capacity(model)
    if capacity is not None:
        factor, _, least = capacity
        kept = f"{factor} * top_k / num_experts of the tokens of a sample" + (f", {least} or more" if least else "")
        yield (
            f"model.moe_type = {model.moe_type!r}: an expert takes {kept}; choices beyond this capacity are dropped "
            f"(moe/dropped in the metrics). {_SECTION}.drop_tokens = False drops none"
        )
    elif keys.drop_tokens is False:
        paths = [f"{_SECTION}.{name}" for name in ("capacity_factor", "eval_capacity_factor", "min_capacity")]
        unused = [path for path in paths if given(path) is not None]
        if unused:
            yield f"no effect: {', '.join(unused)} ({_SECTION}.drop_tokens = False)"
    is_plain_gshard = model.moe_type == "GShard" and model.top_k <= 2 and not keys.use_fused_gating
    if given(f"{_SECTION}.use_fused_gating") is not None and (model.moe_type != "GShard" or model.top_k > 2):
        yield (
            f"no effect: {_SECTION}.use_fused_gating = {keys.use_fused_gating} (it is for moe_type 'GShard' with top_k "
            "= 1 or 2)"
        )
    if given(f"{_SECTION}.use_rts") is not None and not (is_plain_gshard and model.top_k == 1 and capacity):
        yield (
            f"no effect: {_SECTION}.use_rts = {keys.use_rts} (it is for moe_type 'GShard' with top_k = 1, a capacity "
            "and use_fused_gating = False)"
        )
    if keys.noisy_gate_policy == "RSample" and is_plain_gshard and model.top_k == 2:
        yield (
            f"no effect: {_SECTION}.noisy_gate_policy = 'RSample' (with use_fused_gating = False and top_k = 2, the "
            "second expert of a token has Gumbel noise anyway, the first none)"
        )
