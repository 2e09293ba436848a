"""Generation with InternEvo's argument names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.llama_pair import llama_pair

from internlm.apis.generation import beam_search, generate
from internlm.apis.sampling import Sampling
from internlm.apis.sequence_generator import SequenceGenerator
from internlm.utils.errors import ConfigError

PADDED = torch.tensor([[1, 1, 1, 5, 9], [1, 40, 41, 42, 43]])
PROMPTS = [[1, 5, 9], [1, 40, 41, 42, 43]]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama_pair()[0]


def test_greedy_texts_are_those_of_prompts_without_padding(model: Any) -> None:
    found = SequenceGenerator(model, 96, 1, 1).generate(PADDED, max_length=15, do_sample=False)
    expected = generate(model, PROMPTS, Sampling(max_new_tokens=10, min_new_tokens=1, eos_ids=(96,)))
    assert found.shape == (2, 1, 15)
    assert torch.equal(found[:, 0, :5], PADDED)
    assert found[:, 0, 5:].tolist() == [own[0].new_ids for own in expected]


def test_other_padding_is_removed_whole(model: Any) -> None:
    padded = torch.tensor([[0, 0, 1, 5, 9], [1, 40, 41, 42, 43]])
    found = SequenceGenerator(model, 96, 0, 1).generate(padded, max_length=9, do_sample=False)
    same = SequenceGenerator(model, 96, 1, 1).generate(PADDED, max_length=9, do_sample=False)
    assert torch.equal(found[:, :, 5:], same[:, :, 5:])


def test_samples_differ_between_calls_and_repeat_with_the_seed(model: Any) -> None:
    def generator() -> SequenceGenerator:
        return SequenceGenerator(model, [96], 1, 1, seed=3)

    one, other = generator(), generator()
    first = one.generate(PADDED, num_return_sequences=3, max_length=12, top_k=40)
    assert first.shape == (2, 3, 12)
    assert torch.equal(first, other.generate(PADDED, num_return_sequences=3, max_length=12, top_k=40))
    assert not torch.equal(first, one.generate(PADDED, num_return_sequences=3, max_length=12, top_k=40))
    assert len({tuple(row) for row in first[0].tolist()}) == 3


def test_beams(model: Any) -> None:
    found = SequenceGenerator(model, 96, 1, 1).generate(
        PADDED, num_return_sequences=2, max_length=11, num_beams=3, do_sample=False, length_penalty=0.5
    )
    sampling = Sampling(max_new_tokens=6, min_new_tokens=1, eos_ids=(96,))
    for prompt, rows in zip(PROMPTS, found, strict=True):
        beams = beam_search(model, prompt, sampling, num_beams=3, num_samples=2, length_penalty=0.5)
        assert rows[:, 5:].tolist() == [list(beam.ids) for beam in beams]


def test_ends_and_padding_on_the_right(model: Any) -> None:
    free = generate(model, PROMPTS, Sampling(max_new_tokens=8))
    eos = free[0][0].new_ids[3]
    assert eos not in free[1][0].new_ids
    plain = SequenceGenerator(model, 96, 1, 1, additional_eos_token_list=[eos])
    rows = plain.generate(PADDED, max_length=13, do_sample=False)[:, 0, 5:]
    length = free[0][0].new_ids.index(eos) + 1
    assert rows[0].tolist() == free[0][0].new_ids[:length] + [1] * (8 - length)
    ended = SequenceGenerator(model, 96, 1, 1, additional_eos_token_list=[eos], add_eos_when_return=True)
    rows = ended.generate(PADDED, max_length=13, do_sample=False)[:, 0, 5:]
    assert rows[1].tolist() == [*free[1][0].new_ids, 96]


def test_streaming_yields_the_texts_so_far(model: Any) -> None:
    generator = SequenceGenerator(model, 96, 1, 1)
    seen = list(generator.streaming_generate(PADDED, max_length=9, do_sample=False))
    whole = generator.generate(PADDED, max_length=9, do_sample=False)
    assert torch.equal(seen[-1], whole)
    assert [each.shape[2] for each in seen] == sorted(each.shape[2] for each in seen)
    model.train(True)
    stream = generator.streaming_generate(PADDED, max_length=9, do_sample=False)
    assert not next(stream).requires_grad and not model.training
    stream.close()
    assert model.training  # as it was
    model.eval()
    # The text that is behind the other is filled up.
    assert torch.equal(seen[0][0], whole[0, :, : seen[0].shape[2]])


def test_mistakes(model: Any) -> None:
    generator = SequenceGenerator(model, 96, 1, 1)
    with pytest.raises(ConfigError, match="max_length = 5: counts the prompt"):
        generator.generate(PADDED, max_length=5)
    with pytest.raises(ConfigError, match=r"tokens: must be int64 \[prompts"):
        generator.generate(PADDED[0], max_length=9)
