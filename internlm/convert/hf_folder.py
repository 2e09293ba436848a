"""A Hugging Face folder: config.json, weights in safetensors or .bin files, and accompanying files.

Tensors are looked up by name and read one at a time; those in MXFP4 are dequantized. `HfWeights` provides them with the
names and in the form of one of our models.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from internlm.config.schema import ModelConfig
from internlm.convert.lazy import TensorsOnRead, grouped_readers
from internlm.convert.multi_token_copies import check_copies, leaves_layers_out, with_multi_token_layers
from internlm.convert.mxfp4 import BLOCKS, METHOD, SCALES, dequantize, quantized_weights
from internlm.convert.redundant import buffer_difference, is_buffer, tied_difference
from internlm.convert.safetensors_file import TensorLocation, read_header, read_tensor
from internlm.convert.torch_files import TorchFile
from internlm.model.architecture import Architecture
from internlm.model.decoder import Decoder
from internlm.model.huggingface.from_config import HfModel, from_hf_config, quantization_method
from internlm.model.huggingface.weight_names import Layout, from_hf, weight_groups
from internlm.model.registry import build_model
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

HF_FILES = "hf"
"""Folder of a checkpoint with the accompanying files of the Hugging Face folder that it descends from."""

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
_BIN = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_SIDE_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".py", ".tiktoken")
_SIDE_NAMES = ("LICENSE", "LICENSE.md", "NOTICE", "NOTICE.md")
_MAX_SIDE_BYTES = 64 << 20
_NO_SIDE_FILES = (SAFETENSORS_INDEX, _BIN_INDEX)


@dataclass(frozen=True)
class HfEntry:
    """A tensor of the folder.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        file: name of its file.
        location: position in a safetensors file; None for a .bin file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    location: TensorLocation | None


class HfFolder:
    """A Hugging Face folder, opened for reading.

    Attributes:
        path: of the folder.
        entries: name -> tensor of the folder; weights in MXFP4 by their names, shapes and dtype when dequantized.

    Raises:
        CheckpointError: the folder does not exist, has no weights, or they are damaged.
    """

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        if not path.is_folder():
            raise CheckpointError(f"there is no Hugging Face folder at '{path}'")
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"'{path}' has no {CONFIG}: it is not a Hugging Face folder")
        self._bin: TorchFile | None = None
        self.entries: dict[str, HfEntry] = {}
        for file, expected in self._weight_files().items():
            found = self._entries_of(file)
            missing = [name for name in expected if name not in found]
            if missing:
                raise CheckpointError(f"'{path / file}' lacks {_some(missing)}, which the index lists in it")
            duplicates = [name for name in found if name in self.entries]
            if duplicates:
                first = self.entries[duplicates[0]].file
                raise CheckpointError(
                    f"'{path}': both {first} and {file} contain {_some(duplicates)}; remove one of the files"
                )
            self.entries.update(found)
        read = {entry.file for entry in self.entries.values()}
        ignored = [name for name in path.names() if name.endswith(_WEIGHT_SUFFIXES) and name not in read]
        if ignored:
            logger.info("%s: %s takes precedence; not read: %s", path, ", ".join(sorted(read)[:3]), ", ".join(ignored))
        self._quantized: dict[str, tuple[HfEntry, HfEntry]] = {}
        if quantization_method(self.config) == METHOD:
            self._dequantize_on_read()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.path / CONFIG)

    @cached_property
    def model(self) -> HfModel:
        """The model as keys of a config.

        Raises:
            ConfigError: the family or a feature is not supported.
        """
        model = from_hf_config(self.config, str(self.path / CONFIG))
        if quantization_method(self.config) == METHOD:
            notice = (
                f"quantization_config: {len(self._quantized)} weights in MXFP4 are dequantized to bf16, exactly; an "
                "export has them in bf16"
            )
            model = dataclasses.replace(model, notices=(*model.notices, notice))
        return with_multi_token_layers(model, self.config, self.entries)

    @property
    def layout(self) -> Layout:
        """The naming layout, detected from the names of the weights."""
        if any(".self_attn.W_pack." in name for name in self.entries):
            return "baichuan2"
        if any(".block_sparse_moe." in name for name in self.entries):
            return "mixtral"
        if any(name.endswith(".mlp.experts.gate_up_proj") for name in self.entries):
            return "fused_experts"
        return "internlm2" if any(".attention.wqkv." in name for name in self.entries) else "transformers"

    def read(self, name: str) -> Tensor:
        """Read a tensor by its name in the folder; a weight in MXFP4 is dequantized.

        Raises:
            CheckpointError: the file is damaged.
        """
        if name in self._quantized:
            blocks, scales = self._quantized[name]
            return dequantize(self._read(name + BLOCKS, blocks), self._read(name + SCALES, scales))
        return self._read(name, self.entries[name])

    def _read(self, name: str, entry: HfEntry) -> Tensor:
        path = self.path / entry.file
        if entry.location is None:
            return self._open_bin(path).read(name)
        with path.open_read() as stream:
            return read_tensor(stream, entry.location, str(path))

    def _dequantize_on_read(self) -> None:
        stored = {name: (entry.shape, entry.dtype) for name, entry in self.entries.items()}
        for name, weight in quantized_weights(stored, str(self.path)).items():
            blocks, scales = self.entries.pop(name + BLOCKS), self.entries.pop(name + SCALES)
            self._quantized[name] = blocks, scales
            self.entries[name] = HfEntry(tuple(weight.shape), weight.dtype, blocks.file, None)

    def _weight_files(self) -> dict[str, list[str]]:
        """File -> names of its tensors according to the index; empty without an index."""
        names = self.path.names()
        for index, single in ((SAFETENSORS_INDEX, SAFETENSORS), (_BIN_INDEX, _BIN)):
            if index in names:
                files: dict[str, list[str]] = {}
                weight_map = read_json(self.path / index).get("weight_map")
                if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                    raise CheckpointError(f"{self.path / index}: 'weight_map' must map names of tensors to files")
                for name, file in weight_map.items():
                    files.setdefault(file, []).append(name)
                missing = [file for file in files if file not in names]
                if missing:
                    raise CheckpointError(f"'{self.path}' lacks {_some(missing)}, which its {index} names")
                return dict(sorted(files.items()))
            if single in names:
                return {single: []}
        raise CheckpointError(
            f"'{self.path}' has no weights: none of {SAFETENSORS}, {SAFETENSORS_INDEX}, {_BIN}, {_BIN_INDEX} exists"
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
    """The weights of a folder with the names and in the form of a model: a `WeightSource`.

    `names()` includes unexpected names of the folder unchanged, and excludes weights of which a part is missing.

    Args:
        folder: source of the weights.
        architecture: of the model to load; it may fuse weights and interleave rotary channels unlike the folder.

    Attributes:
        tensors: our name -> meta tensor with the shape and dtype that `read` returns.
        missing: names, in the folder's spelling, that the model needs and the folder lacks.
        lacking: our name of a weight -> those of them that it consists of.
        unexpected: names of the folder that the model does not have.

    Raises:
        CheckpointError: the shape of a tensor does not fit the model, or a redundant tensor contradicts config.json or
            the tensor that it repeats.
    """

    def __init__(self, folder: HfFolder, architecture: Architecture) -> None:
        self.folder = folder
        self._layout = folder.layout
        self._architecture = architecture
        entries = {name: entry for name, entry in folder.entries.items() if not is_buffer(name)}
        num_layers = architecture.num_layers
        if not architecture.num_multi_token and leaves_layers_out(folder.config, entries, num_layers):
            entries = {name: entry for name, entry in entries.items() if layer_of(name) < num_layers}
        for name in check_copies(folder.read, entries, architecture, str(folder.path)):
            del entries[name]
        self._check_buffers([name for name in folder.entries if is_buffer(name)])
        groups = weight_groups(meta_weights(architecture), architecture, self._layout)
        needed = {name: tensor for group in groups for name, tensor in group.theirs.items()}
        self._aliases = self._resolve_tied_head(entries)
        self.unexpected = [name for name in entries if name not in needed]
        for name, other in self._aliases.items():
            entries[name] = entries[other]
        self.missing = [name for name in needed if name not in entries]
        self.lacking: dict[str, list[str]] = {
            ours: [name for name in group.theirs if name not in entries]
            for group in groups
            if not group.theirs.keys() <= entries.keys()
            for ours in group.ours
        }
        wrong = [
            f"'{name}' has shape {list(entries[name].shape)}, the model needs {list(tensor.shape)}"
            for name, tensor in needed.items()
            if name in entries and entries[name].shape != tuple(tensor.shape)
        ]
        if wrong:
            shown = "\n  ".join(wrong[:20])
            raise CheckpointError(f"the weights in '{folder.path}' do not fit this model:\n  {shown}")
        present = [group.theirs for group in groups if all(name in entries for name in group.theirs)]
        # Translating meta tensors of the stored dtypes yields the shapes and dtypes that `read` returns.
        stored = [{name: _meta(entries[name]) for name in theirs} for theirs in present]
        ours = [from_hf(group, architecture, self._layout) for group in stored]
        self.tensors: dict[str, Tensor] = {name: tensor for group in ours for name, tensor in group.items()}
        self._readers = grouped_readers(lambda number: self._translate(present[number]), ours)

    def names(self) -> Collection[str]:
        """The model's names of all weights in the folder, and the folder's names of unexpected tensors."""
        return [*self.tensors, *self.unexpected]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return tuple(self.tensors[name].shape) if name in self.tensors else self.folder.entries[name].shape

    def read(self, name: str) -> Tensor:
        """Read a full weight."""
        return self._readers[name]() if name in self.tensors else self.folder.read(name)

    def _translate(self, names: Collection[str]) -> dict[str, Tensor]:
        theirs = TensorsOnRead(names, lambda name: self.folder.read(self._aliases.get(name, name)))
        return from_hf(theirs, self._architecture, self._layout)

    def _check_buffers(self, names: Sequence[str]) -> None:
        """Compare buffers with the folder's own config, which determines them."""
        if not names:
            return
        with torch.device("meta"):
            theirs = build_model(self.folder.model.model_type, ModelConfig.model_validate(self.folder.model.keys))
        assert isinstance(theirs, Decoder)
        found = [buffer_difference(name, self.folder.read(name), theirs.architecture.rope) for name in names]
        differing = [difference for difference in found if difference is not None]
        if differing:
            raise CheckpointError(
                f"'{self.folder.path}' contains another model than its {CONFIG} describes:\n  "
                + "\n  ".join(differing[:5])
                + f"\n  Correct {CONFIG}, or remove the buffers from the weights"
            )
        logger.info("%s: dropped %d buffers, which agree with %s", self.folder.path, len(names), CONFIG)

    def _resolve_tied_head(self, entries: dict[str, HfEntry]) -> dict[str, str]:
        """Drop a tied head that was saved in addition to its embedding.

        Returns:
            Name -> name to read instead: in a model with an untied head, the embedding for a missing head.
        """
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
                        f"'{self.folder.path}': {CONFIG} ties the head to the embedding (tie_word_embeddings), but "
                        f"'{head}' {difference}. To keep both, import with --untie, or load into a model with "
                        "model.tie_word_embeddings = False"
                    )
                del entries[head]
        elif head not in entries and embedding in entries:
            return {head: embedding}
        return {}


def layer_of(name: str) -> int:
    """Number of the layer of a weight, by its name in either form; -1 for weights outside of layers."""
    match = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def side_files(folder: StoragePath) -> dict[str, bytes]:
    """Read all files except the weights and their index: configs, tokenizer, code, license."""
    files = {}
    for name in folder.names():
        path = folder / name
        is_side_file = (name.endswith(_SIDE_SUFFIXES) or name in _SIDE_NAMES) and name not in _NO_SIDE_FILES
        if is_side_file and path.is_file() and path.size() <= _MAX_SIDE_BYTES:
            files[name] = path.read_bytes()
    return files


def meta_weights(architecture: Architecture) -> dict[str, Tensor]:
    """The weights of the full model on the meta device, by name."""
    with torch.device("meta"):
        return dict(Decoder(architecture).named_parameters())


def _meta(entry: HfEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def read_json(path: StoragePath) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        CheckpointError: the file contains something else.
    """
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in the content of a file.

    Raises:
        CheckpointError: the content is something else.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: not a JSON object")
    return values


def _some(names: Sequence[str]) -> str:
    """The first few names of a list, for a message."""
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
