"""Weights of `model_type = "hf"`: a Hugging Face folder and our checkpoints use the same names."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.tensor_files import MODEL_PREFIX, TensorReader
from internlm.checkpoint.weight_source import LazyTensor, finite
from internlm.config.schema import Config
from internlm.convert.hf_folder import HfFolder
from internlm.convert.redundant import is_buffer, tied_difference
from internlm.utils.errors import CheckpointError


class HfClassWeights:
    """The weights of a folder under their own names: a `WeightSource`.

    Args:
        folder: source of the weights.
        names: of the weights of the whole model.
        tied: name of a head that is the embedding -> name of the embedding; a second copy in the folder is dropped.

    Raises:
        CheckpointError: the copy of a tied head differs from its embedding, or the class keeps weights in memory in
            another form than in this folder.
    """

    def __init__(self, folder: HfFolder, names: Collection[str], tied: dict[str, str]) -> None:
        self.folder = folder
        found = [name for name in folder.entries if not is_buffer(name)]
        for head, embedding in tied.items():
            if head in found and embedding in found:
                difference = tied_difference(folder.read(head), folder.read(embedding))
                if difference is not None:
                    raise CheckpointError(f"'{folder.path}' ties '{head}' to '{embedding}', but it {difference}")
                found.remove(head)
        missing = sorted(set(names) - set(found))
        if missing and any(".experts." in name for name in missing):
            raise CheckpointError(
                f"'{folder.path}' lacks '{missing[0]}': this class keeps experts in memory in another form than in its "
                "files. Write them in that form first: load the folder with transformers, then "
                "model.save_pretrained(FOLDER, save_original_format=False)"
            )
        self._names = found

    def names(self) -> Collection[str]:
        """All names of the folder but those of buffers and of a tied head."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self.folder.entries[name].shape

    def read(self, name: str) -> Tensor:
        """Read a full weight."""
        return self.folder.read(name)


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
