"""Every packing mode against a straightforward reference that walks over single tokens."""

import logging

import numpy as np
import pytest

from internlm.data.batch import Batch
from internlm.data.documents.folders import find_valid_sets
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.document_slice import make_slice, padding_slice, unreadable_slice
from internlm.data.packing.sample import concatenate_slices
from internlm.data.permutation import permute
from internlm.data.sources.document_source import DocumentSource
from internlm.data.sources.dummy import DummySource
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.writer import TokenizedWriter, encode_masked_line
from internlm.utils.errors import DataError

SEQ_LEN, MICRO_BSZ, VOCAB = 8, 3, 50


def make_documents(seed, count, longest):
    """Documents as lists of (id, contributes loss), with masked tokens, real zeros and masked zeros."""
    random = np.random.default_rng(seed)
    return [
        [(int(random.integers(0, VOCAB)), bool(random.random() < 0.8)) for _ in range(random.integers(0, longest))]
        for _ in range(count)
    ]


def write_documents(path, documents):
    with TokenizedWriter(path) as writer:
        for document in documents:
            line = encode_masked_line([token for token, _ in document], [keep for _, keep in document])
            writer.write_line(line, len(document))


@pytest.fixture
def folder(tmp_path):
    files = {
        "code/a": make_documents(1, 40, 30),
        "en/deep/b": make_documents(2, 25, 60),
        "en/c": make_documents(3, 9, 5),
    }
    for name, documents in files.items():
        write_documents(tmp_path / f"{name}.bin", documents)
    return tmp_path, files


def shuffled(documents, min_length):
    order = permute(np.arange(len(documents)), len(documents), 1024)
    return [documents[i] for i in order if len(documents[i]) >= max(1, min_length)]


def label(document, position):
    following = document[position + 1] if position + 1 < len(document) else (0, False)
    return following[0] if following[1] else -100


def reference_packed(documents, min_length, one):
    """(ids, labels, positions, cu_seqlens) of each sample of a file, token by token."""
    stream = [
        (number, position, document)
        for number, document in enumerate(shuffled(documents, min_length))
        for position in range(len(document))
    ]
    size = SEQ_LEN * MICRO_BSZ
    samples = []
    for first in range(0, len(stream) - size + 1, size):
        ids, labels, positions, cu_seqlens = [], [], [], [0]
        for place, (number, position, document) in enumerate(stream[first : first + size]):
            previous = stream[first + place - 1][0] if place else None
            starts_segment = place > 0 and (
                len(positions) - cu_seqlens[-1] == SEQ_LEN or (not one and number != previous)
            )
            if starts_segment:
                cu_seqlens.append(place)
            ids.append(document[position][0])
            labels.append(label(document, position))
            positions.append(place - cu_seqlens[-1])
        samples.append((ids, labels, positions, [*cu_seqlens, size]))
    return samples


def reference_unpacked(documents, min_length):
    kept = shuffled(documents, min_length)
    samples = []
    for first in range(0, len(kept), MICRO_BSZ):
        ids, labels = np.zeros((MICRO_BSZ, SEQ_LEN), int), np.full((MICRO_BSZ, SEQ_LEN), -100)
        for row, document in enumerate(kept[first : first + MICRO_BSZ]):
            for position in range(min(len(document), SEQ_LEN)):
                ids[row, position], labels[row, position] = document[position][0], label(document, position)
        lengths = [min(len(document), SEQ_LEN) for document in kept[first : first + MICRO_BSZ]]
        samples.append((ids, labels, lengths + [0] * (MICRO_BSZ - len(lengths))))
    return samples


def source(root, packing, **options):
    return DocumentSource(
        root,
        TOKENIZED,
        seq_len=SEQ_LEN,
        micro_bsz=MICRO_BSZ,
        packing=packing,
        vocab_size=VOCAB,
        **options,
    )


@pytest.mark.parametrize("packing", ["cut", "pack_sample_into_one"])
@pytest.mark.parametrize("min_length", [0, 10])
def test_packed_modes(folder, packing, min_length):
    root, files = folder
    limits = {"code/a": min_length, "en/c": 2, "en/deep/b": 2}
    samples = source(root, packing, min_length=min_length, min_length_dict={"en": 2})
    assert samples.type_names == ["code", "en"]
    expected = [
        (type_id, sample)
        for name, type_id in [("code/a", 0), ("en/c", 1), ("en/deep/b", 1)]
        for sample in reference_packed(files[name], limits[name], packing == "pack_sample_into_one")
    ]
    assert len(samples) == len(expected) > 20
    for index, (type_id, (ids, labels, positions, cu_seqlens)) in enumerate(expected):
        micro = to_micro_batch(samples.sample(index))
        assert micro.input_ids.shape == (1, SEQ_LEN * MICRO_BSZ)
        assert micro.input_ids[0].tolist() == ids
        assert micro.labels[0].tolist() == labels
        assert micro.position_ids[0].tolist() == positions
        assert micro.cu_seqlens.tolist() == cu_seqlens and str(micro.cu_seqlens.dtype) == "torch.int32"
        assert list(micro.lengths) == np.diff(cu_seqlens).tolist()
        assert micro.type_ids.unique().tolist() == [type_id]
        assert micro.num_valid_tokens == sum(each != -100 for each in labels)
        assert micro.is_padding is None and micro.num_padding_tokens == 0


@pytest.mark.parametrize("min_length", [0, 10])
def test_unpacked(folder, min_length):
    root, files = folder
    samples = source(root, "unpacked", min_length=min_length)
    expected = [
        sample for name in ("code/a", "en/c", "en/deep/b") for sample in reference_unpacked(files[name], min_length)
    ]
    assert len(samples) == len(expected) > 5
    for index, (ids, labels, lengths) in enumerate(expected):
        micro = to_micro_batch(samples.sample(index))
        assert (micro.input_ids.numpy() == ids).all() and (micro.labels.numpy() == labels).all()
        # Positions of the documents, and 0 in the padding.
        assert micro.position_ids.tolist() == [[*range(length)] + [0] * (SEQ_LEN - length) for length in lengths]
        assert micro.num_documents == sum(length > 0 for length in lengths)
        assert Batch([micro, micro], num_samples=2).num_documents == [micro.num_documents] * 2
        assert micro.cu_seqlens is None and micro.lengths is None
        assert micro.num_valid_tokens == (labels != -100).sum()
        padding = np.arange(SEQ_LEN) >= np.array(lengths)[:, None]
        assert micro.num_padding_tokens == padding.sum()
        assert (micro.is_padding is None) != padding.any()
        assert micro.is_padding is None or (micro.is_padding.numpy() == padding).all()


def test_padding_of_packed_rows() -> None:
    """Between documents, at the end, and in the place of an unreadable one; a masked label is none."""
    ids = np.arange(1, 5)
    slices = [
        make_slice(ids, np.zeros(4, dtype=bool), 3),
        padding_slice(2),
        make_slice(ids, np.ones(4, dtype=bool), 3),
        unreadable_slice(1, "gone"),
    ]
    micro = to_micro_batch(concatenate_slices(slices, 4, 12, "best_fit", 0))
    assert micro.is_padding is not None
    assert micro.is_padding.int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]]
    assert micro.num_padding_tokens == 6


def test_zero_is_a_target_unless_it_is_masked(tmp_path):
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        writer.write([5, 0, 6, 0, 0, 0, 7, 8], masked_zeros=[3, 5])
    samples = DocumentSource(tmp_path, TOKENIZED, seq_len=8, micro_bsz=1, packing="cut")
    assert samples.sample(0).labels.tolist() == [0, 6, -100, 0, -100, 7, 8, -100]


@pytest.mark.parametrize("packing", ["cut", "pack_sample_into_one", "unpacked"])
@pytest.mark.parametrize("fixed_lengths", [True, False])
def test_dummy_samples_are_a_function_of_their_index(packing, fixed_lengths):
    def make(seed):
        return DummySource(
            seq_len=16, micro_bsz=4, packing=packing, vocab_size=100, seed=seed, fixed_lengths=fixed_lengths
        )

    first, again, other = make(1), make(1), make(2)
    assert first.type_names == ["en", "cn", "code"]
    for index in (0, 7, len(first) - 1):
        sample = first.sample(index)
        assert sample.type_ids == index % 3
        assert (sample.input_ids == again.sample(index).input_ids).all()
        assert not np.array_equal(sample.input_ids, other.sample(index).input_ids)
        assert sample.input_ids.shape == ((4, 16) if packing == "unpacked" else (64,))
        assert sample.input_ids.min() >= 0 and sample.input_ids.max() < 100
        targets = sample.labels != -100
        assert targets.any() and sample.labels[targets].min() > 0
        if packing == "unpacked":
            assert sample.lengths is None
        else:
            assert sum(sample.lengths) == 64 and max(sample.lengths) <= 16
            regular = fixed_lengths or packing == "pack_sample_into_one"
            assert (sample.lengths == (16,) * 4) == regular


# --- Mistakes in folders. ---


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="missing: no such folder"):
        source(tmp_path / "missing", "cut")
    (tmp_path / "en").mkdir()
    with pytest.raises(DataError, match=r"no .bin file in this folder; expected .*/<type>/NAME.bin"):
        source(tmp_path, "cut")
    write_documents(tmp_path / "en" / "a.bin", [[(1, True)] * 10])
    with pytest.raises(DataError, match=r"1 files with 10 tokens .* none has enough for one sample of 24 tokens"):
        source(tmp_path, "cut")
    with pytest.raises(DataError, match=r"min_length_dict names the type 'enn'.* Did you mean 'en'"):
        source(tmp_path, "cut", min_length_dict={"enn": 3})
    write_documents(tmp_path / "b.bin", [[(1, True)]])
    with pytest.raises(DataError, match=r"b\.bin is beside the type folder 'en'"):
        source(tmp_path, "cut")


def test_truncated_file_is_refused_when_the_folder_is_opened(tmp_path):
    write_documents(tmp_path / "en" / "a.bin", [[(1, True)] * 50, [(2, True)] * 50])
    data = (tmp_path / "en" / "a.bin").read_bytes()
    (tmp_path / "en" / "a.bin").write_bytes(data[:50])
    with pytest.raises(DataError, match=r"a\.bin .*document 1 .*beyond the end: the \.bin is truncated"):
        source(tmp_path, "cut")


def test_files_directly_in_the_folder_are_one_type(tmp_path):
    write_documents(tmp_path / "mine" / "a.bin", [[(1, True)] * 50])
    assert source(tmp_path / "mine", "cut").type_names == ["mine"]


def test_linked_folders_are_followed(tmp_path):
    write_documents(tmp_path / "elsewhere" / "sub" / "a.bin", [[(1, True)] * 50])
    for name in ("train/en", "valid/en/deep"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    assert source(tmp_path / "train", "cut").type_names == ["en"]
    assert list(find_valid_sets(tmp_path / "valid", TOKENIZED)) == ["en/deep/sub"]


def test_type_folder_without_files_keeps_its_id(tmp_path):
    (tmp_path / "cn").mkdir()
    write_documents(tmp_path / "en" / "a.bin", [[(1, True)] * 50])
    samples = source(tmp_path, "cut")
    assert samples.type_names == ["cn", "en"] and samples.sample(0).type_ids == 1


def test_dropped_tail_is_reported(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="internlm")
    write_documents(tmp_path / "a.bin", [[(1, True)] * 30])
    source(tmp_path, "cut")
    assert "6 of 30 tokens are dropped" in caplog.text
