"""The tokenized format: round trips, InternEvo's files, and every way a file can be wrong."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.writer import TokenizedWriter, encode_masked_line, meta_path, rebuild_meta
from internlm.utils.errors import DataError


def write(path, documents):
    with TokenizedWriter(path) as writer:
        for document in documents:
            writer.write(document)
    return path


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.tuples(st.integers(0, 2**31), st.booleans()), max_size=30), max_size=8),
    start=st.integers(0, 30),
    width=st.integers(0, 30),
)
def test_round_trip_with_masks_and_slices(tmp_path_factory, documents, start, width):
    path = tmp_path_factory.mktemp("round") / "a.bin"
    with TokenizedWriter(path) as writer:
        for document in documents:
            line = encode_masked_line([token for token, _ in document], [keep for _, keep in document])
            writer.write_line(line, len(document))
    file = TokenizedFile(path)
    assert len(file) == len(documents)
    for index, document in enumerate(documents):
        expected = document[start : start + width]
        ids, loss_mask = file.read(index, min(start, len(document)), min(start + width, len(document)))
        assert ids.tolist() == [token for token, _ in expected]
        assert loss_mask.tolist() == [keep for _, keep in expected]


def test_slice_of_a_long_document_equals_the_whole(tmp_path):
    tokens = np.random.default_rng(0).integers(-500, 500, 5000).tolist()
    zeros = [i for i, token in enumerate(tokens) if token == 0][::2]
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        writer.write([7])
        writer.write(tokens, zeros)
    file = TokenizedFile(tmp_path / "a.bin")
    ids, loss_mask = file.read(1)
    assert zeros and not loss_mask[zeros].any() and loss_mask[np.setdiff1d(np.flatnonzero(ids == 0), zeros)].all()
    assert (np.where(loss_mask, ids, -ids) == tokens).all()
    for start, stop in [(0, 10), (1234, 1300), (4990, 5001), (4999, 5000)]:
        part_ids, part_mask = file.read(1, start, stop)
        assert (part_ids == ids[start:stop]).all() and (part_mask == loss_mask[start:stop]).all()


def test_files_are_what_internevo_reads(tmp_path):
    path = write(tmp_path / "a.bin", [[1, -2, 3], [4]])
    meta = np.load(meta_path(path))
    assert meta.dtype == np.int64 and meta.shape == (2, 2) and meta[:, 1].tolist() == [3, 1]
    with open(path, "rb") as file:
        for (offset, _), expected in zip(meta, [[1, -2, 3], [4]], strict=True):
            file.seek(offset)
            assert json.loads(file.readline())["tokens"] == expected


def test_reads_internevo_files_with_int32_meta_and_extra_column(tmp_path):
    documents = [[5, -6, 0], [7, 8]]
    lines = [json.dumps({"tokens": tokens}) + "\n" for tokens in documents]
    (tmp_path / "a.bin").write_text("".join(lines))
    rows = [[0, 99, 3], [len(lines[0]), 99, 2]]
    with open(tmp_path / "a.bin.meta", "wb") as file:
        np.save(file, np.array(rows, dtype=np.int32))
    file = TokenizedFile(tmp_path / "a.bin")
    ids, loss_mask = file.read(0)
    assert ids.tolist() == [5, 6, 0] and loss_mask.tolist() == [True, False, True]
    assert file.read(1)[0].tolist() == [7, 8]
    assert file.counts().tolist() == [3, 2]


def test_writer_refuses_to_clobber_and_appends_when_asked(tmp_path):
    path = write(tmp_path / "a.bin", [[1, 2]])
    before = path.read_bytes()
    with pytest.raises(DataError, match=re.escape(str(path)) + " exists.*--append"):
        TokenizedWriter(path)
    assert path.read_bytes() == before
    with open(path, "ab") as file:  # what an append that was killed leaves behind
        file.write(b'{"tokens": [99')
    with TokenizedWriter(path, append=True) as writer:
        writer.write([3])
    assert [TokenizedFile(path).read(i)[0].tolist() for i in range(2)] == [[1, 2], [3]]


def test_nothing_appears_before_the_writer_is_closed(tmp_path):
    with pytest.raises(RuntimeError), TokenizedWriter(tmp_path / "a.bin") as writer:
        writer.write([1])
        assert not (tmp_path / "a.bin").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path):
    path = write(tmp_path / "a.bin", [[1, 2]])
    before = path.read_bytes(), meta_path(path).read_bytes()
    with pytest.raises(RuntimeError), TokenizedWriter(path, append=True) as writer:
        writer.write([3])
        raise RuntimeError
    assert (path.read_bytes(), meta_path(path).read_bytes()) == before


def test_write_file_joins_files(tmp_path):
    first, second = write(tmp_path / "a.bin", [[1, 2], [3]]), write(tmp_path / "b.bin", [[], [4, 5]])
    with TokenizedWriter(tmp_path / "c.bin") as writer:
        writer.write([0])
        writer.write_file(first)
        writer.write_file(second)
    file = TokenizedFile(tmp_path / "c.bin")
    assert [file.read(i)[0].tolist() for i in range(5)] == [[0], [1, 2], [3], [], [4, 5]]
    assert writer.num_documents == 5 and writer.num_tokens == 6


def test_rebuild_meta(tmp_path):
    path = write(tmp_path / "a.bin", [[1, 2], [], [3]])
    right = np.load(meta_path(path))
    meta_path(path).unlink()
    assert rebuild_meta(path) == 3
    assert (np.load(meta_path(path)) == right).all()


# --- Every mistake names the file, the document, the offset and the fix. ---


def wrong(path, document=0, vocab_size=None):
    with pytest.raises(DataError) as caught:
        file = TokenizedFile(path, vocab_size)
        file.check_offsets(0, len(file))
        file.read(document)
    assert str(path) in str(caught.value)
    return str(caught.value)


def save_meta(path, rows, dtype=np.int64):
    with open(meta_path(path), "wb") as file:
        np.save(file, np.array(rows, dtype=dtype))


def test_missing_files(tmp_path):
    assert "no such file" in wrong(tmp_path / "none.bin")
    path = write(tmp_path / "a.bin", [[1]])
    meta_path(path).unlink()
    assert "a.bin.meta is missing" in wrong(path) and f"--rebuild-meta {path}" in wrong(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY\x01\x00"])
def test_meta_is_no_array(tmp_path, content):
    path = write(tmp_path / "a.bin", [[1]])
    meta_path(path).write_bytes(content)
    assert re.search(r"a\.bin\.meta is not a (complete )?\.npy array: .*--rebuild-meta", wrong(path))


def test_truncated_meta(tmp_path):
    path = write(tmp_path / "a.bin", [[1], [2]])
    meta_path(path).write_bytes(meta_path(path).read_bytes()[:-8])
    assert "--rebuild-meta" in wrong(path)


@pytest.mark.parametrize("rows", [[0, 1], [[0]], [[[0, 1]]]])
def test_meta_of_wrong_shape(tmp_path, rows):
    path = write(tmp_path / "a.bin", [[1]])
    save_meta(path, rows)
    assert "expected integers of shape [documents, 2]" in wrong(path)


def test_meta_of_floats(tmp_path):
    path = write(tmp_path / "a.bin", [[1]])
    save_meta(path, [[0, 1]], np.float64)
    assert "float64" in wrong(path)


def test_truncated_bin(tmp_path):
    path = write(tmp_path / "a.bin", [[1, 2, 3], [4, 5, 6], [7]])
    second, third = np.load(meta_path(path))[1:, 0]
    data = path.read_bytes()
    path.write_bytes(data[: third - 5])
    assert f"document 2 has 1 tokens at byte {third}, beyond the end" in wrong(path)
    save_meta(path, np.load(meta_path(path))[:2])
    message = wrong(path, document=1)
    assert f"document 1 at byte {second}" in message and "truncated" in message and "Copy it again" in message
    path.write_bytes(b"")
    assert "document 0" in wrong(path) and "beyond the end" in wrong(path)


def test_negative_offset_is_recognised_as_overflow(tmp_path):
    path = write(tmp_path / "a.bin", [[1], [2]])
    save_meta(path, [[0, 1], [-2147483000, 1]], np.int32)
    assert "document 1" in wrong(path) and "32-bit overflow" in wrong(path)


def test_negative_count(tmp_path):
    path = write(tmp_path / "a.bin", [[1]])
    save_meta(path, [[0, -1]])
    assert "negative number of tokens" in wrong(path)


def test_count_that_disagrees(tmp_path):
    path = write(tmp_path / "a.bin", [[1, 2, 3]])
    for count in (2, 4, 100):
        save_meta(path, [[0, count]])
        assert f"document 0 at byte 0 has 3 tokens, but {count} by the .meta" in wrong(path)
    long = write(tmp_path / "b.bin", [list(range(1000))])
    save_meta(long, [[0, 999]])
    with pytest.raises(DataError, match=r"document 0 at byte 0 has 1000 tokens, but 999 by the \.meta"):
        TokenizedFile(long).read(0, 10, 20)


def test_offset_that_is_no_line_start(tmp_path):
    path = write(tmp_path / "a.bin", [[1, 2, 3]])
    save_meta(path, [[3, 3]])
    assert "document 0 at byte 3 is not at the start of a line" in wrong(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "is not JSON"),
        (b'{"tokens": [1, 2}', "is not JSON"),
        (b'{"tokens": [1, 2-]}', "is not JSON"),
        (b'{"tokens": [1,, 2]}', "is not JSON"),
        (b'{"text": "a"}', 'is not {"tokens": [integers]}'),
        (b"[1, 2]", 'is not {"tokens": [integers]}'),
        (b'{"tokens": [1.5, 2]}', 'is not {"tokens": [integers]}'),
        (b'{"tokens": [true, false]}', 'is not {"tokens": [integers]}'),
        (b'{"tokens": ["a", "b"]}', 'is not {"tokens": [integers]}'),
        (b'{"tokens": 5}', 'is not {"tokens": [integers]}'),
        (b'{"tokens": [1, 2], "masked_zeros": [1]}', "is not a list of positions whose token is 0"),
    ],
)
def test_malformed_line(tmp_path, line, message):
    (tmp_path / "a.bin").write_bytes(b'{"tokens": [9]}\n' + line + b'\n{"tokens": [9]}\n')
    save_meta(tmp_path / "a.bin", [[0, 1], [16, 2]])
    text = wrong(tmp_path / "a.bin", document=1)
    assert "document 1 at byte 16" in text and message in text and "Tokenize the source again" in text


def test_id_outside_the_vocabulary(tmp_path):
    path = write(tmp_path / "a.bin", [[1], [5, -200, 7]])
    assert TokenizedFile(path, 201).read(1)[0].max() == 200
    text = wrong(path, document=1, vocab_size=200)
    assert "document 1 at byte 16: token 200 at position 1 is outside the vocabulary of 200" in text
    assert "model.vocab_size" in text
    long = write(tmp_path / "b.bin", [[1] * 500 + [999] + [1] * 499])
    assert TokenizedFile(long, 100).read(0, 0, 100)[0].max() == 1
    with pytest.raises(DataError, match="token 999 at position 500"):
        TokenizedFile(long, 100).read(0, 450, 550)


def test_rebuild_meta_names_a_bad_line(tmp_path):
    (tmp_path / "a.bin").write_bytes(b'{"tokens": [9]}\njunk\n')
    with pytest.raises(DataError, match="document 1 at byte 16"):
        rebuild_meta(tmp_path / "a.bin")
    assert not meta_path(tmp_path / "a.bin").exists()


def test_tokens_may_be_a_numpy_array(tmp_path):
    """The elements of an array print as np.int64(5), which must not get into the file."""
    file = TokenizedFile(write(tmp_path / "a.bin", [np.arange(5), [7]]))
    assert file.read(0, 0, 5)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(TypeError), TokenizedWriter(tmp_path / "b.bin") as writer:
        writer.write([np.int64(5)])
