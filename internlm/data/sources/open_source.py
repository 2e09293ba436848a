"""The source of samples that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from internlm.data.documents.document_file import FileFormat
from internlm.data.documents.folders import log_unread_files
from internlm.data.packing.sample import PACKINGS, Packing
from internlm.data.sources.document_source import DocumentSource
from internlm.data.sources.dummy import DummySource
from internlm.data.sources.sample_source import SampleSource
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.utils.errors import ConfigError


def open_source(
    folder: str | Path | None,
    *,
    seq_len: int,
    micro_bsz: int,
    packing: Packing,
    vocab_size: int,
    seed: int = 1024,
    min_length: int = 0,
    min_length_dict: Mapping[str, int] | None = None,
    skip_bad_documents: bool = False,
    fixed_random_dataset_seqlen: bool = True,
    format: FileFormat = TOKENIZED,
) -> SampleSource:
    """Open the source of the files of documents in `folder`, or a dummy source if it is None.

    Args:
        folder: see `find_train_files`.
        seq_len: maximum length of an attention segment, in tokens.
        micro_bsz: rows of a micro-batch; a packed sample has micro_bsz * seq_len tokens.
        packing: "cut" (use_packed_dataset True, pack_sample_into_one False), "pack_sample_into_one", or "unpacked"
            (use_packed_dataset False); see doc/data.md.
        vocab_size: ids must be smaller; checked as documents are read.
        seed: seed of dummy samples.
        min_length: minimum number of tokens; shorter documents are dropped.
        min_length_dict: type name -> minimum that replaces `min_length` for that type.
        skip_bad_documents: replace a document that cannot be read by padding of the same length, and log it.
        fixed_random_dataset_seqlen: whether all dummy documents have the same length.
        format: of the files in `folder`.

    Raises:
        DataError: the data is missing or malformed.
        ConfigError: `packing` is unknown.
    """
    if packing not in PACKINGS:
        raise ConfigError(f"packing = {packing!r}: expected one of {PACKINGS}")
    if folder is None:
        return DummySource(
            seq_len=seq_len,
            micro_bsz=micro_bsz,
            packing=packing,
            vocab_size=vocab_size,
            seed=seed,
            fixed_lengths=fixed_random_dataset_seqlen,
        )
    log_unread_files(folder, format)
    return DocumentSource(
        folder,
        format,
        seq_len=seq_len,
        micro_bsz=micro_bsz,
        packing=packing,
        vocab_size=vocab_size,
        min_length=min_length,
        min_length_dict=min_length_dict,
        skip_bad_documents=skip_bad_documents,
    )
