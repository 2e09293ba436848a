"""`internlm serve` with OpenAI's own client, from a checkpoint to answers."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from commands.test_chat_command import answer, make_folder
from helpers.page_servers import serving
from openai import OpenAI

from internlm.apis.engine import Prompt, Text
from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.apis.scoring import score_tokens
from internlm.serve.app import create_app
from internlm.serve.engine_thread import EngineThread, Piece
from internlm.serve.language_model import LanguageModel, load_language_model
from internlm.serve.pieces import CLOSED, Pieces, compute
from internlm.serve.requests import RequestError
from internlm.serve.served_model import ServedModel, ServedModels, ServerSettings

KEY = "secret"
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def language(folder: Path) -> LanguageModel:
    """For expected results; the server has a model of its own."""
    return load_language_model(str(folder / "run"), device="cpu")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineThread]:
    language = load_language_model(str(folder / "run"), device="cpu")
    engine = EngineThread(language, max_length=LENGTH, num_rows=4, max_waiting=60)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def port(engine: EngineThread) -> Iterator[int]:
    template = engine.language.chat_template()
    settings = ServerSettings(api_key=KEY, max_body=100_000, seconds=60)
    app = create_app(ServedModels([ServedModel(engine, "tiny", template)], settings))
    with serving(app) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)


def send(port: int, method: str, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
    """Status and JSON of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def greedy(language: LanguageModel, prompt: str | list[int], count: int) -> tuple[str, list[int]]:
    ids = language.encode(prompt) if isinstance(prompt, str) else prompt
    sampling = Sampling(max_new_tokens=count, num_tokens=256)
    new = generate(language.model, [ids], sampling)[0][0].new_ids
    return language.tokenizer.decode(new), new


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


BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", b"{", 400, "the body is not JSON of texts and numbers: "),
    ("/v1/completions", b"[1]", 400, "must be a JSON object"),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "NaN is no number of JSON"),
    ("/v1/completions", b"[" * 5000, 400, "the body is not JSON of texts and numbers: "),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
    ("/v1/completions", {}, 400, "prompt: must be a text, a list"),
    ("/v1/completions", {"prompt": []}, 400, "prompt: must not be empty"),
    ("/v1/completions", {"prompt": [[]]}, 400, "must not be empty"),
    ("/v1/completions", {"prompt": ""}, 400, "the prompt is empty"),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt: must be a text, a list"),
    ("/v1/completions", {"prompt": [256]}, 400, "token ids must be from 0 to 255"),
    ("/v1/completions", {"prompt": [-1]}, 400, "token ids must be from 0 to 255"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 64}, 400, "more than the 64 that this server allows"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "asks for nothing"),
    ("/v1/completions", {"prompt": "a", "max_tokens": "9"}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n: "),
    ("/v1/completions", {"prompt": ["a"] * 999, "n": 2}, 400, "1998 texts are more than 1024"),
    ("/v1/completions", {"prompt": "a", "seed": 2**70}, 400, "seed"),
    ("/v1/completions", {"prompt": "a", "seed": 2**64 - 1, "n": 2}, 400, "seed"),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias: 'x' is no token id"),
    ("/v1/completions", {"prompt": "a", "logprobs": 99}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "best_of is not supported"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
    ("/v1/completions", {"prompt": "a", "tempreature": 1}, 400, "tempreature: this server knows no such field"),
    ("/v1/completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options needs stream"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 20}, 400, "min_tokens = 20 is more than the 16"),
    ("/v1/completions", {"prompt": "a" * 200_000}, 413, "more than 100,000 bytes"),
    ("/v1/chat/completions", {"messages": []}, 400, "must have a message"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0]: content must be a text"),
    ("/v1/chat/completions", {"messages": [{"content": "a"}]}, 400, "messages[0]: role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, 400, "tool_calls"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "parts of type 'text' only",
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools is not"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
        400,
        "response_format is not supported",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
        400,
        "needs logprobs",
    ),
    ("/detokenize", {"tokens": [999]}, 400, "token ids must be from 0 to 255"),
    ("/v1/nothing", {}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD, ids=range(len(BAD)))
def test_requests_that_cannot_be_answered(port: int, path: str, body: Any, status: int, message: str) -> None:
    found, answer = send(port, "POST", path, body)
    assert found == status and set(answer["error"]) == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/health"), ("PUT", "/api"), ("GET", "/nothing")],
)
def test_every_path_needs_the_key(port: int, method: str, path: str) -> None:
    for key in (None, "wrong", ""):
        status, answer = send(port, method, path, {"prompt": "a"}, key)
        assert status == 401 and "key" in answer["error"]["message"]


def test_a_broken_connection_frees_its_row(port: int, engine: EngineThread, client: OpenAI) -> None:
    for stream in (True, False):
        for _ in range(6):  # more than there are rows
            connection = http.client.HTTPConnection("127.0.0.1", port)
            body = {"prompt": "a", "max_tokens": 63, "stream": stream}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
            if stream:
                connection.getresponse().read(10)
            connection.close()
    deadline = time.monotonic() + 20
    while engine.num_texts and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.num_texts == 0
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


@pytest.mark.parametrize(("is_disconnected", "seconds", "status"), [(True, 60.0, CLOSED), (False, 0.0, 504)])
def test_texts_that_nobody_waits_for_are_cancelled(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch, is_disconnected: bool, seconds: float, status: int
) -> None:
    monkeypatch.setattr("internlm.serve.pieces.POLL_SECONDS", 0.01)
    text, gate, done = Text(Prompt([70]), Sampling(max_new_tokens=60)), threading.Event(), threading.Event()

    async def client_has_gone() -> bool:
        return is_disconnected

    async def read() -> None:
        async for _ in Pieces(engine, [text], (), seconds=seconds, is_disconnected=client_has_gone):
            pass

    engine.compute(gate.wait, lambda _: None)
    try:
        with pytest.raises(RequestError) as error:
            asyncio.run(read())
    finally:
        gate.set()
    engine.compute(lambda: None, lambda _: done.set())
    assert done.wait(30)
    assert error.value.status == status
    assert text.finish_reason == "cancelled" and len(text.new_ids) < 60 and not engine.num_texts


def test_texts_of_a_stream_that_is_never_read_are_cancelled(engine: EngineThread) -> None:
    text, done = Text(Prompt([70]), Sampling(max_new_tokens=60)), threading.Event()
    gate = threading.Event()
    engine.compute(gate.wait, lambda _: None)

    async def drop() -> None:
        Pieces(engine, [text], (), seconds=60, is_disconnected=None)

    asyncio.run(drop())
    gc.collect()
    gate.set()
    engine.compute(lambda: None, lambda _: done.set())
    assert done.wait(30)
    assert text.finish_reason == "cancelled" and len(text.new_ids) < 60 and not engine.num_texts


def pieces_of(engine: EngineThread, text: Text, stops: Sequence[str] = ()) -> list[Piece]:
    pieces, done = [], threading.Event()

    def show(piece: Piece) -> None:
        pieces.append(piece)
        if piece.finish_reason is not None:
            done.set()

    engine.submit([text], stops, show)
    assert done.wait(30)
    return pieces


def test_a_text_that_has_reached_a_stop_text_frees_its_row(engine: EngineThread, language: LanguageModel) -> None:
    whole, new = greedy(language, [70], 60)
    stop = language.tokenizer.decode(new[3:5])
    text = Text(Prompt([70]), Sampling(max_new_tokens=60, num_tokens=256))
    pieces = pieces_of(engine, text, [stop])
    assert pieces[-1].finish_reason == "stop" and "".join(each.text for each in pieces) == whole[: whole.index(stop)]
    assert text.finish_reason == "cancelled" and len(text.new_ids) < 60


def test_a_token_that_ends_a_text_is_counted_and_not_shown(engine: EngineThread, language: LanguageModel) -> None:
    _, new = greedy(language, [70], 60)
    shown = new[: new.index(new[5])]
    sampling = Sampling(max_new_tokens=60, num_tokens=256, eos_ids=(new[5],), top_logprobs=0)
    pieces = pieces_of(engine, Text(Prompt([70]), sampling))
    assert [id for piece in pieces for id in piece.ids] == shown
    assert sum(len(piece.logprobs) for piece in pieces) == len(shown)
    assert (pieces[-1].finish_reason, pieces[-1].num_tokens) == ("stop", len(shown) + 1)


def test_too_many_texts_are_refused_until_there_is_room(client: OpenAI, engine: EngineThread) -> None:
    options: Any = {"model": "tiny", "prompt": "a", "max_tokens": 60, "n": 60}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.completions.create, **options)
        while not engine.num_texts:
            time.sleep(0.001)
        with pytest.raises(openai.RateLimitError, match="too many requests wait already"):
            client.completions.create(**options)
        assert len(first.result().choices) == 60
    assert len(client.completions.create(**options).choices) == 60


def test_spoiled_weights_fail_the_request_and_not_the_server(folder: Path) -> None:
    """Neighbours of a row with NaN are not spoiled, nor is who has the row next."""
    language = load_language_model(str(folder / "run"), device="cpu")
    with torch.no_grad():
        language.model.tok_embeddings.weight[200] = math.nan  # type: ignore[attr-defined]
    engine = EngineThread(language, max_length=LENGTH, num_rows=2)
    try:
        found: dict[int, list[str | None]] = {0: [], 1: [], 2: []}
        done = threading.Event()
        texts = [Text(Prompt(ids), Sampling(max_new_tokens=8)) for ids in ([70, 71], [200], [72])]

        def show(piece: Any) -> None:
            if piece.finish_reason is not None:
                found[piece.index].append(piece.finish_reason)
                if all(found.values()):
                    done.set()

        engine.submit(texts, (), show)
        assert done.wait(30)
        assert found == {0: ["length"], 1: ["failed"], 2: ["length"]}
    finally:
        engine.close()


def test_a_defect_is_an_answer_too(port: int, engine: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.language.tokenizer, "encode_batch", lambda _: 1 / 0)
    status, answer = send(port, "POST", "/tokenize", {"prompt": "a"})
    assert status == 500 and "the server failed (ZeroDivisionError)" in answer["error"]["message"]


def test_what_the_engine_refuses_fails_and_the_others_go_on(engine: EngineThread) -> None:
    found: dict[int, str | None] = {}
    done = threading.Event()

    def show(piece: Piece) -> None:
        if piece.finish_reason is not None:
            found[piece.index] = piece.finish_reason
            if len(found) == 3:
                done.set()

    settings = [Sampling(max_new_tokens=3), Sampling(max_new_tokens=3, seed=2**64), Sampling(max_new_tokens=3)]
    engine.submit([Text(Prompt([70]), each) for each in settings], (), show)
    assert done.wait(30)
    assert found == {0: "length", 1: "failed", 2: "length"} and engine.is_alive and not engine.num_texts


def test_a_failing_model_fails_its_texts_and_not_the_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language = load_language_model(str(folder / "run"), device="cpu")
    engine = EngineThread(language, max_length=LENGTH)
    try:
        with monkeypatch.context() as broken:
            broken.setattr(type(language.model), "logits", lambda *_: 1 / 0)
            pieces = pieces_of(engine, Text(Prompt([70]), Sampling(max_new_tokens=3)))
        assert [piece.finish_reason for piece in pieces] == ["failed"]
        pieces = pieces_of(engine, Text(Prompt([70]), Sampling(max_new_tokens=3)))
        assert pieces[-1].finish_reason == "length"
    finally:
        engine.close()


def test_who_waits_for_a_score_is_told_that_the_engine_has_ended(folder: Path) -> None:
    engine = EngineThread(load_language_model(str(folder / "run"), device="cpu"), max_length=LENGTH)
    engine.close()
    with pytest.raises(RequestError, match="shutting down"):
        asyncio.run(compute(engine, lambda: 1))
