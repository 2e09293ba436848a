"""Meta's own llama files: params.json and one consolidated.NN.pth a tensor-parallel rank.

The names are ours but for the prefix; rotary pairs are adjacent rows; a tensor is cut over the files by its kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from internlm.convert.hf_folder import meta_weights, read_json
from internlm.convert.lazy import grouped_readers
from internlm.convert.redundant import buffer_difference, is_buffer
from internlm.convert.torch_files import TorchFile
from internlm.model.architecture import Architecture
from internlm.model.huggingface.weight_names import from_plain, group_of, plain_shapes
from internlm.model.modules.rotary import RopeSettings
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath

_FILE = re.compile(r"consolidated\.\d\d\.pth")
_ROWS_SPLIT = (".wo.weight", ".w2.weight")
"""Suffixes of the names of matrices that are split by columns (inputs); others are split by rows."""


class MetaLlamaWeights:
    """The weights of such a folder under the names and in the form of a model: a `WeightSource`.

    Args:
        path: the folder, on a local disk.
        architecture: of the model that wants them; it may fuse and interleave otherwise than the files.

    Names of the files that the model has no place for are among `names()` as they are; weights of which a part is
    missing are not.

    Raises:
        CheckpointError: the folder does not exist or has no weights, params.json or a shape does not fit the model, or
            the frequencies in the files are not those of params.json.
    """

    def __init__(self, path: StoragePath, architecture: Architecture) -> None:
        if not path.is_folder():
            raise CheckpointError(f"there is no folder of llama weights at '{path}'")
        names = [name for name in path.names() if _FILE.fullmatch(name)]
        if not names:
            raise CheckpointError(f"'{path}' has no weights: no file consolidated.00.pth is there")
        self.path = path
        self._architecture = architecture
        base = _check_params(path, architecture)
        self._files = [TorchFile(path / name) for name in names]
        shards = [file.entries() for file in self._files]
        rope = RopeSettings(head_dim=architecture.head_dim, base=base)
        for name in filter(is_buffer, shards[0]):
            difference = buffer_difference(name, self._files[0].read(name), rope)
            if difference is not None:
                raise CheckpointError(f"'{path}' holds another model than its params.json says: {difference}")
        for file in self._files:
            file.close()
        found = {name: entry for name, entry in shards[0].items() if not is_buffer(name)}
        for file, shard in zip(self._files, shards, strict=True):
            absent = [name for name in found if name not in shard]
            if absent:
                raise CheckpointError(f"'{file.path}' lacks '{absent[0]}', which '{names[0]}' has")
        wanted = meta_weights(architecture)
        plain = plain_shapes(wanted, architecture)
        self._dims = {
            name: _split_dim(name, found[name][0], tuple(tensor.shape), len(names), path)
            for name, tensor in plain.items()
            if name in found
        }
        self._unexpected = [name for name in found if name not in plain]
        groups: dict[str, list[str]] = {}
        for name in plain:
            groups.setdefault(group_of(name), []).append(name)
        present = [group for group in groups.values() if all(name in found for name in group)]
        whole = {group_of(group[0]) for group in present}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items() if group_of(name) in whole}
        ours: dict[str, list[str]] = {}
        for name in self._shapes:
            ours.setdefault(group_of(name), []).append(name)
        self._readers = grouped_readers(
            lambda number: self._translate(present[number]), [ours[group_of(group[0])] for group in present]
        )

    def names(self) -> Collection[str]:
        """The model's names of all weights in the files, and the files' names of tensors unknown to the model."""
        return [*self._shapes, *self._unexpected]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight; of an unknown tensor, its shape in the first file."""
        return self._shapes[name] if name in self._shapes else self._files[0].entries()[name][0]

    def read(self, name: str) -> Tensor:
        """A full weight."""
        return self._readers[name]() if name in self._shapes else self._files[0].read(name)

    def _translate(self, names: list[str]) -> dict[str, Tensor]:
        return from_plain({name: self._read_whole(name) for name in names}, self._architecture, interleaved=True)

    def _read_whole(self, name: str) -> Tensor:
        dim = self._dims[name]
        if dim is None:
            return self._files[0].read(name)
        return torch.cat([file.read(name) for file in self._files], dim=dim)


def _split_dim(
    name: str, shard: tuple[int, ...], whole: tuple[int, ...], num_files: int, path: StoragePath
) -> int | None:
    """The dimension by which a tensor is split; None: every file has the full tensor.

    Raises:
        CheckpointError: the files do not make up the shape that the model wants.
    """
    if len(whole) == 1 and shard == whole:
        return None
    dims = [1] if name.endswith(_ROWS_SPLIT) else [0]
    if name == "tok_embeddings.weight":
        # Cut over the hidden size in the first two generations, over the vocabulary in the third.
        dims = [0, 1]
    for dim in dims:
        if len(shard) > dim and (*shard[:dim], shard[dim] * num_files, *shard[dim + 1 :]) == whole:
            return dim
    raise CheckpointError(
        f"the weights in '{path}' do not fit this model: '{name}' has shape {list(shard)} in each of {num_files} "
        f"file(s), the model wants {list(whole)}"
    )


def trained_keys(path: StoragePath, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What params.json says of the function of the model, as keys of the `model` section.

    Args:
        path: the folder.
        ours: the `model` section of the run, from which comes what params.json leaves open: by how much scaled rotary
            frequencies are scaled.

    Raises:
        CheckpointError: there is no params.json, or it is damaged.
    """
    values = _read_params(path)
    keys: dict[str, Any] = {"rope_base": _rope_base(path, values), "use_dynamic_ntk_rope": False}
    if values.get("norm_eps") is not None:
        keys["layer_norm_epsilon"] = values["norm_eps"]
    scaling = ours.get("rope_scaling")
    if not values.get("use_scaled_rope"):
        keys["rope_scaling"] = None
    elif scaling is None or scaling["type"] != "llama3":
        keys["rope_scaling"] = _SCALING_OF_LLAMA_3_1
    return keys


_SCALING_OF_LLAMA_3_1 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _read_params(path: StoragePath) -> dict[str, Any]:
    file = path / "params.json"
    if not file.is_file():
        raise CheckpointError(f"'{path}' has no params.json: it is no folder of llama weights")
    return read_json(file)


def _check_params(path: StoragePath, architecture: Architecture) -> float:
    """Compare the sizes with those of the model; returns the rotary base."""
    values = _read_params(path)
    a = architecture
    sizes = {
        "dim": a.hidden_size,
        "n_layers": a.num_layers,
        "n_heads": a.num_heads,
        "n_kv_heads": a.num_kv_heads,
    }
    values.setdefault("n_kv_heads", values.get("n_heads"))
    mistakes = [
        f"{name} is {values[name]}, the model has {value}"
        for name, value in sizes.items()
        if values.get(name) is not None and values[name] != value
    ]
    if mistakes:
        raise CheckpointError(f"{path / 'params.json'}: does not fit this model: {'; '.join(mistakes)}")
    return _rope_base(path, values)


def _rope_base(path: StoragePath, params: Mapping[str, Any]) -> float:
    base = params.get("rope_theta", 10000.0)
    if not isinstance(base, int | float) or not base > 0:
        raise CheckpointError(f"{path / 'params.json'}: rope_theta must be a number above 0, got {base!r}")
    return float(base)
