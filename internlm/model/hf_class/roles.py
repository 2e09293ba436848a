"""Roles of the weights of a Hugging Face class, from the tensor-parallel plan that the class declares.

A plan maps patterns of module names to styles. Slices of attention and feed-forward that follow it give outputs whose
sum is that of the whole module, which is what roles mean. Where a block has a style without a counterpart, the whole
block is computed on every tensor rank.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from internlm.model.roles import Role

_COLUMN, _ROW = ("colwise",), ("rowwise",)
_PER_HEAD = ("replicated_with_grad_allreduce",)
_QUERIES, _KEY_VALUES = ("q_proj", "q_b_proj"), ("k_proj", "v_proj", "kv_b_proj")


@dataclass
class PlannedRoles:
    """Roles by module name, and what the plan leaves whole.

    Attributes:
        roles: module name -> role.
        whole_blocks: names of blocks with matrices that every tensor rank computes as a whole.
    """

    roles: dict[str, Role] = field(default_factory=dict)
    whole_blocks: list[str] = field(default_factory=list)


def roles_of_layers(
    base: nn.Module, layers: Mapping[int, nn.Module], plan: Mapping[str, str], attention: Collection[str]
) -> PlannedRoles:
    """The roles of all linear layers and head norms in the layers of a model.

    Args:
        base: the model without its head.
        layers: its layers, by number.
        plan: `base_model_tp_plan` of its config; empty: nothing is split.
        attention: names of the modules that call attention.
    """
    names = {module: name for name, module in base.named_modules()}
    result = PlannedRoles()
    for layer in layers.values():
        for block in _blocks(layer, names[layer], names):
            roles = _split_block(base, block, plan, is_attention=block in attention)
            linears = {name for name, module in _linears(base, block)}
            if roles is None:
                result.whole_blocks += [block] if linears else []
                roles = {}
            result.roles |= dict.fromkeys(linears, Role.LATENT) | roles
    return result


def _blocks(layer: nn.Module, name: str, names: Mapping[nn.Module, str]) -> list[str]:
    """The children of a layer with matrices, or the layer where it holds some itself."""
    return [names[child] for child in layer.children() if any(p.ndim > 1 for p in child.parameters())]


def _linears(base: nn.Module, block: str) -> list[tuple[str, nn.Module]]:
    root = base.get_submodule(block)
    inside = [(f"{block}.{name}" if name else block, module) for name, module in root.named_modules()]
    return [(name, module) for name, module in inside if type(module) is nn.Linear]


def _split_block(base: nn.Module, block: str, plan: Mapping[str, str], *, is_attention: bool) -> dict[str, Role] | None:
    """Roles of the modules of a block that the plan splits; None if it cannot be split as planned."""
    roles: dict[str, Role] = {}
    for name, module in base.get_submodule(block).named_modules(prefix=block):
        style = _style(name, plan)
        if style is None:
            if type(module) is nn.Linear and is_attention:
                return None
            continue
        if style in _COLUMN and type(module) is nn.Linear:
            role = _column_role(name) if is_attention else Role.COLUMN
        elif style in _ROW and type(module) is nn.Linear:
            role = Role.ATTENTION_OUT if is_attention else Role.ROW
        elif style in _PER_HEAD and is_attention:
            role = Role.PER_HEAD
        else:
            return None
        if role is None:
            return None
        roles[name] = role
    # Others are applied to split channels, so that each rank would have a part of their gradient only.
    if any(
        name.rpartition(".")[0] not in roles for name, _ in base.get_submodule(block).named_parameters(prefix=block)
    ):
        return None
    kinds = set(roles.values())
    has_both = bool(kinds & {Role.ROW, Role.ATTENTION_OUT}) and len(kinds) > 1
    return roles if has_both else None


def _column_role(name: str) -> Role | None:
    last = name.rpartition(".")[2]
    if last in _QUERIES:
        return Role.ATTENTION_Q
    return Role.ATTENTION_KV if last in _KEY_VALUES else None


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    return next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
