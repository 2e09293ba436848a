"""Megatron datasets: read as they were written, damage is named, and they train like any other format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from internlm.data.batch import Batch
from internlm.data.documents.document_file import FileFormat
from internlm.data.documents.valid_sets import folder_sets
from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.loaders.valid_loader import build_valid_loaders
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.megatron_files.reader import DTYPES, HEADER, MAGIC, MegatronFile, index_path
from internlm.data.megatron_files.writer import MegatronWriter, smallest_dtype
from internlm.data.sources.open_source import open_source
from internlm.data.sources.sample_stream import ShuffledSource
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import DataError

DOCUMENTS = [[5, 6, 7], [], [1], list(range(2, 40))]


def write(path: Path, dtype: type[np.integer] = np.uint16, documents: list[list[int]] = DOCUMENTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with MegatronWriter(path, np.dtype(dtype)) as writer:
        for document in documents:
            writer.write(document)
    return path


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if np.dtype(dtype).kind in "iu"])
def test_what_is_written_is_read(dtype: type[np.integer], tmp_path: Path) -> None:
    file = MegatronFile(write(tmp_path / "a.bin", dtype), 40)
    assert len(file) == 4 and file.counts().tolist() == [3, 0, 1, 38] and file.counts(1, 3).tolist() == [0, 1]
    assert file.counts_of(np.array([3, 0])).tolist() == [38, 3]
    file.check_offsets(0, 4)
    for number, document in enumerate(DOCUMENTS):
        ids, loss_mask = file.read(number)
        assert ids.tolist() == document and loss_mask.all() and ids.dtype == np.int64
    assert file.read(3, 5, 9)[0].tolist() == DOCUMENTS[3][5:9]


def test_the_index_is_laid_out_as_the_format_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", np.int32, [[1, 2], [3]])
    expected = HEADER.pack(MAGIC, 1, 4, 2, 3)
    expected += np.array([2, 1], "<i4").tobytes() + np.array([0, 8], "<i8").tobytes()
    expected += np.array([0, 1, 2], "<i8").tobytes()
    assert index_path(path).read_bytes() == expected
    assert path.read_bytes() == np.array([1, 2, 3], "<i4").tobytes()
    assert smallest_dtype(65_499) == np.uint16 and smallest_dtype(65_500) == np.int32


def test_a_document_of_several_sequences_is_joined(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", np.int32, [[1, 2], [3], [4, 5, 6]])
    index = index_path(path).read_bytes()
    sequences = index[HEADER.size : HEADER.size + 3 * 12]
    bounds = np.array([0, 2, 3], "<i8").tobytes()
    index_path(path).write_bytes(HEADER.pack(MAGIC, 1, 4, 3, 3) + sequences + bounds)
    file = MegatronFile(path)
    assert file.counts().tolist() == [3, 3] and file.counts_of(np.array([0])).tolist() == [3]
    assert [file.read(number)[0].tolist() for number in (0, 1)] == [[1, 2, 3], [4, 5, 6]]
    assert file.read(0, 1, 3)[0].tolist() == [2, 3]


def test_modes_are_read_and_images_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin")
    index = index_path(path).read_bytes()
    index_path(path).write_bytes(index + bytes(4))
    assert MegatronFile(path).read(0)[0].tolist() == DOCUMENTS[0]
    index_path(path).write_bytes(index + bytes([0, 1, 0, 0]))
    with pytest.raises(DataError, match=r"a.idx: 1 of its 4 sequences are not text \(multimodal data\)"):
        MegatronFile(path)


def test_a_reader_of_tokenized_files_knows_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a.bin: a Megatron dataset, not a tokenized file .*; set data.type = 'megatron'"
    ):
        TokenizedFile(write(tmp_path / "a.bin"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: index_path(path).unlink(), "a.idx: no such file; a Megatron dataset is NAME.bin with NAME.idx"),
        (lambda path: index_path(path).write_bytes(b"TNTIDX\x00\x00" + b"\x00" * 40), "not an index of a Megatron"),
        (lambda path: index_path(path).write_bytes(HEADER.pack(MAGIC, 2, 8, 0, 1)), "version 2 of the format"),
        (lambda path: index_path(path).write_bytes(HEADER.pack(MAGIC, 1, 7, 0, 1)), "tokens of dtype float32"),
        (lambda path: index_path(path).write_bytes(index_path(path).read_bytes()[:-3]), "its header announces 4"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "document 3 has a sequence of 38 tokens at byte 8"),
    ],
)
def test_damage_is_named(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "a.bin")
    damage(path)
    with pytest.raises(DataError, match=message):
        MegatronFile(path).read(3)


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="document 3 at byte 82: token 39 at position 37 is outside the vocabulary of 39"
    ):
        MegatronFile(write(tmp_path / "a.bin"), 39).read(3)
    with pytest.raises(DataError, match="document 0 has ids that uint8 cannot hold"):
        write(tmp_path / "b.bin", np.uint8, [[256]])
    assert not (tmp_path / "b.bin").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path / "a.bin")


@pytest.mark.parametrize("packing", ["cut", "pack_sample_into_one", "unpacked"])
def test_its_batches_are_those_of_tokenized_files(packing: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("en/a", "cn/b"):
        documents = [random.integers(1, 100, random.integers(1, 30)).tolist() for _ in range(20)]
        write(tmp_path / "megatron" / f"{name}.bin", documents=documents)
        with TokenizedWriter(tmp_path / "tokenized" / f"{name}.bin") as writer:
            for document in documents:
                writer.write(document)

    def batches(format: FileFormat) -> tuple[list[str], list[Batch], dict[str, list[Batch]]]:
        folder = tmp_path / format.name
        source = open_source(
            folder,
            seq_len=8,
            micro_bsz=2,
            packing=packing,  # type: ignore[arg-type]
            vocab_size=100,
            min_length=2,
            format=format,
        )
        loader = build_train_loader(ShuffledSource(source, seed=1), micro_num=1)
        train = [next(loader) for _ in range(len(source) + 1)]
        loader.close()
        sets = build_valid_loaders(folder_sets(folder, format), seq_len=8, micro_bsz=2, vocab_size=100)
        return loader.type_names, train, {name: list(loader) for name, loader in sets.items()}

    types, train, valid = batches(MEGATRON)
    expected_types, expected_train, expected_valid = batches(TOKENIZED)
    assert types == expected_types == ["cn", "en"] and valid.keys() == expected_valid.keys() == {"cn", "en"}
    pairs = [*zip(train, expected_train, strict=True)]
    pairs += [pair for name in valid for pair in zip(valid[name], expected_valid[name], strict=True)]
    for batch, expected in pairs:
        for micro, other in zip(batch.micro_batches, expected.micro_batches, strict=True):
            for field in ("input_ids", "labels", "position_ids", "type_ids"):
                assert torch.equal(getattr(micro, field), getattr(other, field))
            assert micro.lengths == other.lengths
