"""The formats of files of documents that a config names."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.data.documents.document_file import FileFormat
from internlm.data.images.image_documents import ImageDocumentFormat
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.initialize.images import image_settings


def file_format(config: Config) -> FileFormat:
    """The format of the files in the folders of a config, whose `data.type` is one of files of documents."""
    data = config.data
    arrays = ArrayFormat(data.array_dtype, data.array_separator)
    formats: tuple[FileFormat, ...] = (tokenized_format(config), MEGATRON, arrays)
    return next(each for each in formats if each.name == data.type)


def tokenized_format(config: Config) -> FileFormat:
    """The format of tokenized files, whose documents may have pictures with `data.is_multimodal`."""
    settings = image_settings(config)
    return TOKENIZED if settings is None else ImageDocumentFormat(settings)
