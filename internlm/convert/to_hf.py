"""Converts a checkpoint to a folder that transformers loads, with one group of weights in memory at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from internlm.checkpoint.manifest import find_damage, read_manifest
from internlm.checkpoint.reading import read_config
from internlm.checkpoint.run_state import MODEL_PREFIX
from internlm.checkpoint.save_folder import resolve
from internlm.checkpoint.tensor_files import TensorReader
from internlm.checkpoint.weight_source import LazyTensor, finite
from internlm.config.schema import Config
from internlm.config.schema.root import HF_CLASS
from internlm.convert.from_hf import decoder_of
from internlm.convert.hf_class_weights import exported_config, exported_tensors
from internlm.convert.hf_folder import CONFIG, SAFETENSORS, SAFETENSORS_INDEX, layer_of, meta_weights
from internlm.convert.lazy import grouped_readers
from internlm.convert.llava_folder import with_file_names
from internlm.convert.model_card import MODEL_CARD, model_card
from internlm.convert.multi_token_copies import copies, has_multi_token_form
from internlm.convert.run_tokenizer import files_to_export, tokenizer_of_run
from internlm.convert.safetensors_file import shard, write_safetensors
from internlm.convert.tokenizer_files import TokenizerFiles, equivalent_files
from internlm.data.tokenize.special_tokens import GENERATION
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.model.architecture import Architecture
from internlm.model.decoder import Decoder
from internlm.model.huggingface.llava_config import llava_config_json
from internlm.model.huggingface.to_config import published_config_json, transformers_config_json, weight_layout
from internlm.model.huggingface.weight_names import SELECTION_BIAS, Layout, to_hf, weight_groups
from internlm.model.llava.model import Llava
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

SHARD_BYTES = 5_000_000_000
"""Default size of a weight file, as in transformers."""

LayoutChoice = Literal["transformers", "published"]


@dataclass(frozen=True)
class Exported:
    """What a folder was made of.

    Attributes:
        checkpoint: the source of the weights.
        tokenizer: that of the training data; None: it is not known.
    """

    checkpoint: StoragePath
    tokenizer: TextTokenizer | None


def convert_to_hf(
    checkpoint: StoragePath,
    out: StoragePath,
    *,
    layout: LayoutChoice = "transformers",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: StoragePath | Literal[False] | None = None,
) -> Exported:
    """Write a Hugging Face folder.

    On a disk the folder gets its final name once it is complete. In an object store config.json, without which nothing
    loads, is written last.

    Args:
        checkpoint: a checkpoint, or a save folder, whose newest complete checkpoint is converted.
        out: output folder; must be new or empty.
        layout: "transformers" for names and config of the library's built-in classes, "published" for those of the
            family's published checkpoints, which may need their own code.
        dtype: of the weights; None keeps that of each weight.
        max_shard_bytes: maximum size of a weight file, except for larger single tensors.
        tokenizer: None exports the files that the checkpoint was imported with, else those of data.tokenizer_path of
            the run; False exports none.

    Returns:
        What was exported.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, `out` is not empty, or transformers gives other ids
            than the tokenizer of the training data, in every form of its files.
        ConfigError: no class of transformers, or no published code, computes this model.
    """
    if out.is_file() or out.names():
        raise CheckpointError(f"'{out}' is not empty; give another --out")
    source = undamaged(checkpoint)
    if not out.is_local:
        return _write(source, out, layout, dtype, max_shard_bytes, tokenizer)
    temporary = out.parent / f".writing-{out.name}"
    temporary.remove()
    try:
        exported = _write(source, temporary, layout, dtype, max_shard_bytes, tokenizer)
        out.remove()
        temporary.rename_to(out)
    except BaseException:
        temporary.remove()
        raise
    return exported


def undamaged(checkpoint: StoragePath) -> StoragePath:
    """The checkpoint, or the newest complete one of a save folder, after a comparison with its checksums.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    source = resolve(checkpoint)
    manifest = read_manifest(source)
    damage = find_damage(source, manifest) if manifest else []
    if damage:
        raise CheckpointError(f"the checkpoint '{source}' is damaged: {'; '.join(damage)}")
    return source


def export_next_to(checkpoint: StoragePath) -> None:
    """Write `<step>_hf/` next to a complete checkpoint, replacing an older one; for `enable_internevo2hf_ckpt`.

    Raises:
        CheckpointError, ConfigError: as in `convert_to_hf`.
    """
    out = checkpoint.parent / f"{checkpoint.name}_hf"
    if not out.is_local:
        (out / CONFIG).remove()  # first: without it the folder is not loaded
        out.remove()
        _write(checkpoint, out, "transformers", None, SHARD_BYTES, None)
        return
    temporary = checkpoint.parent / f".writing-{out.name}"
    temporary.remove()
    _write(checkpoint, temporary, "transformers", None, SHARD_BYTES, None)
    out.remove()
    temporary.rename_to(out)


def check_exportable(config: Config, layout: LayoutChoice = "transformers") -> None:
    """Check before a run that its checkpoints can be exported.

    Raises:
        CheckpointError, ConfigError: the checkpoints cannot be exported.
    """
    is_class = config.model_type == HF_CLASS
    values = exported_config(config) if is_class else _config_json(config, decoder_of(config), layout)
    equivalent_files(tokenizer_of_run(config), values, with_code=layout == "published")


def _write(
    checkpoint: StoragePath,
    out: StoragePath,
    layout: LayoutChoice,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    tokenizer: StoragePath | Literal[False] | None,
) -> Exported:
    config = read_config(checkpoint)
    if config.model_type == HF_CLASS:
        values, tensors = exported_config(config), exported_tensors(TensorReader(checkpoint), dtype)
        return _write_folder(checkpoint, out, config, layout, dtype, max_shard_bytes, tokenizer, values, tensors)
    model = decoder_of(config)
    architecture = model.architecture
    left_out = range(0)
    if not has_multi_token_form(architecture):
        architecture, left_out = without_multi_token_layers(architecture, f"{checkpoint}: {config.model_type}")
    values = _config_json(config, model, layout, architecture)
    if architecture.experts is not None and architecture.experts.selection.capacity is not None:
        logger.warning(
            "model.moe_type = %r: transformers has no capacity of experts, so its model drops no token",
            config.model.moe_type,
        )
    names = weight_layout(architecture, config.model_type, published=layout == "published")
    vision = model.vision_weights() if isinstance(model, Llava) else {}
    tensors = hf_tensors(TensorReader(checkpoint), architecture, names, dtype, left_out, vision)
    if vision:
        tensors = with_file_names(tensors)
    return _write_folder(checkpoint, out, config, layout, dtype, max_shard_bytes, tokenizer, values, tensors)


def _write_folder(
    checkpoint: StoragePath,
    out: StoragePath,
    config: Config,
    layout: LayoutChoice,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    tokenizer: StoragePath | Literal[False] | None,
    values: dict[str, Any],
    tensors: Mapping[str, LazyTensor],
) -> Exported:
    """Write weights, tokenizer, model card, and `values` as config.json."""
    exported = TokenizerFiles()
    if tokenizer is not False:
        exported = files_to_export(checkpoint, config, tokenizer, with_code=layout == "published")
    values |= exported.ids
    files = equivalent_files(exported, values, with_code=layout == "published")
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in values:
                values[key] = str(dtype).removeprefix("torch.")
    out.make_folder()
    _write_weights(out, tensors, max_shard_bytes)
    for name, data in files.items():
        (out / name).write_bytes(data)
    if exported.ids and GENERATION not in files:
        _write_json(out / GENERATION, {"_from_model_config": True, **exported.ids})
    (out / MODEL_CARD).write_bytes(model_card(checkpoint, config, values, tensors).encode())
    _write_json(out / CONFIG, values)
    return Exported(checkpoint, exported.tokenizer)


def hf_tensors(
    reader: TensorReader,
    architecture: Architecture,
    layout: Layout,
    dtype: torch.dtype | None,
    left_out: Collection[int] = (),
    others: Mapping[str, Tensor] | None = None,
) -> dict[str, LazyTensor]:
    """The weights of a checkpoint by Hugging Face names, read group by group.

    Args:
        reader: of the checkpoint.
        architecture: of the exported model.
        layout: of the names.
        dtype: of the files; None: that of the checkpoint.
        left_out: numbers of the layers of the checkpoint that the exported model does not have.
        others: weights of the checkpoint beside those of the decoder (meta tensors), which keep their names.

    Raises:
        CheckpointError: the weights of the checkpoint do not fit its own config.
    """
    others = others or {}
    decoder = meta_weights(architecture)
    weights = {**decoder, **others}
    stored = {
        name: reader.entries[f"{MODEL_PREFIX}{name}"] for name in reader.names() if layer_of(name) not in left_out
    }
    problems = [f"'{name}' is missing" for name in weights if name not in stored]
    problems += [f"'{name}' is not a weight of this model" for name in stored if name not in weights]
    problems += [
        f"'{name}' has shape {list(stored[name].shape)}, the model needs {list(tensor.shape)}"
        for name, tensor in weights.items()
        if name in stored and tuple(stored[name].shape) != tuple(tensor.shape)
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint '{reader.path}' does not fit its config:\n  " + "\n  ".join(problems[:20])
        )
    shapes = {
        name: torch.empty(tensor.shape, dtype=stored[name].dtype, device="meta") for name, tensor in decoder.items()
    }
    groups = weight_groups(shapes, architecture, layout)

    def read_group(number: int) -> Mapping[str, Tensor]:
        return to_hf({name: reader.read(name) for name in groups[number].ours}, architecture, layout)

    readers = grouped_readers(read_group, [group.theirs for group in groups])
    readers |= {name: partial(reader.read, name) for name in others}

    def dtype_of(name: str) -> torch.dtype | None:
        # In bf16, the steps of a bias would be larger than the differences between scores.
        return None if name.endswith(SELECTION_BIAS) else dtype

    def read(name: str) -> Tensor:
        return finite(readers[name](), name, f"'{reader.path}'", dtype_of(name))

    tensors = {
        name: LazyTensor(tuple(tensor.shape), dtype_of(name) or tensor.dtype, partial(read, name))
        for group in groups
        for name, tensor in group.theirs.items()
    }
    tensors |= {
        name: LazyTensor(tuple(tensor.shape), dtype or stored[name].dtype, partial(read, name))
        for name, tensor in others.items()
    }
    return tensors | {copy: tensors[original] for copy, original in copies(architecture)}


def without_multi_token_layers(architecture: Architecture, where: str) -> tuple[Architecture, range]:
    """A model without the layers that predict later tokens, and their numbers, which are logged if there are any."""
    left_out = architecture.multi_token_layers
    if left_out:
        logger.warning(
            "%s: left out: the %d layer(s) that predict later tokens, which files of this kind do not have",
            *(where, len(left_out)),
        )
    return dataclasses.replace(architecture, num_multi_token=0), left_out


def _config_json(
    config: Config, model: Decoder, layout: LayoutChoice, architecture: Architecture | None = None
) -> dict[str, Any]:
    if isinstance(model, Llava):
        return llava_config_json(model, config.model)
    make = published_config_json if layout == "published" else transformers_config_json
    return make(architecture or model.architecture, config.model_type)


def _write_weights(out: StoragePath, tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> None:
    sizes = {name: torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for name, tensor in tensors.items()}
    shards = shard(sizes, max_shard_bytes)
    if len(shards) == 1:
        files = [SAFETENSORS]
    else:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        with (out / file).open_write() as stream:
            write_safetensors(stream, {name: tensors[name] for name in names})
        logger.info("wrote %s, %d tensors", file, len(names))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        _write_json(out / SAFETENSORS_INDEX, index)


def _write_json(path: StoragePath, values: Mapping[str, Any]) -> None:
    path.write_bytes((json.dumps(values, indent=2) + "\n").encode())
