"""Translates the keys of InternEvo's expert layers that this package does not have to those of the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from internlm.utils.errors import CheckpointError

_CAPACITY = {
    "capacity_factor": (None,),
    "eval_capacity_factor": (None,),
    "min_capacity": (None,),
    "drop_tokens": (False,),
    "drop_and_pad": (False,),
    "drop_policy": ("probs",),
    "use_rts": (False,),
    "noisy_gate_policy": (None, "None"),
}
"""Keys of a capacity and of noise, with the values that switch them off."""


def expert_keys(tree: dict[str, Any], section: dict[str, Any]) -> Iterator[str]:
    """Rewrite the keys of a mixture of experts, in place.

    The kinds of layers with and without a capacity have the same weights, so all are imported as "Dropless".

    Args:
        tree: the config of the run. The first versions have the layers' keys in a section `moe` of it.
        section: its model section.

    Yields:
        A notice for each key that was dropped or changed.

    Raises:
        CheckpointError: the layers are those of megablocks, whose weights have other forms.
    """
    moe_type = section.get("moe_type", "GShard")
    if moe_type.startswith("MegaBlock"):
        raise CheckpointError(
            f"model.moe_type = {moe_type!r}: the weights of megablocks' layers cannot be imported; supported: "
            "Dropless, GShard"
        )
    older = tree.get("moe")
    keys = {**(older if isinstance(older, dict) else {}), **(section.get("moe_layer_kwargs") or {})}
    section["moe_type"] = "Dropless"
    if moe_type != "Dropless":
        yield (
            f"model.moe_type = 'Dropless': the weights of {moe_type} are the same; its capacity, which drops tokens, "
            "is not supported"
        )
        if int(section.get("top_k", 1)) == 1:
            keys["normalize_expert_weights"] = False
            yield (
                f"model.moe_layer_kwargs.normalize_expert_weights = False: with top_k = 1, {moe_type} does not "
                "normalize the weight of the expert"
            )
    for name, off in _CAPACITY.items():
        if name in keys and keys.pop(name) not in off:
            yield f"model.moe_layer_kwargs.{name} is dropped: capacity, dropping and noise of experts are not supported"
    section["moe_layer_kwargs"] = keys
