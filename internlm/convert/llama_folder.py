"""Meta's llama files: params.json and one consolidated.NN.pth per tensor-parallel rank.

Names are ours except for the prefix, rotary pairs are adjacent rows, and the kind of a tensor determines the dimension
over which the files split it.
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
"""Suffixes of row-parallel matrices, which are split along columns (inputs); others are split along rows."""


class MetaLlamaWeights:
    """The weights of such a folder with the names and in the form of a model: a `WeightSource`.

    `names()` includes unexpected names of the files unchanged, and excludes weights of which a part is missing.

    Args:
        path: the folder, on a local disk.
        architecture: of the model to load; it may fuse weights and interleave rotary channels unlike the files.

    Attributes:
        lacking: our name of a weight -> names that the files lack of it.

    Raises:
        CheckpointError: the folder does not exist or has no weights, params.json or a shape does not fit the model, or
            the rotary frequencies in the files contradict params.json.
    """

    def __init__(self, path: StoragePath, architecture: Architecture) -> None:
        if not path.is_folder():
            raise CheckpointError(f"there is no folder of llama weights at '{path}'")
        names = [name for name in path.names() if _FILE.fullmatch(name)]
        if not names:
            raise CheckpointError(f"'{path}' has no weights: there is no file consolidated.00.pth")
        self.path = path
        self._architecture = architecture
        base = _check_params(path, architecture)
        self._files = [TorchFile(path / name) for name in names]
        shards = [file.entries() for file in self._files]
        rope = RopeSettings(head_dim=architecture.head_dim, base=base)
        for name in filter(is_buffer, shards[0]):
            difference = buffer_difference(name, self._files[0].read(name), rope)
            if difference is not None:
                raise CheckpointError(f"'{path}' contains another model than its params.json describes: {difference}")
        for file in self._files:
            file.close()
        found = {name: entry for name, entry in shards[0].items() if not is_buffer(name)}
        for file, shard in zip(self._files, shards, strict=True):
            missing = [name for name in found if name not in shard]
            if missing:
                raise CheckpointError(f"'{file.path}' lacks '{missing[0]}', which '{names[0]}' has")
        weights = meta_weights(architecture)
        plain = plain_shapes(weights, architecture)
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
        complete = {group_of(group[0]) for group in present}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in weights.items() if group_of(name) in complete}
        self.lacking = {
            name: [each for each in groups[group_of(name)] if each not in found]
            for name in weights
            if group_of(name) not in complete
        }
        ours: dict[str, list[str]] = {}
        for name in self._shapes:
            ours.setdefault(group_of(name), []).append(name)
        self._readers = grouped_readers(
            lambda number: self._translate(present[number]), [ours[group_of(group[0])] for group in present]
        )

    def names(self) -> Collection[str]:
        """The model's names of all weights in the files, and the files' names of unexpected tensors."""
        return [*self._shapes, *self._unexpected]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight; of an unexpected tensor, its shape in the first file."""
        return self._shapes[name] if name in self._shapes else self._files[0].entries()[name][0]

    def read(self, name: str) -> Tensor:
        """Read a full weight."""
        return self._readers[name]() if name in self._shapes else self._files[0].read(name)

    def _translate(self, names: list[str]) -> dict[str, Tensor]:
        return from_plain({name: self._read_full(name) for name in names}, self._architecture, interleaved=True)

    def _read_full(self, name: str) -> Tensor:
        dim = self._dims[name]
        if dim is None:
            return self._files[0].read(name)
        return torch.cat([file.read(name) for file in self._files], dim=dim)


def _split_dim(
    name: str, shard: tuple[int, ...], whole: tuple[int, ...], num_files: int, path: StoragePath
) -> int | None:
    """The dimension along which a tensor is split; None if every file has the full tensor.

    Raises:
        CheckpointError: the shards do not fit the shape of the model's weight.
    """
    if len(whole) == 1 and shard == whole:
        return None
    dims = [1] if name.endswith(_ROWS_SPLIT) else [0]
    if name == "tok_embeddings.weight":
        # Split along the hidden size in Llama 1 and 2, along the vocabulary in Llama 3.
        dims = [0, 1]
    for dim in dims:
        if len(shard) > dim and (*shard[:dim], shard[dim] * num_files, *shard[dim + 1 :]) == whole:
            return dim
    raise CheckpointError(
        f"the weights in '{path}' do not fit this model: '{name}' has shape {list(shard)} in each of {num_files} "
        f"file(s), the model needs {list(whole)}"
    )


def trained_keys(path: StoragePath, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in params.json that determine the model's function, as keys of the `model` section.

    Args:
        path: the folder.
        ours: the `model` section of the run; it supplies the factors of scaled rotary frequencies, which params.json
            omits.

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
        keys["rope_scaling"] = _LLAMA_3_1_SCALING
    return keys


_LLAMA_3_1_SCALING = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _read_params(path: StoragePath) -> dict[str, Any]:
    file = path / "params.json"
    if not file.is_file():
        raise CheckpointError(f"'{path}' has no params.json: it is not a folder of llama weights")
    return read_json(file)


def _check_params(path: StoragePath, architecture: Architecture) -> float:
    """Compare the sizes in params.json with those of the model, and return the rotary base."""
    values = _read_params(path)
    a = architecture
    sizes = {
        "dim": a.hidden_size,
        "n_layers": a.num_layers,
        "n_heads": a.num_heads,
        "n_kv_heads": a.num_kv_heads,
    }
    values.setdefault("n_kv_heads", values.get("n_heads"))
    differences = [
        f"{name} is {values[name]}, the model has {value}"
        for name, value in sizes.items()
        if values.get(name) is not None and values[name] != value
    ]
    if differences:
        raise CheckpointError(f"{path / 'params.json'}: does not fit this model: {'; '.join(differences)}")
    return _rope_base(path, values)


def _rope_base(path: StoragePath, params: Mapping[str, Any]) -> float:
    base = params.get("rope_theta", 10000.0)
    if not isinstance(base, int | float) or not base > 0:
        raise CheckpointError(f"{path / 'params.json'}: rope_theta must be a number above 0, got {base!r}")
    return float(base)
