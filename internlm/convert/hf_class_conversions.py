"""Weights that a class of transformers keeps in another form in memory than in files: the experts of a layer as one.

transformers describes both forms as data: patterns of names, and operations that are applied to the tensors that match.
They are applied here to the tensors of one result at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Conversion:
    """Tensors of a folder that become one or several weights of a class.

    Attributes:
        first: name of the first of these weights.
        converter: transformers' operations; None: there is one tensor, which only has another name.
        config: of the class.
        sources: name in the folder, and the pattern that it matches.
    """

    first: str
    converter: Any
    config: Any
    sources: list[tuple[str, str]] = field(default_factory=list)

    def run(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The weights by name.

        Args:
            read: name in the folder -> tensor.
        """
        if self.converter is None:
            return {self.first: read(self.sources[0][0])}
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, read(name))
        converted = converter.convert(self.first, config=self.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in converted.items()}


def conversions_of(
    class_name: str, config: Any, shapes: Mapping[str, tuple[int, ...]], names: Collection[str]
) -> dict[str, tuple[Conversion, tuple[int, ...]]]:
    """How weights of a class follow from a folder: name -> conversion and shape.

    Args:
        class_name: of the model.
        config: of the class; one that transformers does not know has no conversions.
        shapes: of the tensors of the folder, by name.
        names: of the weights of the class. Tensors of the folder with these names are not converted.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if not type(config).__module__.startswith("transformers."):
        return {}
    transforms = get_checkpoint_conversion_mapping(class_name) or get_checkpoint_conversion_mapping(config.model_type)
    renamings = [each for each in transforms or () if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms or () if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    conversions: dict[str, Conversion] = {}
    # Operations stack tensors in the order of their numbers.
    for name in sorted(set(shapes) - set(names), key=dot_natural_key):
        new_name, pattern = rename_source_key(name, renamings, converters)
        if new_name in names:
            converter = None if pattern is None else by_pattern[pattern]
            conversion = conversions.setdefault(new_name, Conversion(new_name, converter, config))
            conversion.sources.append((name, pattern or name))
    return {
        name: (conversion, tuple(result.shape))
        for conversion in conversions.values()
        for name, result in conversion.run(lambda source: torch.empty(shapes[source], device="meta")).items()
    }
