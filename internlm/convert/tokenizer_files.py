"""The tokenizer files that are exported with weights, and the token ids in their configs.

A served model must get the ids it was trained on. So transformers' reading of the files is compared with the tokenizer
that made the training data. If they differ, the tokenizer is written in another form that transformers reads correctly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm.convert.hf_folder import CONFIG, HF_FILES, parse_json, read_json, side_files
from internlm.convert.sentencepiece_json import sentencepiece_json
from internlm.data.tokenize.probes import first_difference, special_texts
from internlm.data.tokenize.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm.data.tokenize.special_tokens import ADDED, GENERATION, MAP, eos_ids, own_code
from internlm.data.tokenize.special_tokens import CONFIG as TOKENIZER_CONFIG
from internlm.data.tokenize.text_tokenizer import (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TextTokenizer,
    TransformersTokenizer,
    load_tokenizer,
)
from internlm.utils.errors import CheckpointError, DataError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERIC_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers that uses a tokenizer.json unchanged; others rebuild it by rules of their own."""
_SIDES = ("the tokenizer of training", "transformers")
_ADDING_BOS = ("Llama", "CodeLlama", "Gemma")
"""Name prefixes of classes that prepend bos to a text unless their config disables it."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The files to export with weights.

    Attributes:
        files: name -> content.
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, as far as they are known.
        tokenizer: the tokenizer that the files represent; None if there is none.
        where: location of the files, for messages.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: TextTokenizer | None = None
    where: str = ""


def imported_files(folder: StoragePath, *, with_code: bool) -> TokenizerFiles:
    """The files of the Hugging Face folder that a checkpoint was imported from.

    Args:
        folder: `<checkpoint>/hf`.
        with_code: include the code of the model; that of a tokenizer is always included.
    """
    files = side_files(folder)
    config = json.loads(files.pop(CONFIG, b"{}"))
    included = {
        name: data
        for name, data in files.items()
        if with_code or not name.endswith(".py") or name.startswith("tokenization")
    }
    ids = {name: config[name] for name in IDS if config.get(name) is not None}
    tokenizer = None
    if any(name in included for name in (TOKENIZER_JSON, TOKENIZER_MODEL, TOKENIZER_CONFIG)):
        try:
            with tempfile.TemporaryDirectory() as copy:
                tokenizer = load_tokenizer(_write(included, Path(copy)))
        except DataError as error:
            logger.warning("%s: the tokenizer is copied, but its ids are not compared: %s", folder, error)
    return TokenizerFiles(included, ids, tokenizer, str(folder))


def tokenizer_files(path: StoragePath) -> TokenizerFiles:
    """The files of a tokenizer: a Hugging Face folder, a tokenizer.json, or a SentencePiece .model.

    Raises:
        CheckpointError: the path does not exist, or is not local.
        DataError: the tokenizer cannot be read.
    """
    if not path.is_local:
        raise CheckpointError(f"{path}: tokenizers are only read from a local disk; copy it first")
    if path.is_folder():
        files = {
            name: data
            for name, data in side_files(path).items()
            if name != CONFIG and (not name.endswith(".py") or "tokeniz" in name)
        }
    elif path.is_file():
        files = _single_file(path.local)
    else:
        raise CheckpointError(f"{path}: no such tokenizer; expected a folder, a tokenizer.json or a .model file")
    tokenizer = load_tokenizer(path.local)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    known = {name: value for name, value in ids.items() if value is not None}
    return TokenizerFiles(files, known, tokenizer, str(path))


def generation_config(checkpoint: StoragePath) -> dict[str, Any]:
    """The generation config of the imported folder that a checkpoint descends from; empty if there is none.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    path = checkpoint / HF_FILES / GENERATION
    return read_json(path) if path.is_file() else {}


def generation_eos_ids(checkpoint: StoragePath) -> tuple[int, ...]:
    """The end-of-text ids of `generation_config`.

    Raises:
        CheckpointError, DataError: the file is malformed.
    """
    return eos_ids(generation_config(checkpoint), str(checkpoint / HF_FILES / GENERATION))


def with_generation_config(exported: TokenizerFiles, imported: Mapping[str, Any]) -> TokenizerFiles:
    """Add the generation config that came with the weights, with the tokenizer's own eos as a further end of text.

    Raises:
        DataError: a generation config has invalid ids.
        CheckpointError: a generation config is not a JSON object.
    """
    values = dict(imported)
    if not values and GENERATION in exported.files:
        values = parse_json(exported.files[GENERATION], f"{exported.where}: {GENERATION}")
    if not values:
        return exported
    own = () if exported.tokenizer is None or exported.tokenizer.eos_id is None else (exported.tokenizer.eos_id,)
    ends = list(dict.fromkeys((*own, *eos_ids(values, GENERATION))))
    if ends:
        values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    content = (json.dumps(values, indent=2) + "\n").encode()
    return dataclasses.replace(exported, files={**exported.files, GENERATION: content})


def equivalent_files(exported: TokenizerFiles, config: Mapping[str, Any], *, with_code: bool) -> Mapping[str, bytes]:
    """The files, or another form of them, from which transformers reads a tokenizer equivalent to `exported.tokenizer`.

    Args:
        exported: the files and the tokenizer that they represent.
        config: the config.json of the exported folder.
        with_code: allow a tokenizer that exists only as code; its ids are not compared, as the code is not run.

    Raises:
        CheckpointError: the tokenizer has more tokens than the model, or transformers gives other ids for every form.
    """
    tokenizer, where = exported.tokenizer, exported.where
    if tokenizer is None:
        return exported.files
    if tokenizer.vocab_size > config["vocab_size"]:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model only {config['vocab_size']:,}: it "
            "is not the one that made the training data"
        )
    key = _key(exported, config, with_code)
    if key not in _CACHE:
        _CACHE.clear()
        _CACHE[key] = _find_equivalent(exported, tokenizer, config, with_code)
    return _CACHE[key]


_CACHE: dict[str, Mapping[str, bytes]] = {}
"""The last result of `equivalent_files`: a run exports repeatedly with the same tokenizer."""


def _key(exported: TokenizerFiles, config: Mapping[str, Any], with_code: bool) -> str:
    digest = hashlib.sha256(json.dumps([with_code, config], sort_keys=True, default=str).encode())
    for name, data in sorted(exported.files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


def _find_equivalent(
    exported: TokenizerFiles, tokenizer: TextTokenizer, config: Mapping[str, Any], with_code: bool
) -> Mapping[str, bytes]:
    files, where = exported.files, exported.where
    with tempfile.TemporaryDirectory() as folder:
        copy = _write(files, Path(folder))
        code = own_code(copy)
        if code is not None and with_code:
            logger.warning("%s: the tokenizer is custom code (%s): its ids are not compared", where, code)
            return files
        difference = _difference(files, config, tokenizer)
        if difference is None:
            return files
        generic = _as_generic(files, tokenizer, copy)
    if generic is None:
        raise CheckpointError(_refusal(where, difference))
    remaining = _difference(generic, config, tokenizer)
    if remaining is not None:
        raise CheckpointError(_refusal(where, remaining))
    logger.warning(
        "%s: transformers would give other ids than the training data has: %s. Written as a %s of class %s, which "
        "gives the same ids",
        *(where, difference, TOKENIZER_JSON, _GENERIC_CLASS),
    )
    return generic


def _refusal(where: str, difference: str) -> str:
    return (
        f"{where}: a model served by transformers would get other ids than it was trained on: {difference}. Give "
        "another tokenizer with --tokenizer PATH, or export without one with --no-tokenizer"
    )


def _difference(files: Mapping[str, bytes], config: Mapping[str, Any], trained: TextTokenizer) -> str | None:
    """Describe how transformers' reading of the files differs from `trained`; None if it does not."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        copy = _write({**files, CONFIG: json.dumps(config, default=str).encode()}, Path(folder))
        try:
            theirs = TransformersTokenizer(copy, trust_remote_code=False)
        except DataError as error:
            return str(error).replace(folder, "it")
        except Exception as error:  # the class named in the files may raise anything
            return f"transformers cannot read it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if theirs.eos_id != trained.eos_id:
            return f"a text ends with token {trained.eos_id} by {_SIDES[0]} and with {theirs.eos_id} by {_SIDES[1]}"
        difference = first_difference(trained, theirs, _SIDES)
        if difference is not None:
            return difference
        special = first_difference(trained, theirs, _SIDES, special_texts(trained))
    if special is None:
        return None
    if isinstance(trained, SentencePieceTokenizer) and not trained.added:
        # Training matches special tokens in a text only if a file lists them; transformers always does.
        logger.info("special tokens spelled out in a text are single tokens in transformers, but not in training")
        return None
    return special


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' warnings about files that are only compared."""
    from transformers.utils import logging as library

    before = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(before)


def _as_generic(files: Mapping[str, bytes], tokenizer: TextTokenizer, folder: Path) -> dict[str, bytes] | None:
    """The tokenizer as a tokenizer.json that transformers uses unchanged; None if it has no such form."""
    config = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    pieces = tokenizer.pieces()
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    named = {key: None if id is None else pieces[id] for key, id in ends.items()}
    if isinstance(tokenizer, SentencePieceTokenizer):
        adds_bos = config.get("add_bos_token", str(config.get("tokenizer_class", "")).startswith(_ADDING_BOS))
        adds = (adds_bos, config.get("add_eos_token", False))
        before, after = (content if added else None for content, added in zip(named.values(), adds, strict=True))
        content = sentencepiece_json(folder / TOKENIZER_MODEL, tokenizer.added, (before, after))
    elif TOKENIZER_JSON in files:
        content = files[TOKENIZER_JSON]
    else:
        return None
    config |= {"tokenizer_class": _GENERIC_CLASS, **named}
    for key in ("auto_map", "added_tokens_decoder", "legacy"):
        config.pop(key, None)
    replaced = (MAP, ADDED, TOKENIZER_CONFIG)  # tokenizer.json and the new config contain everything
    other = {name: data for name, data in files.items() if name not in replaced and not name.startswith("tokenization")}
    return {**other, TOKENIZER_JSON: content, TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _write(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _single_file(path: Path) -> dict[str, bytes]:
    """The file under the name that transformers expects, its neighbors, and a config that names the class to use."""
    is_json = path.suffix == ".json"
    files = {TOKENIZER_JSON if is_json else TOKENIZER_MODEL: path.read_bytes()}
    for name in (TOKENIZER_CONFIG, MAP, ADDED, GENERATION):
        if path.with_name(name).is_file():
            files[name] = path.with_name(name).read_bytes()
    if TOKENIZER_CONFIG not in files:
        ours = load_tokenizer(path)
        pieces = ours.pieces()
        values: dict[str, Any] = {"tokenizer_class": _GENERIC_CLASS if is_json else "LlamaTokenizer"}
        for key, token in (("bos_token", ours.bos_id), ("eos_token", ours.eos_id)):
            if token is not None:
                values[key] = pieces[token]
        files[TOKENIZER_CONFIG] = json.dumps(values, indent=2).encode()
    return files
