"""The files of a tokenizer that are put beside exported weights, and the token ids that go into their configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm.convert.hf_folder import side_files
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TokenizerFiles:
    """What goes beside the weights.

    Attributes:
        files: name -> content.
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, as far as they are known.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)


def imported_files(folder: StoragePath, *, with_code: bool) -> TokenizerFiles:
    """Those that lay beside the weights a checkpoint was imported from.

    Args:
        folder: `<checkpoint>/hf`.
        with_code: keep the code of the model; that of a tokenizer always stays.
    """
    files = side_files(folder)
    config = json.loads(files.pop("config.json", b"{}"))
    kept = {
        name: data
        for name, data in files.items()
        if with_code or not name.endswith(".py") or name.startswith("tokenization")
    }
    return TokenizerFiles(kept, {name: config[name] for name in _IDS if config.get(name) is not None})


def tokenizer_files(path: StoragePath) -> TokenizerFiles:
    """Those of a tokenizer: a Hugging Face folder, a tokenizer.json, or a SentencePiece .model.

    Raises:
        CheckpointError: there is none.
        DataError: it cannot be read.
    """
    if not path.is_local:
        raise CheckpointError(f"{path}: a tokenizer is read from a local disk only; copy it first")
    if path.is_folder():
        files = {
            name: data
            for name, data in side_files(path).items()
            if name not in ("config.json", "generation_config.json") and (not name.endswith(".py") or "tokeniz" in name)
        }
    elif path.is_file():
        files = _single_file(path.local)
    else:
        raise CheckpointError(f"{path}: no such tokenizer; expected a folder, a tokenizer.json or a .model file")
    tokenizer = load_tokenizer(path.local)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return TokenizerFiles(files, {name: value for name, value in ids.items() if value is not None})


def _single_file(path: Path) -> dict[str, bytes]:
    """The file under the name that transformers looks for, and which of its classes reads it."""
    config_path = path.with_name("tokenizer_config.json")
    is_json = path.suffix == ".json"
    files = {"tokenizer.json" if is_json else "tokenizer.model": path.read_bytes()}
    if config_path.is_file():
        files["tokenizer_config.json"] = config_path.read_bytes()
        return files
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast" if is_json else "LlamaTokenizer"}
    if is_json:
        from tokenizers import Tokenizer

        library, ours = Tokenizer.from_file(str(path)), load_tokenizer(path)
        for key, token in (("bos_token", ours.bos_id), ("eos_token", ours.eos_id)):
            if token is not None:
                values[key] = library.id_to_token(token)
    files["tokenizer_config.json"] = json.dumps(values, indent=2).encode()
    return files
