"""Arrays of token ids: .npy, raw integers and datatrove's files, with their documents."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from internlm.data.documents.label_bytes import count_label_bytes
from internlm.data.packing.sample import PACKINGS, Packing
from internlm.data.sources.open_source import open_source
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.token_arrays.reader import TokenArray
from internlm.data.tokenize.token_bytes import TokenBytes
from internlm.utils.errors import DataError

IDS = [5, 6, 0, 7, 0, 0, 8, 9]
BY_SEPARATOR = [[5, 6, 0], [7, 0], [0], [8, 9]]


def documents_of(array: TokenArray) -> list[list[int]]:
    documents = [array.read(number)[0].tolist() for number in range(len(array))]
    assert array.counts().tolist() == [len(document) for document in documents]
    assert array.counts_of(np.arange(len(array))[::-1]).tolist() == [len(each) for each in documents[::-1]]
    return documents


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_a_npy_knows_its_dtype(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(IDS, dtype))
    assert documents_of(TokenArray(tmp_path / "a.npy", 10)) == [IDS]
    assert documents_of(TokenArray(tmp_path / "a.npy", 10, separator=0)) == BY_SEPARATOR
    assert TokenArray(tmp_path / "a.npy").read(0, 2, 5)[0].tolist() == IDS[2:5]


@pytest.mark.parametrize("name", ["train.bin", "part-0.npy"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_integers_need_a_dtype(dtype: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(np.array(IDS, dtype).tobytes())
    assert documents_of(TokenArray(path, 10, dtype=dtype, separator=0)) == BY_SEPARATOR
    with pytest.raises(
        DataError, match=r"raw integers without a header; set data.array_dtype .* to 'uint16' or 'uint32'"
    ):
        TokenArray(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"no whole number of {dtype}"):
        TokenArray(path, dtype=dtype)


def test_ends_beside_a_file_are_used(tmp_path: Path) -> None:
    path = tmp_path / "a.ds"
    path.write_bytes(np.array(IDS, "uint16").tobytes())
    (tmp_path / "a.ds.index").write_bytes(np.array([2, 2, 8], "<u8").tobytes())
    assert documents_of(TokenArray(path, dtype="uint16", separator=0)) == [IDS[:2], [], IDS[2:]]
    with pytest.raises(DataError, match=r"a.ds.index: the document ends do not ascend to the 4 tokens of a.ds"):
        TokenArray(path, dtype="uint32")


def write_with_mask(path: Path, has_loss: list[bool], ends: tuple[int, ...] = (3, 5, 6, 8)) -> Path:
    """IDS as datatrove's files, with a loss mask."""
    path.write_bytes(np.array(IDS, "uint16").tobytes())
    path.with_name(f"{path.name}.index").write_bytes(np.array(ends, "<u8").tobytes())
    path.with_name(f"{path.name}.loss").write_bytes(np.array(has_loss, "u1").tobytes())
    return path


def test_the_loss_mask_beside_a_file_is_that_of_each_document(tmp_path: Path) -> None:
    mask = [True, False, True, False, True, True, False, True]
    array = TokenArray(write_with_mask(tmp_path / "a.ds", mask), dtype="uint16")
    for number, (start, stop) in enumerate(pairwise((0, 3, 5, 6, 8))):
        ids, has_loss = array.read(number)
        assert ids.tolist() == IDS[start:stop] and has_loss.tolist() == mask[start:stop]
        for first in range(4):
            ids, has_loss = array.read(number, first, first + 2)
            part = slice(min(start + first, stop), min(start + first + 2, stop))
            assert ids.tolist() == IDS[part] and has_loss.tolist() == mask[part]
    (tmp_path / "a.ds.loss").write_bytes(b"1234567")
    with pytest.raises(DataError, match=r"a\.ds\.loss: 7 bytes for the 8 tokens of a\.ds"):
        TokenArray(tmp_path / "a.ds", dtype="uint16")


def test_another_loss_mask_is_another_version_of_the_file(tmp_path: Path) -> None:
    path = write_with_mask(tmp_path / "a.ds", [True] * 8)
    vocabulary = 10
    table = TokenBytes(
        np.ones(vocabulary, np.int64), np.zeros(vocabulary, np.bool_), np.zeros(vocabulary, np.bool_), "never"
    )

    def num_labels() -> int:
        file = TokenArray(path, vocabulary, dtype="uint16")
        return count_label_bytes([file], table, lambda ids: "a" * len(ids), "1-a").labels

    assert num_labels() == 4
    mask = tmp_path / "a.ds.loss"
    changed = mask.stat().st_mtime_ns + 10**9
    mask.write_bytes(bytes([0] * 7 + [1]))
    os.utime(mask, ns=(changed, changed))
    assert num_labels() == 1


def test_a_loss_mask_that_is_cut_in_mid_run_is_named(tmp_path: Path) -> None:
    write_with_mask(tmp_path / "a.ds", [True] * 8)
    source = open_source(
        tmp_path, seq_len=4, micro_bsz=1, packing="cut", vocab_size=10, format=ArrayFormat("uint16", None)
    )
    source.sample(0)
    (tmp_path / "a.ds.loss").write_bytes(b"1")
    with pytest.raises(DataError, match=r"a\.ds\.loss has 1 bytes, and had 8 when this run started"):
        source.sample(1)


def test_ends_are_found_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.data.token_arrays.reader._BLOCK", 3)
    np.save(tmp_path / "a.npy", np.array(IDS, "uint16"))
    assert documents_of(TokenArray(tmp_path / "a.npy", separator=0)) == BY_SEPARATOR


def test_wrong_ids_and_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([3, -1]))
    with pytest.raises(DataError, match="document 0 at byte 136: token 1 is -1, below 0"):
        TokenArray(tmp_path / "a.npy").read(0)
    np.save(tmp_path / "a.npy", np.array(IDS, "uint16"))
    with pytest.raises(DataError, match="document 0 at byte 142: token 7 is 9, outside the vocabulary of 9"):
        TokenArray(tmp_path / "a.npy", 9).read(0)
    with pytest.raises(DataError, match=r"an array of uint16, but data.array_dtype is 'uint32'"):
        TokenArray(tmp_path / "a.npy", dtype="uint32")
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"float64 of shape \(2, 2\); expected integers"):
        TokenArray(tmp_path / "a.npy")


def test_a_separator_that_never_occurs_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([5, 6, 7]))
    with pytest.raises(DataError, match=r"the id 3 \(data.array_separator\) does not occur in it"):
        TokenArray(tmp_path / "a.npy", separator=3)
    assert documents_of(TokenArray(tmp_path / "a.npy", separator=7)) == [[5, 6, 7]]


@pytest.mark.parametrize("position", range(10, 100, 9))
def test_a_damaged_header_is_named(position: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array(IDS))
    content = bytearray(path.read_bytes())
    content[position] ^= 0x9A
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npy is not a .*; copy it again"):
        TokenArray(path, 10).read(0)


def test_samples_of_a_file_cover_its_tokens(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 100, 64).astype("uint16")
    np.save(tmp_path / "a.npy", ids)
    source = open_source(tmp_path, seq_len=8, micro_bsz=2, packing="cut", vocab_size=100, format=ArrayFormat())
    assert np.concatenate([source.sample(number).input_ids for number in range(len(source))]).tolist() == ids.tolist()


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_index_of_another_separator_or_dtype_is_not_used(packing: Packing, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 100, 640).astype("uint16")
    formats = [ArrayFormat("uint16", separator) for separator in (None, 1, 2)] + [ArrayFormat("uint32")]

    def samples(folder: Path, format: ArrayFormat) -> list[list[int]]:
        source = open_source(folder, seq_len=8, micro_bsz=2, packing=packing, vocab_size=2**23, format=format)
        return [source.sample(number).input_ids.tolist() for number in range(len(source))]

    (tmp_path / "shared").mkdir()
    ids.tofile(tmp_path / "shared" / "a.bin")
    for number, format in enumerate([*formats, *formats]):
        alone = tmp_path / f"alone{number}"
        alone.mkdir()
        ids.tofile(alone / "a.bin")
        assert samples(tmp_path / "shared", format) == samples(alone, format)
