"""Parameter groups by name pattern: weight decay, a factor on the learning rate, and frozen weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.moe.router import routers_of
from internlm.utils.errors import ConfigError, nearest


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose global names match a pattern; of several matching groups the last one applies.

    Attributes:
        match: glob pattern over global names, such as "*.attention_norm.*".
        weight_decay: None keeps the optimizer's.
        lr_factor: factor on the learning rate.
        freeze: these parameters are not trained: no gradient, no optimizer state.
    """

    match: str
    weight_decay: float | None = None
    lr_factor: float = 1.0
    freeze: bool = False


@dataclass(frozen=True)
class GroupOptions:
    """What distinguishes the update of one parameter from that of others.

    Attributes:
        weight_decay: decoupled weight decay.
        lr_factor: factor on the learning rate.
    """

    weight_decay: float
    lr_factor: float = 1.0


def group_of(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """The group that applies to a parameter: the last one whose pattern matches its global name."""
    return next((group for group in reversed(groups) if fnmatchcase(name, group.match)), None)


def is_frozen(name: str, groups: Sequence[ParameterGroup]) -> bool:
    """Whether the group that applies to a parameter freezes it."""
    group = group_of(name, groups)
    return group is not None and group.freeze


def options_of(
    parameter: nn.Parameter, groups: Sequence[ParameterGroup], weight_decay: float, *, decay_all: bool
) -> GroupOptions:
    """The update options of a parameter.

    Args:
        parameter: after `parallelize`.
        groups: see `ParameterGroup`.
        weight_decay: default for parameters without a group, or whose group does not set it.
        decay_all: whether the default applies to one-dimensional parameters (norms, biases) too.
    """
    default = weight_decay if decay_all or parameter.ndim > 1 else 0.0
    group = group_of(shard_spec_of(parameter).name, groups)
    if group is None:
        return GroupOptions(default)
    return GroupOptions(default if group.weight_decay is None else group.weight_decay, group.lr_factor)


def freeze_parameters(chunks: Sequence[nn.Module], groups: Sequence[ParameterGroup]) -> None:
    """Clear `requires_grad` of the parameters of frozen groups; before FSDP is applied and the optimizer is built.

    A selection bias, which never requires a gradient, is frozen by its router.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            if is_frozen(shard_spec_of(parameter).name, groups):
                parameter.requires_grad_(False)
    for router in routers_of(chunks):
        bias = router.selection_bias
        router.has_frozen_bias = bias is not None and is_frozen(shard_spec_of(bias).name, groups)


def check_frozen(trained: Iterable[nn.Parameter], groups: Sequence[ParameterGroup]) -> None:
    """Refuse to train parameters of frozen groups.

    Raises:
        ValueError: `freeze_parameters` was not called before.
    """
    for parameter in trained:
        name = shard_spec_of(parameter).name
        group = group_of(name, groups)
        if group is not None and group.freeze:
            raise ValueError(
                f"'{name}' requires a gradient, but the group '{group.match}' freezes it: call freeze_parameters first"
            )


def check_groups(groups: Sequence[ParameterGroup], names: Collection[str]) -> None:
    """Compare the groups with the parameters of the whole model.

    Args:
        groups: in the order of the config.
        names: global names of all parameters.

    Raises:
        ConfigError: a group applies to no parameter, or all parameters are frozen.
    """
    for number, group in enumerate(groups):
        if not any(fnmatchcase(name, group.match) for name in names):
            raise ConfigError(
                f"optimizer.groups[{number}].match = {group.match!r} matches no parameter; names are such as "
                f"'{min(names)}'.{nearest(group.match.replace('*', ''), names)}"
            )
    applied = {id(group_of(name, groups)) for name in names}
    for number, group in enumerate(groups):
        if id(group) not in applied:
            raise ConfigError(
                f"optimizer.groups[{number}].match = {group.match!r} has no effect: later groups match all of its "
                "parameters, and the last group that matches applies alone; put the more general pattern first"
            )
    if names and all(is_frozen(name, groups) for name in names):
        raise ConfigError("optimizer.groups: every parameter of the model is frozen, so there is nothing to train")
