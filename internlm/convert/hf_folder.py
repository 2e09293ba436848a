"""A Hugging Face folder: config.json, weights in safetensors or .bin files, and the files beside them.

Tensors are found by name and read one at a time. `HfWeights` gives them by our names, as a given model has them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from internlm.config.schema import ModelConfig
from internlm.convert.lazy import grouped_readers
from internlm.convert.redundant import buffer_difference, is_buffer, tied_difference
from internlm.convert.safetensors_file import TensorLocation, read_header, read_tensor
from internlm.convert.torch_files import TorchFile
from internlm.model.architecture import Architecture
from internlm.model.decoder import Decoder
from internlm.model.huggingface.from_config import HfModel, from_hf_config
from internlm.model.huggingface.weight_names import Layout, from_hf, weight_groups
from internlm.model.registry import build_model
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

HF_FILES = "hf"
"""Folder of a checkpoint with the files beside the weights that it was imported from, or trained from."""

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
_BIN = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_KEPT_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".py", ".tiktoken")
_KEPT_NAMES = ("LICENSE", "LICENSE.md", "NOTICE", "NOTICE.md")
_LARGEST_KEPT = 64 << 20
_NOT_KEPT = (SAFETENSORS_INDEX, _BIN_INDEX)


@dataclass(frozen=True)
class HfEntry:
    """A tensor of the folder."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    location: TensorLocation | None
    """In a safetensors file; None: a .bin file."""


class HfFolder:
    """A Hugging Face folder, opened for reading.

    Raises:
        CheckpointError: it does not exist, has no weights, or they are damaged.
    """

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        if not path.is_folder():
            raise CheckpointError(f"there is no Hugging Face folder at '{path}'")
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"'{path}' has no {CONFIG}: it is no Hugging Face folder")
        self._bin: TorchFile | None = None
        self.entries: dict[str, HfEntry] = {}
        for file, expected in self._weight_files().items():
            found = self._entries_of(file)
            missing = [name for name in expected if name not in found]
            if missing:
                raise CheckpointError(f"{path / file}: the index says that it holds {_some(missing)}; it does not")
            twice = [name for name in found if name in self.entries]
            if twice:
                first = self.entries[twice[0]].file
                raise CheckpointError(f"'{path}': both {first} and {file} hold {_some(twice)}; remove one of them")
            self.entries.update(found)
        read = {entry.file for entry in self.entries.values()}
        left = [name for name in path.names() if name.endswith(_WEIGHT_SUFFIXES) and name not in read]
        if left:
            logger.info("%s: not read, as %s is there: %s", path, ", ".join(sorted(read)[:3]), ", ".join(left))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.path / CONFIG)

    @cached_property
    def model(self) -> HfModel:
        """The model as keys of a config.

        Raises:
            ConfigError: a family or feature that this package does not have.
        """
        return from_hf_config(self.config, str(self.path / CONFIG))

    @property
    def layout(self) -> Layout:
        """The layout, recognized by the names of the weights."""
        if any(".self_attn.W_pack." in name for name in self.entries):
            return "baichuan2"
        return "internlm2" if any(".attention.wqkv." in name for name in self.entries) else "transformers"

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the folder.

        Raises:
            CheckpointError: the file is damaged.
        """
        entry = self.entries[name]
        path = self.path / entry.file
        if entry.location is None:
            return self._open_bin(path).read(name)
        with path.open_read() as stream:
            return read_tensor(stream, entry.location, str(path))

    def _weight_files(self) -> dict[str, list[str]]:
        """File -> names that it must hold according to the index, if there is one."""
        names = self.path.names()
        for index, single in ((SAFETENSORS_INDEX, SAFETENSORS), (_BIN_INDEX, _BIN)):
            if index in names:
                files: dict[str, list[str]] = {}
                weight_map = read_json(self.path / index).get("weight_map")
                if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                    raise CheckpointError(f"{self.path / index}: 'weight_map' must map names of tensors to files")
                for name, file in weight_map.items():
                    files.setdefault(file, []).append(name)
                absent = [file for file in files if file not in names]
                if absent:
                    raise CheckpointError(f"'{self.path}' lacks {_some(absent)}, which its {index} names")
                return dict(sorted(files.items()))
            if single in names:
                return {single: []}
        raise CheckpointError(
            f"'{self.path}' has no weights: none of {SAFETENSORS}, {SAFETENSORS_INDEX}, {_BIN}, {_BIN_INDEX} is there"
        )

    def _entries_of(self, file: str) -> dict[str, HfEntry]:
        path = self.path / file
        if file.endswith(".safetensors"):
            with path.open_read() as stream:
                locations = read_header(stream, path.size(), str(path))
            return {
                name: HfEntry(location.shape, location.dtype, file, location) for name, location in locations.items()
            }
        found = self._open_bin(path).entries()
        return {name: HfEntry(shape, dtype, file, None) for name, (shape, dtype) in found.items()}

    def _open_bin(self, path: StoragePath) -> TorchFile:
        if self._bin is None or self._bin.path != path:
            self._bin = TorchFile(path)
        return self._bin


class HfWeights:
    """The weights of a folder under the names and in the form of a model: a `WeightSource`.

    Args:
        folder: where they come from.
        architecture: of the model that wants them; it may fuse and interleave otherwise than the folder.

    Names of the folder that no weight of the model comes from are among `names()` as they are, for they are unexpected;
    weights of which a part is missing are not.

    Attributes:
        tensors: our name -> meta tensor of the shape and dtype that `read` gives.
        missing: names, in the folder's spelling, that the model needs and the folder lacks.
        unexpected: names of the folder that the model has no place for.

    Raises:
        CheckpointError: a tensor has a shape that does not fit the model, or one that follows from config.json, or from
            another tensor, differs from what follows.
    """

    def __init__(self, folder: HfFolder, architecture: Architecture) -> None:
        self.folder = folder
        self._layout = folder.layout
        self._architecture = architecture
        entries = {name: entry for name, entry in folder.entries.items() if not is_buffer(name)}
        self._check_buffers([name for name in folder.entries if is_buffer(name)])
        groups = weight_groups(meta_weights(architecture), architecture, self._layout)
        needed = {name: tensor for group in groups for name, tensor in group.theirs.items()}
        self._stands_for = self._settle_tied_head(entries, needed)
        self.unexpected = [name for name in entries if name not in needed]
        for name, other in self._stands_for.items():
            entries[name] = entries[other]
        self.missing = [name for name in needed if name not in entries]
        wrong = [
            f"'{name}' has shape {list(entries[name].shape)}, the model wants {list(tensor.shape)}"
            for name, tensor in needed.items()
            if name in entries and entries[name].shape != tuple(tensor.shape)
        ]
        if wrong:
            shown = "\n  ".join(wrong[:20])
            raise CheckpointError(f"the weights in '{folder.path}' do not fit this model:\n  {shown}")
        present = [group.theirs for group in groups if all(name in entries for name in group.theirs)]
        # On the meta device with the stored number formats: the shapes and formats that reading will give.
        stored = [{name: _meta(entries[name]) for name in theirs} for theirs in present]
        ours = [from_hf(group, architecture, self._layout) for group in stored]
        self.tensors: dict[str, Tensor] = {name: tensor for group in ours for name, tensor in group.items()}
        self._readers = grouped_readers(lambda number: self._translate(present[number]), ours)

    def names(self) -> Collection[str]:
        """The model's names of all weights in the folder, and the folder's names of tensors unknown to the model."""
        return [*self.tensors, *self.unexpected]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return tuple(self.tensors[name].shape) if name in self.tensors else self.folder.entries[name].shape

    def read(self, name: str) -> Tensor:
        """A full weight."""
        return self._readers[name]() if name in self.tensors else self.folder.read(name)

    def _translate(self, names: Iterable[str]) -> dict[str, Tensor]:
        theirs = {name: self.folder.read(self._stands_for.get(name, name)) for name in names}
        return from_hf(theirs, self._architecture, self._layout)

    def _check_buffers(self, names: Sequence[str]) -> None:
        """Compare buffers with the folder's own config: they follow from how its weights were trained."""
        if not names:
            return
        with torch.device("meta"):
            theirs = build_model(self.folder.model.model_type, ModelConfig.model_validate(self.folder.model.keys))
        assert isinstance(theirs, Decoder)
        found = [buffer_difference(name, self.folder.read(name), theirs.architecture.rope) for name in names]
        differing = [difference for difference in found if difference is not None]
        if differing:
            raise CheckpointError(
                f"'{self.folder.path}' holds another model than its {CONFIG} says:\n  "
                + "\n  ".join(differing[:5])
                + f"\n  Correct {CONFIG}, or remove the buffers from the weights"
            )
        logger.info("%s: %d buffers are as %s says, and not kept", self.folder.path, len(names), CONFIG)

    def _settle_tied_head(self, entries: dict[str, HfEntry], needed: Mapping[str, Tensor]) -> dict[str, str]:
        """A tied head that was saved beside its embedding is dropped; a model with a head of its own starts from the
        embedding of a tied one. Returns which name stands for a name that is missing."""
        if not self.folder.model.keys["tie_word_embeddings"]:
            return {}
        head, embedding = (
            ("output.weight", "model.tok_embeddings.weight")
            if self._layout == "internlm2"
            else ("lm_head.weight", "model.embed_tokens.weight")
        )
        if self._architecture.tie_word_embeddings:
            if head in entries and embedding in entries:
                difference = tied_difference(self.folder.read(head), self.folder.read(embedding))
                if difference is not None:
                    raise CheckpointError(
                        f"'{self.folder.path}': {CONFIG} says that the head is the embedding (tie_word_embeddings), "
                        f"but '{head}' {difference}. To keep both, import with --untie, or load into a model with "
                        "model.tie_word_embeddings = False"
                    )
                del entries[head]
        elif head not in entries and embedding in entries:
            return {head: embedding}
        return {}


def side_files(folder: StoragePath) -> dict[str, bytes]:
    """The files beside the weights and their index: configs, tokenizer, code, licence."""
    files = {}
    for name in folder.names():
        path = folder / name
        wanted = (name.endswith(_KEPT_SUFFIXES) or name in _KEPT_NAMES) and name not in _NOT_KEPT
        if wanted and path.is_file() and path.size() <= _LARGEST_KEPT:
            files[name] = path.read_bytes()
    return files


def meta_weights(architecture: Architecture) -> dict[str, Tensor]:
    """The weights of the full model on the meta device, by name."""
    with torch.device("meta"):
        return dict(Decoder(architecture).named_parameters())


def _meta(entry: HfEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def read_json(path: StoragePath) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it holds something else.
    """
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in the content of a file.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: holds no JSON object")
    return values


def _some(names: Sequence[str]) -> str:
    """The first few names of a list, for a message."""
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
