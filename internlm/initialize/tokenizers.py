"""Compares the tokenizer of a run's data with those of its config and of the checkpoint it starts from.

Also chooses the files that checkpoints store about it: the identity of the tokenizer that made the training data, and
the generation config of imported weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from internlm.checkpoint.data_tokenizer import DATA_TOKENIZER, KnownTokenizer, trained_with
from internlm.config.schema import Config
from internlm.config.schema.valid_folders import DOCUMENT_TYPES
from internlm.convert.hf_folder import HF_FILES
from internlm.data.tokenize.fingerprint import same_ids, tokenizer_fingerprint
from internlm.data.tokenize.special_tokens import GENERATION
from internlm.data.tokenize.text_tokenizer import TOKENIZER_JSON, TOKENIZER_MODEL, load_tokenizer
from internlm.data.tokenized_files.tokenizer_record import (
    TokenizerRecord,
    common_record,
    read_record,
    tokenizer_records,
)
from internlm.initialize.data_folders import train_folder
from internlm.initialize.file_formats import file_format
from internlm.initialize.train_sources import train_sources
from internlm.initialize.valid_sets import find_sets
from internlm.utils.errors import ConfigError, DataError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath, storage_path

logger = get_logger(__name__)


def data_tokenizer(config: Config) -> KnownTokenizer | None:
    """The tokenizer that made the training data, or that of `data.tokenizer_path` if the data does not record one.

    Raises:
        ConfigError: the data was made by different tokenizers, or by another than `data.tokenizer_path`, or by one with
            more ids than the model. With `data.check_tokenizer = False` the first two are logged instead.
        DataError: a folder of data is missing, or a record in it is malformed.
    """
    data = config.data
    # Rows are tokenized by data.tokenizer_path itself.
    paths: list[Path] = []
    for source in train_sources(config):
        folder = train_folder(source.config)
        if folder is not None and source.config.data.type in DOCUMENT_TYPES:
            paths += tokenizer_records(folder, file_format(source.config))
    paths += [path for each in find_sets(config, with_rows=False) for path in each.paths]
    record = _common(paths, data.check_tokenizer)
    named = None if data.tokenizer_path is None else _at(storage_path(data.tokenizer_path))
    found = (
        None
        if record is None
        else KnownTokenizer(record.fingerprint, f"{record.tokenizer} (of the data)", record.vocab_size)
    )
    for known in (found, named):
        if known is not None and known.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"{known.where}: the tokenizer has {known.vocab_size:,} ids, model.vocab_size is only "
                f"{config.model.vocab_size:,}"
            )
    if found is not None and named is not None:
        _compare(found, named, "data.tokenizer_path", config)
    return found or named


def compare_with_checkpoint(config: Config, path: StoragePath, known: KnownTokenizer | None) -> dict[str, str]:
    """Compare the tokenizer of a run's data with that of the weights it starts from.

    Args:
        path: a native checkpoint, or a folder of `ckpt_type` "hf".
        known: from `data_tokenizer`.

    Returns:
        Files that every checkpoint of the run stores: name -> content.

    Raises:
        ConfigError: the tokenizers give different ids, unless `data.check_tokenizer = False`.
    """
    theirs = _of_checkpoint(path)
    if theirs is not None and known is not None:
        _compare(known, theirs, f"the checkpoint '{path}'", config)
    stored = known or theirs
    files = {} if stored is None else {DATA_TOKENIZER: stored.to_json()}
    for place in (path / HF_FILES / GENERATION, path / GENERATION):
        if place.is_file():
            return files | {f"{HF_FILES}/{GENERATION}": place.read_text()}
    return files


def _of_checkpoint(path: StoragePath) -> KnownTokenizer | None:
    recorded = trained_with(path)
    if recorded is not None:
        return recorded
    for folder in (path / HF_FILES, path):
        if any((folder / name).is_file() for name in (TOKENIZER_JSON, TOKENIZER_MODEL)):
            return _at(folder)
    return None


def _compare(known: KnownTokenizer, other: KnownTokenizer, what: str, config: Config) -> None:
    if same_ids(known.fingerprint, other.fingerprint):
        return
    message = f"the tokenizer of {what} differs from that of the data: {known.against(other)}"
    if config.data.check_tokenizer:
        raise ConfigError(f"{message}. If the ids mean the same, set data.check_tokenizer = False")
    logger.info("%s", message)


def _common(paths: Sequence[Path], checked: bool) -> TokenizerRecord | None:
    try:
        return common_record({path: read_record(path) for path in paths})
    except DataError as error:
        if checked:
            raise DataError(f"{error}. If the ids mean the same, set data.check_tokenizer = False") from error
        logger.info("%s", error)
        return None


def _at(path: StoragePath) -> KnownTokenizer | None:
    """The tokenizer at `path`; None, and a log line, if it cannot be read."""
    if not path.is_local:
        logger.info("%s: not compared with the tokenizer of the data: tokenizers are only read from a local disk", path)
        return None
    try:
        tokenizer = load_tokenizer(Path(path.local))
    except DataError as error:
        logger.warning("the tokenizer is not compared with that of the data: %s", error)
        return None
    return KnownTokenizer(tokenizer_fingerprint(tokenizer), str(path), tokenizer.vocab_size)
