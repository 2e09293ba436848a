"""The layers of a model: the units of FSDP and of compilation."""

from __future__ import annotations

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ModuleLists and ModuleDicts of `model`, in order."""
    layers: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            layers.extend(child.children())
        else:
            layers.extend(layers_of(child))
    return layers
