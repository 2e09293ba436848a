"""Batches from lists in memory, against the definition of packing, and for any number of ranks."""

import itertools

import numpy as np
import pytest
import torch

from internlm.data.batch import IGNORE_INDEX
from internlm.data.loaders.token_list_loader import TokenListLoader
from internlm.utils.errors import ConfigError, DataError


def make_documents(count: int = 17, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, 90, size=random.integers(0, 30)).tolist() for _ in range(count)]


def test_lists_are_packed_cut_and_labelled() -> None:
    loader = TokenListLoader([[1, 2, 3, 4, 5, 6], [], [7], [8, -9, 0, 10]], vocab_size=11, seq_len=4, micro_bsz=2)
    first, second = list(loader)
    (micro,) = first.micro_batches
    assert micro.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    # Token 9 contributes no loss, a lone token has no label, and the label at a cut is the real next token.
    assert micro.labels.tolist() == [[2, 3, 4, 5, 6, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]
    assert micro.lengths == (4, 2, 1, 1)
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 0]]
    (micro,) = second.micro_batches
    assert micro.input_ids.tolist() == [[9, 0, 10, 0, 0, 0, 0, 0]]
    assert micro.labels.tolist() == [[0, 10, *[IGNORE_INDEX] * 6]]
    assert micro.num_valid_tokens == 2
    assert micro.lengths == (3, 4, 1)


def test_every_label_is_seen_once() -> None:
    documents = make_documents()
    loader = TokenListLoader(documents, vocab_size=90, seq_len=6, micro_bsz=3, micro_num=2)
    seen = torch.cat([micro.labels.flatten() for batch in loader for micro in batch.micro_batches])
    assert seen[seen != IGNORE_INDEX].tolist() == [token for document in documents for token in document[1:]]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_batches_of_one_process(size: int) -> None:
    documents = make_documents()
    kwargs = {"vocab_size": 90, "seq_len": 5, "micro_bsz": 2}
    alone = list(TokenListLoader(documents, micro_num=size, **kwargs))
    ranks = [list(TokenListLoader(documents, data_rank=rank, data_size=size, **kwargs)) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for step, whole in enumerate(alone):
        parts = [batches[step] for batches in ranks]
        assert [i for part in parts for i in part.sample_indices] == whole.sample_indices
        assert {part.num_samples for part in parts} == {whole.num_samples}
        for micro, part in zip(whole.micro_batches, parts, strict=True):
            assert torch.equal(micro.input_ids, part.micro_batches[0].input_ids)
            assert torch.equal(micro.labels, part.micro_batches[0].labels)


def test_seek_continues_where_a_run_stopped() -> None:
    def loader() -> TokenListLoader:
        return TokenListLoader(make_documents(), vocab_size=90, seq_len=5, micro_num=2)

    whole = list(loader())
    resumed = loader()
    resumed.seek(2, sum(batch.num_samples for batch in whole[:2]))
    for expected, found in zip(whole[2:], resumed, strict=True):
        assert found.sample_indices == expected.sample_indices
        assert torch.equal(found.micro_batches[1].input_ids, expected.micro_batches[1].input_ids)


def test_endless_iterators_are_read_as_far_as_needed() -> None:
    taken = itertools.count()
    loader = TokenListLoader(([next(taken)] * 4 for _ in itertools.repeat(0)), vocab_size=100, seq_len=4)
    next(iter(loader))
    assert next(taken) <= 2


def test_errors_name_the_document() -> None:
    for documents, message in (
        ([[1, 2], [3, 90]], "document 1 .* token 90 at position 1 is outside the vocabulary of 90"),
        ([[1, 2], "text"], "document 1 .* is not a list of token ids but str"),
        ([[1.5, 2.0]], "document 0 .* float64; tokenize text first"),
        ([[[1, 2]]], "document 0 .* is not a list of token ids"),
    ):
        with pytest.raises(DataError, match=message):
            list(TokenListLoader(documents, vocab_size=90, seq_len=4))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"(?s)seq_len = 0.*data_rank = 2"):
        TokenListLoader([], vocab_size=9, seq_len=0, data_rank=2, data_size=2)
