"""The source of samples that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from internlm.data.documents.document_file import FileFormat
from internlm.data.documents.folders import log_unread_files
from internlm.data.images.settings import ImageSettings
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle
from internlm.data.packing.sample import PACKINGS, Packing
from internlm.data.remote.mirror import local_folder
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
    document_mask: bool | None = None,
    fim: FillInTheMiddle | None = None,
    valid_fraction: float = 0.0,
    images: ImageSettings | None = None,
) -> SampleSource:
    """Open the source of the files of documents in `folder`, or a dummy source if it is None.

    Args:
        folder: see `find_train_files`; or the URL of one, see `local_folder`.
        seq_len: maximum length of an attention segment, in tokens.
        micro_bsz: rows of a micro-batch; a packed sample has micro_bsz * seq_len tokens.
        packing: "cut", "pack_sample_into_one", "unpacked" or "best_fit"; see doc/data.md.
        vocab_size: ids must be smaller; checked as documents are read.
        seed: seed of dummy samples.
        min_length: minimum number of tokens; shorter documents are dropped.
        min_length_dict: type name -> minimum that replaces `min_length` for that type.
        skip_bad_documents: replace a document that cannot be read by padding of the same length, and log it.
        fixed_random_dataset_seqlen: whether all dummy documents have the same length.
        format: of the files in `folder`.
        document_mask: whether attention stays within documents; None: the default of the packing.
        fim: fill-in-the-middle; not used for dummy data.
        valid_fraction: share of the documents of each file that are held out; not used for dummy data.
        images: of the placeholders of dummy data; `format` has those of files.

    Raises:
        DataError: the data is missing or malformed.
        ConfigError: `packing` is unknown or contradicts `document_mask`, or a sentinel of `fim` is outside the
            vocabulary.
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
            document_mask=document_mask,
            images=images,
        )
    folder = local_folder(folder)
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
        document_mask=document_mask,
        fim=fim,
        valid_fraction=valid_fraction,
    )
