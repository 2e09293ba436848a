"""Rules on the capacity of experts."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config

_SECTION = "model.moe_layer_kwargs"


def capacity(config: Config, world_size: int) -> Iterator[Problem]:
    """Keys of a capacity need one, and belong to one kind of layer each."""
    model, keys = config.model, config.model.moe_layer_kwargs
    if model.num_experts <= 1:
        return
    limits = {
        "eval_capacity_factor": keys.eval_capacity_factor,
        "min_capacity": keys.min_capacity,
        "drop_tokens": keys.drop_tokens or None,
        "drop_and_pad": keys.drop_and_pad or None,
        "drop_policy": keys.drop_policy if keys.drop_policy != "probs" else None,
    }
    if model.moe_type == "Dropless" and keys.capacity_factor is None:
        for name, value in limits.items():
            if value is not None:
                yield Problem(
                    (f"{_SECTION}.{name}", f"{_SECTION}.capacity_factor"),
                    f"{_SECTION}.{name} = {value!r}: experts of moe_type 'Dropless' have no capacity without "
                    f"{_SECTION}.capacity_factor; give it, such as 1.0",
                )
    elif model.moe_type in ("MegaBlock-Dropless", "MegaBlock-D"):
        for name, value in {"capacity_factor": keys.capacity_factor, **limits}.items():
            if value is not None:
                yield Problem(
                    (f"{_SECTION}.{name}", "model.moe_type"),
                    f"{_SECTION}.{name} = {value!r}: model.moe_type = {model.moe_type!r} drops no token; choose "
                    "'Dropless', 'GShard' or 'MegaBlock'",
                )
    elif model.moe_type != "Dropless" and limits["drop_policy"] is not None:
        yield Problem(
            (f"{_SECTION}.drop_policy", "model.moe_type"),
            f"{_SECTION}.drop_policy = {keys.drop_policy!r} is for moe_type 'Dropless'; {model.moe_type} has an order "
            "of its own",
        )
