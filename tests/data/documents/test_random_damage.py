"""Random damage to files of documents gives a DataError or other ids, never another exception."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from internlm.data.documents.document_file import DocumentFile
from internlm.data.documents.document_index import DocumentIndex, summarize
from internlm.data.megatron_files.reader import MegatronFile, index_path
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.token_arrays.reader import TokenArray, ends_path
from internlm.data.token_arrays.writer import ArrayWriter
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.writer import TokenizedWriter, meta_path
from internlm.utils.errors import DataError

DOCUMENTS = [np.arange(1, 1 + length) for length in (3, 0, 7, 1, 20)]


def read_all(open_file: Callable[[], DocumentFile]) -> bool:
    """Do everything that a run does; whether the damage was found."""
    try:
        file = open_file()
        summarize(file, 0)
        DocumentIndex(file, 0)
        for number in range(len(file)):
            ids, loss_mask = file.read(number)
            assert (
                len(ids) == len(loss_mask) == file.counts(number, number + 1)[0] == file.counts_of(np.array([number]))
            )
            file.read(number, 1, 3)
    except DataError as error:
        assert "/a." in str(error)
        return True
    return False


@pytest.mark.parametrize("kind", ["megatron", "ds", "npy", "tokenized"])
def test_damage_is_a_data_error(kind: str, tmp_path: Path) -> None:
    if kind == "megatron":
        path = tmp_path / "a.bin"
        with MegatronWriter(path, np.dtype(np.uint16)) as megatron:
            for number, document in enumerate(DOCUMENTS):
                megatron.write(document, [2, len(document) - 2] if number % 2 == 0 else None)
        damaged = index_path(path)
    elif kind == "tokenized":
        path = tmp_path / "a.bin"
        with TokenizedWriter(path) as tokenized:
            for document in DOCUMENTS:
                tokenized.write(document)
        damaged = meta_path(path)
    else:
        path = tmp_path / f"a.{kind}"
        with ArrayWriter(path, np.dtype(np.uint16), 0) as arrays:
            for document in DOCUMENTS:
                arrays.write(document)
        damaged = ends_path(path) if kind == "ds" else path

    def open_file() -> DocumentFile:
        if kind == "megatron":
            return MegatronFile(path, 100)
        if kind == "tokenized":
            return TokenizedFile(path, 100)
        return TokenArray(path, 100, dtype="uint16" if kind == "ds" else None, separator=0)

    assert not read_all(open_file)
    good = damaged.read_bytes()
    random = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        content = bytearray(good)
        if random.random() < 0.2:
            content = content[: random.integers(len(content))]
        for position in random.integers(len(content), size=random.integers(1, 4)) if content else ():
            content[position] = random.integers(256)
        damaged.write_bytes(content)
        found += read_all(open_file)
    assert found > 150
