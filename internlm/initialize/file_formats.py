"""The formats of files of documents that a config names."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.data.documents.document_file import FileFormat
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.tokenized_files.file_format import TOKENIZED


def file_format(config: Config) -> FileFormat:
    """The format of the files in the folders of a config, whose `data.type` is one of files of documents."""
    data = config.data
    formats: tuple[FileFormat, ...] = (TOKENIZED, MEGATRON, ArrayFormat(data.array_dtype, data.array_separator))
    return next(each for each in formats if each.name == data.type)
