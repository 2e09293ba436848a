"""Converts a checkpoint to a GGUF file for llama.cpp, with one group of weights in memory at a time."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm.checkpoint.reading import read_config
from internlm.checkpoint.tensor_files import TensorReader
from internlm.checkpoint.weight_source import LazyTensor, finite
from internlm.config.schema import Config
from internlm.config.schema.root import HF_CLASS
from internlm.convert.from_hf import architecture_of
from internlm.convert.gguf_model import ROPE_FACTORS, GgufModel, gguf_model, gguf_name
from internlm.convert.gguf_types import ggml_type, stored, torch_dtype, type_of
from internlm.convert.gguf_vocabulary import GgufVocabulary, gguf_vocabulary
from internlm.convert.hf_folder import CONFIG
from internlm.convert.run_tokenizer import files_to_export
from internlm.convert.to_hf import Exported, hf_tensors, undamaged, without_multi_token_layers
from internlm.convert.tokenizer_files import TokenizerFiles, quiet_transformers
from internlm.data.tokenize.special_tokens import GENERATION, eos_ids
from internlm.model.huggingface.to_config import transformers_config_json
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.optional_packages import why_unusable
from internlm.utils.storage import StoragePath

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = get_logger(__name__)


def convert_to_gguf(
    checkpoint: StoragePath,
    out: Path,
    *,
    file_type: str,
    tokenizer: StoragePath | None = None,
    pre_tokenizer: str | None = None,
) -> Exported:
    """Write a GGUF file, which gets its name once it is complete.

    Args:
        checkpoint: a checkpoint, or a save folder, whose newest complete checkpoint is converted.
        out: the file; must not exist.
        file_type: one of `gguf_types.TYPES`, for matrices; vectors are f32.
        tokenizer: of the training data; None: the one that `convert_to_hf` exports.
        pre_tokenizer: its name in llama.cpp; None: by its pattern.

    Raises:
        CheckpointError: the file exists, the checkpoint is incomplete or damaged, its tokenizer is not the one that
            made the training data, or a value overflows f16.
        ConfigError: the package gguf is missing, or llama.cpp has no such model or tokenizer.
    """
    reason = why_unusable("gguf")
    if reason is not None:
        raise ConfigError(f"to-gguf writes with the package gguf: {reason}; pip install 'internlm[gguf]'")
    if out.exists():
        raise CheckpointError(f"'{out}' exists; remove it, or give another --out")
    source = undamaged(checkpoint)
    config = read_config(source)
    if config.model_type in (HF_CLASS, "LLAVA"):
        raise ConfigError(
            f"model_type '{config.model_type}' is not written to GGUF; export it with `internlm convert to-hf` and use "
            "convert_hf_to_gguf.py of llama.cpp, if it knows the class"
        )
    architecture, left_out = without_multi_token_layers(architecture_of(config), f"{source}: {config.model_type}")
    model = gguf_model(architecture, config.model_type)
    exported = files_to_export(source, config, tokenizer, with_code=False)
    vocabulary = gguf_vocabulary(exported, architecture.vocab_size, pre_tokenizer)
    tensors = hf_tensors(TensorReader(source), architecture, "transformers", None, left_out)
    temporary = out.with_name(f".writing-{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(temporary, source, config, model, tensors, vocabulary, exported, file_type)
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(source, exported.tokenizer)


def _write(
    file: Path,
    source: StoragePath,
    config: Config,
    model: GgufModel,
    tensors: Mapping[str, LazyTensor],
    vocabulary: GgufVocabulary,
    exported: TokenizerFiles,
    file_type: str,
) -> None:
    from gguf import GGUFWriter, LlamaFileType
    from gguf.constants import GGML_QUANT_VERSION

    writer = GGUFWriter(file, model.name)
    writer.add_type("model")
    writer.add_name(config.JOB_NAME)
    writer.add_file_type(LlamaFileType["ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    kinds: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in model.metadata.items():
        kinds[type(value)](key, value)
    _add_vocabulary(writer, vocabulary)
    _add_special_tokens(writer, exported, transformers_config_json(model.architecture, config.model_type))
    types = {name: type_of(tensor.shape, file_type) for name, tensor in tensors.items()}
    if model.rope_factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, model.rope_factors.shape, _float32(), model.rope_factors.nbytes)
    for name, tensor in tensors.items():
        _add_tensor_info(writer, gguf_name(name), tensor.shape, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if model.rope_factors is not None:
        writer.write_tensor_data(model.rope_factors.numpy())
    for name, tensor in tensors.items():
        weight = model.weight(name, tensor.read())
        cast = finite(weight, name, f"'{source}'", torch_dtype(types[name]))
        writer.write_tensor_data(stored(cast.contiguous(), types[name]))
    writer.close()
    numbers = ", ".join(f"{number} in {name}" for name, number in sorted(Counter(types.values()).items()))
    logger.info("wrote %s of %s, tokenizer %s (%s)", numbers, model.name, vocabulary.model, vocabulary.pre)


def _add_tensor_info(writer: GGUFWriter, name: str, shape: tuple[int, ...], stored_as: str) -> None:
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape

    raw = ggml_type(stored_as)
    if stored_as == "q8_0":
        shape = quant_shape_to_byte_shape(shape, raw)
    dtype = np.dtype({"q8_0": np.uint8, "f32": np.float32}.get(stored_as, np.uint16))
    writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize, raw)


def _add_vocabulary(writer: GGUFWriter, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)


def _add_special_tokens(writer: GGUFWriter, exported: TokenizerFiles, values: dict[str, Any]) -> None:
    """Ids that begin and end a text, whether bos and eos are put there, and the chat template."""
    from transformers import AutoTokenizer

    generation = json.loads(exported.files.get(GENERATION, b"{}"))
    ends = [*dict.fromkeys((*eos_ids(exported.ids, exported.where), *eos_ids(generation, GENERATION)))]
    bos = exported.ids.get("bos_token_id")
    if bos is not None:
        writer.add_bos_token_id(bos)
    for add, id in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False):
        add(id)
    if len(ends) > 3:
        logger.warning("%s: the file has room for three ids that end a text: without %s", GENERATION, ends[3:])
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        for name, data in {**exported.files, CONFIG: json.dumps(values, default=str).encode()}.items():
            Path(folder, name).write_bytes(data)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and ids[0] == bos)
    writer.add_add_eos_token(bool(ends) and ids[-1] == ends[0])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _float32() -> Any:
    import numpy as np

    return np.dtype(np.float32)
