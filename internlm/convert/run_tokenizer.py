"""The tokenizer that is exported with the weights of a checkpoint: that of its training data."""

from __future__ import annotations

from pathlib import Path

from internlm.checkpoint.data_tokenizer import KnownTokenizer, trained_with
from internlm.config.schema import Config
from internlm.convert.hf_folder import HF_FILES
from internlm.convert.tokenizer_files import (
    TokenizerFiles,
    generation_config,
    imported_files,
    tokenizer_files,
    with_generation_config,
)
from internlm.data.tokenize.fingerprint import same_ids, tokenizer_fingerprint
from internlm.data.tokenize.special_tokens import GENERATION
from internlm.utils.errors import CheckpointError, DataError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath, storage_path

logger = get_logger(__name__)


def files_to_export(
    checkpoint: StoragePath, config: Config, tokenizer: StoragePath | None, *, with_code: bool
) -> TokenizerFiles:
    """The tokenizer of a checkpoint with the files beside it.

    Args:
        checkpoint: a checkpoint.
        config: of its run.
        tokenizer: None: the files that the checkpoint was imported with, else those of data.tokenizer_path of the run.
        with_code: include the code of an imported model.

    Raises:
        CheckpointError: it is not the tokenizer that made the training data, or `tokenizer` does not exist.
        DataError: `tokenizer` cannot be read.
    """
    if tokenizer is not None:
        found = with_generation_config(tokenizer_files(tokenizer), generation_config(checkpoint))
    else:
        found = imported_files(checkpoint / HF_FILES, with_code=with_code)
        if not set(found.files) - {GENERATION}:
            found = with_generation_config(tokenizer_of_run(config), generation_config(checkpoint))
    _check_trained_with(checkpoint, found)
    return found


def tokenizer_of_run(config: Config) -> TokenizerFiles:
    """The files of data.tokenizer_path; none, with a warning, if they cannot be read."""
    path = config.data.tokenizer_path
    if path is None:
        return TokenizerFiles()
    try:
        return tokenizer_files(storage_path(Path(path)))
    except (CheckpointError, DataError) as error:
        # Weights are useful without a tokenizer, whose folder may have been moved since the run.
        logger.warning("the weights are exported without a tokenizer: data.tokenizer_path: %s", error)
        return TokenizerFiles()


def _check_trained_with(checkpoint: StoragePath, exported: TokenizerFiles) -> None:
    known = trained_with(checkpoint)
    if known is None or exported.tokenizer is None:
        return
    found = KnownTokenizer(tokenizer_fingerprint(exported.tokenizer), exported.where, exported.tokenizer.vocab_size)
    if not same_ids(known.fingerprint, found.fingerprint):
        raise CheckpointError(
            f"'{checkpoint}' was trained on the ids of another tokenizer: {known.against(found)}. Give that one with "
            "--tokenizer, or --no-tokenizer"
        )
