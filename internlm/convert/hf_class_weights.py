"""Weights of `model_type = "hf"`: names are those that the class has in memory, in our checkpoints too."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.tensor_files import MODEL_PREFIX, TensorReader
from internlm.checkpoint.weight_source import LazyTensor, finite
from internlm.config.schema import Config
from internlm.convert.hf_class_conversions import conversions_of
from internlm.convert.hf_folder import HfFolder
from internlm.convert.redundant import is_buffer, tied_difference
from internlm.model.hf_class.model import HfClassModel
from internlm.utils.errors import CheckpointError


class HfClassWeights:
    """The weights of a folder, in the form that the class has in memory: a `WeightSource`.

    Args:
        folder: source of the weights.
        model: that reads them; a second copy of a tied head in the folder is dropped.

    Raises:
        CheckpointError: the copy of a tied head differs from its embedding.
    """

    def __init__(self, folder: HfFolder, model: HfClassModel) -> None:
        self.folder = folder
        found = [name for name in folder.entries if not is_buffer(name)]
        for head, embedding in model.tied_names.items():
            if head in found and embedding in found:
                difference = tied_difference(folder.read(head), folder.read(embedding))
                if difference is not None:
                    raise CheckpointError(f"'{folder.path}' ties '{head}' to '{embedding}', but it {difference}")
                found.remove(head)
        shapes = {name: folder.entries[name].shape for name in found}
        self._converted = conversions_of(model.class_name, model.hf_config, shapes, model.all_names)
        sources = {name for conversion, _ in self._converted.values() for name, _ in conversion.sources}
        self._shapes = {name: shape for name, shape in shapes.items() if name not in sources}
        self._shapes |= {name: shape for name, (_, shape) in self._converted.items()}

    def names(self) -> Collection[str]:
        """Names of all weights of the folder but those of buffers and of a tied head."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """Read a full weight; one that is converted, such as the experts of a layer, from all that it consists of."""
        if name not in self._converted:
            return self.folder.read(name)
        conversion, _ = self._converted[name]
        return conversion.run(self.folder.read)[name]


def exported_tensors(reader: TensorReader, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """The weights of a checkpoint by their names, read one at a time.

    Args:
        reader: of the checkpoint.
        dtype: of the files; None: that of the checkpoint.
    """

    def read(name: str) -> Tensor:
        return finite(reader.read(name), name, f"'{reader.path}'", dtype)

    return {
        name: LazyTensor(
            tuple(reader.entries[f"{MODEL_PREFIX}{name}"].shape),
            dtype or reader.entries[f"{MODEL_PREFIX}{name}"].dtype,
            partial(read, name),
        )
        for name in reader.names()
    }


def exported_config(config: Config) -> dict[str, Any]:
    """The config.json of the class that a run trained."""
    described = config.model.hf_class
    assert described is not None
    name = described["model_class"].rpartition(".")[2]
    return {**described["config"], "architectures": [name], "dtype": config.model.dtype.removeprefix("torch.")}
