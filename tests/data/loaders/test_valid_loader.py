"""Validation loaders: every label exactly once, with the same context for any layout."""

import itertools

import numpy as np
import pytest

from internlm.data.documents.valid_sets import folder_sets
from internlm.data.loaders.valid_loader import build_valid_loaders
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import DataError

SEQ_LEN = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("valid")
    random = np.random.default_rng(0)
    documents = {}
    for name in ("en/a", "en/b", "cn/deep/c"):
        documents[name] = [random.integers(-99, 100, random.integers(0, 40)).tolist() for _ in range(12)]
        documents[name] += [[5], [], list(range(1, 18)), list(range(1, 17))]
        with TokenizedWriter(root / f"{name}.bin") as writer:
            for document in documents[name]:
                writer.write(document)
    return root, documents


def expected_predictions(documents):
    """Sorted (context since the last multiple of SEQ_LEN, target) of every label of a set."""
    predictions = []
    for document in documents:
        for position in range(1, len(document)):
            if document[position] >= 0:
                start = (position - 1) // SEQ_LEN * SEQ_LEN
                predictions.append((*map(abs, document[start:position]), document[position]))
    return sorted(predictions)


def predictions_of(micro):
    segments = []
    if micro.lengths is None:
        lengths = [int(positions.max()) + 1 for positions in micro.position_ids]
        segments = [(row, 0, length) for row, length in enumerate(lengths)]
        assert all((micro.position_ids[row, stop:] == 0).all() for row, _, stop in segments)
        assert all((micro.labels[row, stop:] == -100).all() for row, _, stop in segments)
    else:
        bounds = micro.cu_seqlens.tolist()
        assert np.diff(bounds).tolist() == list(micro.lengths) and bounds[-1] == micro.input_ids.shape[1]
        segments = [(0, start, stop) for start, stop in itertools.pairwise(bounds)]
    for row, start, stop in segments:
        assert micro.position_ids[row, start:stop].tolist() == list(range(stop - start))
        ids, labels = micro.input_ids[row, start:stop].tolist(), micro.labels[row, start:stop].tolist()
        for place, target in enumerate(labels):
            if target != -100:
                yield (*ids[: place + 1], target)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("micro_bsz", [1, 3])
@pytest.mark.parametrize(("data_size", "valid_micro_num"), [(1, 1), (1, 2), (2, 1), (3, 2), (4, 1)])
def test_every_label_once(folder, packed, micro_bsz, data_size, valid_micro_num):
    root, documents = folder
    ranks = [
        build_valid_loaders(
            folder_sets(root, TOKENIZED),
            seq_len=SEQ_LEN,
            micro_bsz=micro_bsz,
            vocab_size=100,
            valid_micro_num=valid_micro_num,
            data_rank=rank,
            data_size=data_size,
            packed=packed,
        )
        for rank in range(data_size)
    ]
    assert list(ranks[0]) == ["cn/deep", "en"]
    for name, expected in [
        ("en", expected_predictions(documents["en/a"] + documents["en/b"])),
        ("cn/deep", expected_predictions(documents["cn/deep/c"])),
    ]:
        batches = [list(loaders[name]) for loaders in ranks]
        assert {len(each) for each in batches} == {len(ranks[0][name])}
        micros = [micro for each in batches for batch in each for micro in batch.micro_batches]
        assert len(micros) == len(ranks[0][name]) * data_size * valid_micro_num
        assert sorted(prediction for micro in micros for prediction in predictions_of(micro)) == expected
        assert sum(micro.num_valid_tokens for micro in micros) == len(expected)
        shape = (1, micro_bsz * SEQ_LEN) if packed else (micro_bsz, SEQ_LEN)
        assert all(micro.input_ids.shape == shape for micro in micros)
        assert sum(batch.num_samples for batch in batches[0]) == sum(
            len(batch.sample_indices) for each in batches for batch in each
        )
        assert ranks[0][name].type_names == [name]


def test_iterating_again_gives_the_same(folder):
    loader = build_valid_loaders(folder_sets(folder[0], TOKENIZED), seq_len=SEQ_LEN, micro_bsz=2, vocab_size=100)["en"]
    first, second = ([micro.input_ids.tolist() for batch in loader for micro in batch.micro_batches] for _ in range(2))
    assert first == second


def test_no_sets_mean_no_loaders():
    assert build_valid_loaders([], seq_len=SEQ_LEN, micro_bsz=2, vocab_size=100) == {}


def test_errors(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        build_valid_loaders(folder_sets(tmp_path / "none", TOKENIZED), seq_len=SEQ_LEN, micro_bsz=2, vocab_size=100)
    with pytest.raises(DataError, match=r"no \.bin file"):
        build_valid_loaders(folder_sets(tmp_path, TOKENIZED), seq_len=SEQ_LEN, micro_bsz=2, vocab_size=100)
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        writer.write([1])
    with pytest.raises(DataError, match=r"no document of the validation set '.*' has two tokens"):
        build_valid_loaders(folder_sets(tmp_path, TOKENIZED), seq_len=SEQ_LEN, micro_bsz=2, vocab_size=100)
    loader = build_valid_loaders(folder_sets(folder[0], TOKENIZED), seq_len=SEQ_LEN, micro_bsz=2, vocab_size=50)["en"]
    with pytest.raises(DataError, match="outside the vocabulary of 50"):
        list(loader)
