"""Generation against transformers, on the same weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.llama_pair import llama_pair
from helpers.model import DECODERS, LATENT, tiny_model

from internlm.apis.engine import Text
from internlm.apis.generation import beam_search, generate
from internlm.apis.sampling import Sampling
from internlm.utils.errors import ConfigError

NEW = 24


@pytest.fixture(scope="module")
def pair() -> Any:
    return llama_pair()


def prompts(*lengths: int, seed: int = 0, vocab: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def new_ids(texts: list[list[Text]]) -> list[list[int]]:
    return [text.new_ids for own in texts for text in own]


def theirs_alone(theirs: Any, prompt: list[int], **choices: Any) -> list[int]:
    ids = torch.tensor([prompt])
    # With the mask, as transformers takes every 0 for padding otherwise.
    found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0, **choices)
    return found[0, len(prompt) :].tolist()


def test_greedy_texts_of_unequal_prompts_equal_transformers(pair: Any) -> None:
    model, theirs = pair
    starts = prompts(7, 3, 1, 19, 8, 8, 2)
    found = new_ids(generate(model, starts, Sampling(max_new_tokens=NEW), num_rows=3))
    assert found == [theirs_alone(theirs, prompt, do_sample=False) for prompt in starts]
    assert len({token for ids in found for token in ids}) > 20  # no dull loop that any two models would agree on


def test_left_padding_is_what_transformers_needs_and_gives_the_same(pair: Any) -> None:
    model, theirs = pair
    starts = prompts(5, 2)
    padded = torch.tensor([starts[0], [0, 0, 0, *starts[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert new_ids(generate(model, starts, Sampling(max_new_tokens=NEW))) == expected[:, 5:].tolist()


VARIANTS: dict[str, dict[str, Any]] = {
    "windows": {"model_type": "MISTRAL", "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "sinks": {"model_type": "GPT_OSS"},
    "latent vectors": {"model_type": "DEEPSEEK_V3", **LATENT},
    "experts": {"model_type": "QWEN3MOE"},
    "dynamic rope": {
        "model_type": "LLAMA2",
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 8,
    },
}


@pytest.mark.parametrize("name", [*DECODERS, *VARIANTS])
def test_rows_of_unequal_length_give_what_whole_texts_give(name: str) -> None:
    """Without a cache, every step computes the whole text."""
    keys = dict(VARIANTS.get(name, {"model_type": name}))
    model = tiny_model(keys.pop("model_type"), seed=3, **keys).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    starts = prompts(11, 2, 5)
    found = new_ids(generate(model, starts, Sampling(max_new_tokens=9)))
    for prompt, new in zip(starts, found, strict=True):
        if name == "dynamic rope":  # its keys depend on the length at the time they were computed
            new = new[:1]
        ids = torch.tensor([prompt + new[:-1]])
        with torch.no_grad():
            logits = model.logits(model(ids, torch.arange(ids.shape[1])[None]))[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        # The likeliest token, apart from rounding.
        torch.testing.assert_close(chosen, logits.amax(dim=1), rtol=1e-4, atol=1e-4)


def test_ends_of_texts_equal_transformers(pair: Any) -> None:
    model, theirs = pair
    starts = prompts(7, 4, 9, seed=2)
    free = new_ids(generate(model, starts, Sampling(max_new_tokens=NEW)))
    # Two tokens that greedy decoding does produce, so that texts end, at different steps.
    eos = (free[0][3], free[1][9])
    texts = [own[0] for own in generate(model, starts, Sampling(max_new_tokens=NEW, eos_ids=eos))]
    for text, prompt in zip(texts, starts, strict=True):
        expected = theirs_alone(theirs, prompt, do_sample=False, eos_token_id=list(eos))
        assert text.new_ids == expected
        ended = expected[-1] in eos
        assert text.finish_reason == ("stop" if ended else "length")
        assert text.num_readable == len(expected) - ended
    assert {text.finish_reason for text in texts} == {"stop", "length"}


CHOICES: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"do_sample": True, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.3},
    {"do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 9, "eos_token_id": [3, 6, 93, 50]},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_choices_equal_transformers_with_the_same_seed(pair: Any, choices: dict[str, Any]) -> None:
    model, theirs = pair
    ours = dict(choices)
    eos = tuple(ours.pop("eos_token_id", ()))
    starts = prompts(7, 3, 12)
    sampling = Sampling(max_new_tokens=NEW, eos_ids=eos, seed=3, **ours)
    found = new_ids(generate(model, starts, sampling))
    for number, prompt in enumerate(starts):
        torch.manual_seed(3 + number)
        assert found[number] == theirs_alone(theirs, prompt, **choices)


def test_a_text_does_not_depend_on_its_neighbours(pair: Any) -> None:
    model, _ = pair
    sampling = Sampling(max_new_tokens=NEW, do_sample=True, top_p=0.95, seed=11)
    starts = prompts(4, 15, 2, 7, 1)
    together = new_ids(generate(model, starts, sampling, num_rows=2))
    assert together == new_ids(generate(model, starts, sampling, num_rows=5))
    assert together[3] == new_ids(generate(model, [starts[3]], Sampling(**{**vars(sampling), "seed": 14})))[0]


def test_samples_of_one_prompt_differ_and_repeat(pair: Any) -> None:
    model, _ = pair
    sampling = Sampling(max_new_tokens=NEW, do_sample=True, seed=5)
    texts = generate(model, prompts(9, 4), sampling, num_samples=3, num_rows=4)
    ids = new_ids(texts)
    assert [len(own) for own in texts] == [3, 3]
    assert len({tuple(each) for each in ids}) == 6
    alone = Sampling(max_new_tokens=NEW, do_sample=True, seed=7)
    assert new_ids(generate(model, prompts(9), alone))[0] == ids[2]


def test_frequencies_of_samples_are_the_probabilities(pair: Any) -> None:
    """Chi-squared of 1,000 draws of the first token, with its 99.99 % bound by Wilson and Hilferty's approximation."""
    model, _ = pair
    prompt = prompts(6, seed=4)[0]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt]), torch.arange(6)[None]))[0, -1]
    expected = (logits / 2.5).softmax(0) * 1_000
    sampling = Sampling(max_new_tokens=1, do_sample=True, temperature=2.5)
    texts = generate(model, [prompt], sampling, num_samples=1_000)
    counts = torch.bincount(torch.tensor(new_ids(texts)).flatten(), minlength=97)
    common = expected >= 5
    rest = torch.stack((counts[~common].sum(), expected[~common].sum()))
    statistic = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
    statistic += (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1)
    degrees = int(common.sum())
    assert float(statistic) < degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_equals_transformers(pair: Any, length_penalty: float, early_stopping: bool) -> None:
    model, theirs = pair
    options = {"num_beams": 4, "length_penalty": length_penalty, "early_stopping": early_stopping}
    ends = [17, 93, 50, 31, 52, 6, 88]
    ended = 0
    for prompt in prompts(7, 3, 12, seed=1):
        sampling = Sampling(max_new_tokens=NEW, eos_ids=tuple(ends))
        beams = beam_search(model, prompt, sampling, num_samples=3, **options)  # type: ignore[arg-type]
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=NEW,
            do_sample=False,
            num_return_sequences=3,
            eos_token_id=ends,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        for beam, ids, score in zip(beams, expected.sequences, expected.sequences_scores, strict=True):
            padded = ids[len(prompt) :].tolist()
            assert padded[: len(beam.ids)] == list(beam.ids)
            assert set(padded[len(beam.ids) :]) <= {ends[0]}
            assert beam.score == pytest.approx(float(score), rel=1e-5)
            ended += len(beam.ids) < NEW
    # A high exponent lets the longest texts win.
    assert ended > 3 or length_penalty == 2.0


def test_drawn_beams_repeat_with_the_seed(pair: Any) -> None:
    model, _ = pair

    def draw(seed: int) -> Any:
        sampling = Sampling(max_new_tokens=NEW, do_sample=True, temperature=2.0, seed=seed)
        return beam_search(model, prompts(5)[0], sampling, num_beams=3, num_samples=2)

    assert draw(1) == draw(1) != draw(2)
    assert all(len(beam.ids) == NEW for beam in draw(1))


def test_log_probabilities_are_those_of_the_model(pair: Any) -> None:
    """Not of the distribution that penalties and filters leave."""
    model, _ = pair
    prompt = prompts(6)[0]
    sampling = Sampling(max_new_tokens=NEW, do_sample=True, top_k=5, repetition_penalty=1.2, top_logprobs=3)
    text = generate(model, [prompt], sampling)[0][0]
    ids = torch.tensor([prompt + text.new_ids])
    with torch.no_grad():
        logprobs = model.logits(model(ids, torch.arange(ids.shape[1])[None]))[0].log_softmax(-1)[5:-1]
    assert len(text.logprobs) == NEW
    for id, found, expected in zip(text.new_ids, text.logprobs, logprobs, strict=True):
        assert found.value == pytest.approx(float(expected[id]), abs=1e-4)
        best = expected.topk(3)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_last_token_of_the_tokenizer_may_be_chosen_and_none_behind_it(pair: Any) -> None:
    model, _ = pair
    free = new_ids(generate(model, prompts(7, 7, 7), Sampling(max_new_tokens=NEW)))
    last = max(max(ids) for ids in free)
    starts = prompts(7, 7, 7)
    assert new_ids(generate(model, starts, Sampling(max_new_tokens=NEW, num_tokens=last + 1))) == free
    cut = new_ids(generate(model, starts, Sampling(max_new_tokens=NEW, num_tokens=last)))
    assert max(max(ids) for ids in cut) < last


def test_tokens_stream_as_they_come_and_a_text_can_be_ended(pair: Any) -> None:
    model, _ = pair
    seen: dict[int, list[int]] = {}

    def on_token(text: Text) -> bool:
        seen.setdefault(len(text.prompt.ids), []).append(text.new_ids[-1])
        return len(text.prompt.ids) == 3 and len(text.new_ids) == 4

    texts = generate(model, prompts(7, 3), Sampling(max_new_tokens=6), on_token=on_token)
    assert [seen[7], seen[3]] == new_ids(texts)
    assert [text[0].finish_reason for text in texts] == ["length", "cancelled"]
    assert len(seen[3]) == 4


def test_the_model_is_left_in_its_mode(pair: Any) -> None:
    model, _ = pair
    for mode in (True, False):
        model.train(mode)
        generate(model, prompts(2), Sampling(max_new_tokens=1))
        beam_search(model, prompts(2)[0], Sampling(max_new_tokens=1), num_beams=2)
        assert model.training is mode


def test_mistakes_are_told_at_once(pair: Any) -> None:
    model, _ = pair
    bad = Sampling(max_new_tokens=0, do_sample=True, temperature=0.0, top_k=-1, top_p=0.0, min_p=2, seed=2**64)
    with pytest.raises(ConfigError) as error:
        generate(model, prompts(1), bad)
    assert len(error.value.mistakes) == 6
    good = Sampling(max_new_tokens=1)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate(model, [[]], good)
    with pytest.raises(ConfigError, match="greedy"):
        generate(model, prompts(1), Sampling(max_new_tokens=1, temperature=0.7))
    with pytest.raises(ConfigError, match="all the same"):
        generate(model, prompts(1), good, num_samples=2)
    with pytest.raises(ConfigError, match="num_samples = 3: must be from 1 to num_beams = 2"):
        beam_search(model, prompts(1)[0], good, num_beams=2, num_samples=3)
