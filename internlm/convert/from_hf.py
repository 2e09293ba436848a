"""Converts a Hugging Face folder to a checkpoint, with one group of weights in memory at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from internlm.checkpoint.tensor_files import write_weights
from internlm.checkpoint.weight_source import LazyTensor, finite
from internlm.config.schema import Config
from internlm.convert.hf_folder import HF_FILES, HfFolder, HfWeights, side_files
from internlm.convert.llava_folder import LlavaWeights, open_folder_weights, open_hf_folder
from internlm.model.architecture import Architecture
from internlm.model.decoder import Decoder
from internlm.model.huggingface.from_config import HfModel
from internlm.model.registry import build_model
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

_WEIGHTS = (
    "weight",
    "bias",
    "gate_up_proj",
    "down_proj",
    "weight_packed",
    "weight_scale",
    "qzeros",
    "scales",
    "blocks",
)
"""Suffixes of weight names, including those of fused experts and of quantized weights."""
_TRAINABLE = (torch.bfloat16, torch.float16, torch.float32)


def convert_from_hf(
    source: StoragePath, out: StoragePath, *, dtype: torch.dtype | None = None, untie: bool = False
) -> StoragePath:
    """Write the checkpoint `<out>/0/` with the weights of a Hugging Face folder.

    Args:
        source: folder with config.json and weights.
        out: save folder; must not have a checkpoint 0.
        dtype: of the weights; None keeps that of each weight.
        untie: give the model an untied head although config.json ties it to the embedding.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the folder is incomplete or damaged, has weights that are not described by its config.json or
            contradict it, or has values that are not finite or overflow `dtype`.
        ConfigError: the family or a feature is not supported.
    """
    target = out / "0"
    if target.exists():
        raise CheckpointError(f"'{target}' already exists; give another --out")
    hf_files = side_files(source)
    # Tokenizers are only read from local disks.
    has_tokenizer = target.is_local and _has_tokenizer(hf_files)
    tokenizer_path = str((target / HF_FILES).local.absolute()) if has_tokenizer else None
    imported = read_hf_folder(source, dtype=dtype, untie=untie, tokenizer_path=tokenizer_path)
    config, weights = imported.config, imported.weights
    # A selection bias keeps its dtype: in bf16, its steps would be larger than the differences between scores.
    dtypes = {name: None if name.endswith(".selection_bias") else dtype for name in weights.tensors}
    tensors = {
        name: LazyTensor(tuple(tensor.shape), dtypes[name] or tensor.dtype, partial(_read, weights, name, dtypes[name]))
        for name, tensor in weights.tensors.items()
    }
    return write_weights(
        out, tensors, config=config, step=0, files={f"{HF_FILES}/{name}": data for name, data in hf_files.items()}
    )


@dataclass(frozen=True)
class HfImport:
    """A Hugging Face folder as a model of this package.

    Attributes:
        config: with this model, and placeholders for the required keys of a run.
        weights: of the whole model, read one at a time.
    """

    config: Config
    weights: HfWeights | LlavaWeights


def read_hf_folder(
    source: StoragePath, *, dtype: torch.dtype | None = None, untie: bool = False, tokenizer_path: str | None = None
) -> HfImport:
    """Read the config of a Hugging Face folder, and open its weights.

    Args:
        source: folder with config.json and weights.
        dtype, untie: see `convert_from_hf`.
        tokenizer_path: of the config.

    Raises:
        CheckpointError, ConfigError: see `convert_from_hf`.
    """
    folder = open_hf_folder(source)
    model = folder.model
    stored = _main_dtype(folder)
    for notice in model.notices:
        logger.warning("%s: config.json: %s", source, notice)
    if untie:
        model = dataclasses.replace(model, keys={**model.keys, "tie_word_embeddings": False})
    config = imported_config(model, dtype or stored, tokenizer_path)
    weights = open_folder_weights(folder, decoder_of(config))
    problems = [f"'{name}' is missing" for name in weights.missing]
    problems += [f"'{name}' is not described by config.json" for name in weights.unexpected]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"the weights in '{source}' do not fit its config.json:\n  {shown}")
    what = folder.config["model_type"], config.model_type, len(weights.tensors), stored
    logger.info("%s: %s as %s, %d tensors, %s", source, *what)
    return HfImport(config, weights)


def imported_config(model: HfModel, dtype: torch.dtype, tokenizer_path: str | None = None) -> Config:
    """A config with this model, and placeholders for the required keys of a run."""
    return Config.model_validate(
        {
            "JOB_NAME": "imported",
            "model_type": model.model_type,
            "model": {**model.keys, "dtype": str(dtype)},
            "data": {
                "seq_len": model.keys["max_position_embeddings"],
                "micro_bsz": 1,
                "total_steps": 1,
                "tokenizer_path": tokenizer_path,
            },
            "ckpt": {"enable_save_ckpt": False},
        }
    )


def architecture_of(config: Config) -> Architecture:
    """The architecture of a config's model; see `decoder_of`."""
    return decoder_of(config).architecture


def decoder_of(config: Config) -> Decoder:
    """A config's model on the meta device.

    Raises:
        CheckpointError: the model is not a decoder of this package.
        ConfigError: the model type is unknown.
    """
    with torch.device("meta"):
        model = build_model(config.model_type, config.model, norm_dtype=torch.float32 if config.use_fp32_norm else None)
    if not isinstance(model, Decoder):
        raise CheckpointError(
            f"model type '{config.model_type}' is not a decoder of this package: its weights have no Hugging Face names"
        )
    return model


def _read(weights: HfWeights | LlavaWeights, name: str, dtype: torch.dtype | None) -> Tensor:
    return finite(weights.read(name), name, f"'{weights.folder.path}'", dtype)


def _main_dtype(folder: HfFolder) -> torch.dtype:
    """The dtype of most of the folder's bytes.

    Raises:
        CheckpointError: a weight has a dtype that cannot be trained, such as the integers of a quantized model.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name, entry in folder.entries.items():
        if entry.dtype not in _TRAINABLE:
            if not name.endswith(_WEIGHTS):
                continue  # a buffer; unexpected tensors are reported later
            raise CheckpointError(
                f"'{folder.path}': '{name}' is stored as {entry.dtype}; supported: bfloat16, float16, float32. Convert "
                f"a quantized model to one of them first"
            )
        sizes[entry.dtype] += torch.Size(entry.shape).numel() * entry.dtype.itemsize
    if not sizes:
        raise CheckpointError(f"'{folder.path}': no tensor is stored as bfloat16, float16 or float32")
    return sizes.most_common(1)[0][0]


def _has_tokenizer(files: dict[str, bytes]) -> bool:
    return any(name in files for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
