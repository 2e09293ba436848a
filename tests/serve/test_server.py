"""`internlm serve` with OpenAI's own client, from a checkpoint to answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from commands.test_chat_command import answer
from helpers.tiny_server import greedy, send, tiny_client, tiny_engine, tiny_folder, tiny_language, tiny_port  # noqa: F401
from openai import OpenAI

from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.apis.scoring import score_tokens
from internlm.serve.language_model import LanguageModel


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "internlm"
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
        client.completions.create(model="other", prompt="a")


def test_completions_of_texts_and_tokens(client: OpenAI, language: LanguageModel) -> None:
    prompts: list[Any] = ["some", [70, 71, 72], ["one", "and two"], [[70, 71], [72]]]
    for prompt in prompts:
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        several = [prompt] if is_one else prompt
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, temperature=0)
        assert [choice.text for choice in found.choices] == [greedy(language, each, 9)[0] for each in several]
        assert [choice.finish_reason for choice in found.choices] == ["length"] * len(several)
        assert [choice.index for choice in found.choices] == list(range(len(several)))
        assert found.usage is not None and found.usage.completion_tokens == 9 * len(several)


def test_mixed_requests_at_a_time_equal_one_by_one(client: OpenAI) -> None:
    """32 requests of many lengths, greedy and sampled, on 4 rows; the text of each is what it is alone."""
    requests = [
        {"prompt": "x" * (1 + 7 * n % 40), "max_tokens": 3 + 5 * n % 20, "temperature": 0.8 * (n % 2), "seed": n}
        for n in range(32)
    ]

    def text(request: dict[str, Any]) -> str:
        return client.completions.create(model="tiny", **request).choices[0].text

    alone = [text(request) for request in requests]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(text, requests)) == alone
    assert len(set(alone)) > 20


def test_streams_have_the_same_text_and_usage_only_if_asked(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": ["ab", "cde"], "max_tokens": 12, "temperature": 0, "n": 1}
    whole = client.completions.create(**options)
    texts = ["", ""]
    reasons: dict[int, str] = {}
    for chunk in client.completions.create(**options, stream=True):
        assert chunk.usage is None and len(chunk.choices) == 1
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason is not None:
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and reasons == {0: "length", 1: "length"}
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_echo_and_logprobs_are_those_of_a_pass_over_the_text(client: OpenAI, language: LanguageModel) -> None:
    """As lm-evaluation-harness asks: N + 1 entries, the first without a value, and a greedy token equals the best."""
    ids = [70, 80, 90, 75]
    request: Any = {"model": "tiny", "prompt": [ids, ids[:2]], "temperature": 0, "max_tokens": 1, "logprobs": 1}
    found = client.completions.create(**request, echo=True, seed=1234)
    for choice, prompt in zip(found.choices, (ids, ids[:2]), strict=True):
        text, new = greedy(language, prompt, 1)
        whole = [*prompt, *new]
        assert choice.text == language.tokenizer.decode(prompt) + text
        values, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert len(values) == len(tops) == len(choice.logprobs.tokens) == len(prompt) + 1
        assert values[0] is None and tops[0] is None
        expected = score_tokens(language.model, whole, 1, 256)
        assert values[1:] == pytest.approx([each.value for each in expected], abs=1e-4)
        assert [max(top.values()) for top in tops[1:]] == pytest.approx([each.top[0][1] for each in expected], abs=1e-4)
        assert values[-1] == max(tops[-1].values())
        offsets = choice.logprobs.text_offset
        assert offsets[0] == 0 and offsets == sorted(offsets)
    scored = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == language.tokenizer.decode(ids)
    assert scored.choices[0].logprobs is not None and len(scored.choices[0].logprobs.tokens or []) == 4


def test_scores_are_those_of_all_tokens_before(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(60, 90))
    with torch.no_grad():
        logits = language.model.logits(language.model(torch.tensor([ids]), torch.arange(30)[None]))[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert [each.value for each in score_tokens(language.model, ids)] == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr("internlm.apis.scoring.LOGITS_AT_ONCE", 700)  # two rows of 300 at a time
    assert [each.value for each in score_tokens(language.model, ids)] == pytest.approx(expected, abs=1e-5)


def test_stop_texts_are_compared_as_text(client: OpenAI, language: LanguageModel) -> None:
    whole, _ = greedy(language, "some", 20)
    stop = whole[5:7]
    found = client.completions.create(model="tiny", prompt="some", max_tokens=20, temperature=0, stop=["never", stop])
    assert found.choices[0].text == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"
    streamed = client.completions.create(
        model="tiny", prompt="some", max_tokens=20, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: whole.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_no_stop_text_ends_a_text_before_its_least_number_of_tokens(
    client: OpenAI, language: LanguageModel, stream: bool
) -> None:
    _, ids = greedy(language, "some", 20)
    early, late = (language.tokenizer.decode([ids[number]]) for number in (1, 16))
    number = next(number for number in range(8, 20) if language.tokenizer.decode([ids[number]]) in (early, late))
    options: dict[str, Any] = {"model": "tiny", "prompt": "some", "max_tokens": 20, "temperature": 0}
    found = client.completions.create(**options, stop=[early, late], extra_body={"min_tokens": 8}, stream=stream)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    assert "".join(choice.text for choice in choices) == language.tokenizer.decode(ids[:number])
    assert choices[-1].finish_reason == "stop"


def test_samples_differ_and_repeat_with_the_seed(client: OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        found = client.completions.create(model="tiny", prompt="some", max_tokens=9, n=3, seed=seed, temperature=1.5)
        return [choice.text for choice in found.choices]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3


def test_samples_of_several_prompts_have_seeds_and_usage_of_their_own(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "max_tokens": 9, "temperature": 1.5}
    found = client.completions.create(prompt=["some", "some"], n=2, seed=5, **options)
    alone = [client.completions.create(prompt="some", seed=seed, **options) for seed in range(5, 9)]
    assert [choice.text for choice in found.choices] == [each.choices[0].text for each in alone]
    assert len({choice.text for choice in found.choices}) == 4
    assert found.usage is not None and found.usage.prompt_tokens == 2 * len("some")
    assert found.usage.completion_tokens == 4 * 9 and found.usage.total_tokens == 2 * len("some") + 4 * 9


def test_tokens_that_cut_characters_are_told_apart(client: OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="né😀!", max_tokens=0, echo=True, logprobs=20)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert logprobs.tokens[:3] == ["n", r"bytes:\xc3", r"bytes:\xa9"] and logprobs.tokens[-1] == "!"
    assert logprobs.text_offset == [0, 1, 1, 2, 2, 2, 2, 3]
    assert [len(top) for top in logprobs.top_logprobs[1:]] == [20] * 7
    messages: Any = [{"role": "user", "content": "a"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=30, temperature=0, logprobs=True, logit_bias={"162": 40}
    )
    content = chat.choices[0].logprobs.content
    assert any(token.token == "\ufffd" for token in content)
    assert all(len(token.bytes or []) == 1 for token in content)
    assert bytes(byte for token in content for byte in token.bytes or []).decode(errors="replace") == (
        chat.choices[0].message.content
    )


def test_samples_with_echo_have_log_probabilities_of_their_own(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": "some", "max_tokens": 3, "temperature": 1.5, "logprobs": 0}
    found = client.completions.create(n=2, seed=5, echo=True, **options)
    for choice, seed in zip(found.choices, (5, 6), strict=True):
        alone = client.completions.create(seed=seed, **options).choices[0]
        assert choice.text == f"some{alone.text}" and choice.logprobs is not None and alone.logprobs is not None
        assert choice.logprobs.tokens == [*"some", *(alone.logprobs.tokens or [])]
        new = (choice.logprobs.token_logprobs or [])[4:]
        assert new == pytest.approx(alone.logprobs.token_logprobs, abs=1e-4)


def test_chats_follow_the_template(client: OpenAI, folder: Path) -> None:
    messages: Any = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]},
    ]
    expected = answer(folder, "[system]be[user]one[a]")
    options: Any = {"model": "tiny", "messages": messages, "max_completion_tokens": 6, "temperature": 0}
    found = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert found.choices[0].message.content == expected and found.choices[0].message.role == "assistant"
    content = found.choices[0].logprobs.content
    assert len(content) == 6 and all(len(token.top_logprobs) == 2 for token in content)
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]


def test_a_bias_and_penalties_reach_the_choice(client: OpenAI, language: LanguageModel) -> None:
    options: Any = {"model": "tiny", "prompt": "some", "max_tokens": 5, "temperature": 0}
    biased = client.completions.create(**options, logit_bias={"70": 100})
    assert biased.choices[0].text == language.tokenizer.decode([70] * 5)
    both = client.completions.create(**options, logit_bias={"70": 100}, presence_penalty=2, frequency_penalty=2)
    assert both.choices[0].text == biased.choices[0].text
    texts = set()
    bias = {70: 100.0, 71: 100.0, 72: 100.0}
    penalties: list[dict[str, Any]] = [{}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
    for each in penalties:
        request = {**options, "max_tokens": 12, "logit_bias": {str(id): bias[id] for id in bias}, **each}
        sampling = Sampling(max_new_tokens=12, num_tokens=256, logit_bias=bias, **each)
        ids = generate(language.model, [language.encode("some")], sampling)[0][0].new_ids
        assert client.completions.create(**request).choices[0].text == language.tokenizer.decode(ids)
        texts.add(tuple(ids))
    assert len(texts) == 3
    plain = client.completions.create(**options).choices[0].text
    assert client.completions.create(**options, extra_body={"repetition_penalty": 9.0}).choices[0].text != plain


def test_tokens_and_texts(port: int, language: LanguageModel) -> None:
    text = "naïve 漢字"
    status, found = send(port, "POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert status == 200 and found["tokens"] == language.encode(text)
    assert send(port, "POST", "/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": text})
    status, info = send(port, "GET", "/tokenizer_info")
    assert status == 200 and info["vocab_size"] == 256 and "add_generation_prompt" in info["chat_template"]


def test_megatron_requests(port: int, language: LanguageModel) -> None:
    body = {"prompts": ["some", "other text"], "tokens_to_generate": 5, "top_k": 1, "logprobs": True}
    status, found = send(port, "PUT", "/api", body)
    assert status == 200
    for n, prompt in enumerate(body["prompts"]):  # type: ignore[arg-type, var-annotated]
        assert found["text"][n] == prompt + greedy(language, prompt, 5)[0]
        assert len(found["segments"][n]) == len(language.encode(prompt)) + 5 == len(found["logprobs"][n]) + 1
