"""The files are those of megatron-core, in both directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets import indexed_dataset as oracle

from internlm.data.megatron_files.reader import MegatronFile, index_path
from internlm.data.megatron_files.writer import MegatronWriter, smallest_dtype
from internlm.utils.errors import DataError

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]
DOCUMENTS = [[[1, 2], [3]], [[4]], [[]], [[5, 6, 7], [], [8]], [list(range(100))]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_equal_to_the_bit_and_read_alike(dtype: type[np.integer], tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.bin", tmp_path / "ours.bin"
    builder = oracle.IndexedDatasetBuilder(str(theirs), dtype=dtype)
    with MegatronWriter(ours, np.dtype(dtype)) as writer:
        for sequences in DOCUMENTS:
            tokens = [token for sequence in sequences for token in sequence]
            lengths = [len(sequence) for sequence in sequences]
            builder.add_document(torch.tensor(tokens, dtype=torch.int64), lengths)
            writer.write(tokens, lengths)
    builder.finalize(str(index_path(theirs)))
    assert ours.read_bytes() == theirs.read_bytes()
    assert index_path(ours).read_bytes() == index_path(theirs).read_bytes()

    dataset, file = oracle.IndexedDataset(str(ours.with_suffix(""))), MegatronFile(theirs)
    assert len(file) == len(dataset.document_indices) - 1 == len(DOCUMENTS)
    for number, sequences in enumerate(DOCUMENTS):
        first, last = dataset.document_indices[number : number + 2]
        read = [dataset[index].tolist() for index in range(first, last)]
        assert read == sequences
        assert file.read(number)[0].tolist() == [token for sequence in read for token in sequence]
        assert file.sequence_lengths(number).tolist() == [len(sequence) for sequence in read]


@pytest.mark.parametrize("image", [0, 1])
def test_sequences_of_multimodal_datasets_must_be_text(tmp_path: Path, image: int) -> None:
    builder = oracle.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32, multimodal=True)
    for item, mode in ([1, 2], 0), ([3], image):
        builder.add_item(torch.tensor(item), mode)
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    if image:
        with pytest.raises(DataError, match=r"1 of its 2 sequences are not text \(multimodal data\)"):
            MegatronFile(tmp_path / "a.bin")
    else:
        assert MegatronFile(tmp_path / "a.bin").read(0)[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 200_000])
def test_the_dtype_of_a_vocabulary_is_theirs(vocab_size: int) -> None:
    assert smallest_dtype(vocab_size) == oracle.DType.optimal_dtype(vocab_size)


def test_an_empty_dataset_is_the_same(tmp_path: Path) -> None:
    oracle.IndexedDatasetBuilder(str(tmp_path / "theirs.bin")).finalize(str(tmp_path / "theirs.idx"))
    with MegatronWriter(tmp_path / "ours.bin", np.dtype(np.int32)):
        pass
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert len(MegatronFile(tmp_path / "ours.bin")) == 0
