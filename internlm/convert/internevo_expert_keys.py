"""Translates the keys of InternEvo's expert layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from internlm.utils.errors import CheckpointError


def expert_keys(tree: dict[str, Any], section: dict[str, Any]) -> Iterator[str]:
    """Rewrite the keys of a mixture of experts, in place.

    Args:
        tree: the config of the run. The first versions have the layers' keys in a section `moe` of it.
        section: its model section.

    Yields:
        A notice for each key that was added.

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
    section["moe_type"] = moe_type
    if older is not None and moe_type == "GShard" and "use_fused_gating" not in keys:
        keys["use_fused_gating"] = False
        yield "model.moe_layer_kwargs.use_fused_gating = False: versions with a section 'moe' have no such gating"
    section["moe_layer_kwargs"] = keys
