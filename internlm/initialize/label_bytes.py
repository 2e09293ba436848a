"""The bytes of the labels of each validation set of a run, from the tokenizer of its data."""

from __future__ import annotations

from pathlib import Path

from internlm.config.schema import Config
from internlm.core.communication.objects import from_main_rank
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.documents.label_bytes import LabelBytes, count_label_bytes
from internlm.data.documents.valid_sets import ValidSet
from internlm.data.tokenize.fingerprint import same_ids, tokenizer_fingerprint
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.data.tokenize.token_bytes import TokenBytes
from internlm.data.tokenized_files.tokenizer_record import read_record
from internlm.initialize.valid_sets import find_sets
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def label_bytes(config: Config, context: ParallelContext) -> dict[str, LabelBytes]:
    """Count the bytes of each validation set on the main rank; collective.

    Returns:
        Name of the set -> its bytes, without sets whose bytes are not known. A log line tells why.
    """
    return from_main_rank(context, lambda: _label_bytes(config))


def _label_bytes(config: Config) -> dict[str, LabelBytes]:
    sets = find_sets(config)
    if not sets:
        return {}
    if config.data.tokenizer_path is None:
        logger.info("validation has no bits per byte (bpb): data.tokenizer_path is not set")
        return {}
    try:
        tokenizer = load_tokenizer(Path(config.data.tokenizer_path))
        table = tokenizer.token_bytes()
    except DataError as error:
        logger.warning("validation has no bits per byte (bpb): the tokenizer: %s", error)
        return {}
    if table.normalization:
        logger.info(
            "bits per byte (bpb) count the bytes of text as the tokenizer normalizes it (%s)", table.normalization
        )
    fingerprint = tokenizer_fingerprint(tokenizer)
    results = {}
    for each in sets:
        try:
            results[each.name] = _of_set(each, tokenizer, table, fingerprint, config)
        except (DataError, OSError) as error:
            logger.warning("validation set '%s' has no bits per byte (bpb): %s", each.name, error)
    return results


def _of_set(
    valid_set: ValidSet, tokenizer: TextTokenizer, table: TokenBytes, fingerprint: str, config: Config
) -> LabelBytes:
    for path in valid_set.paths:
        record = read_record(path)
        if record is not None and not same_ids(record.fingerprint, fingerprint):
            raise DataError(f"{path}: made by another tokenizer than data.tokenizer_path: {record.tokenizer}")
    image_token_id = config.model.image_token_id if config.data.is_multimodal else None
    files = valid_set.open(config.model.vocab_size)
    counted = count_label_bytes(files, table, tokenizer.decode, fingerprint, image_token_id)
    if counted.bytes == 0:
        raise DataError("its labels are special tokens, which have no bytes")
    return counted
