"""What a server refuses, and that it goes on after it."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from helpers.tiny_server import KEY, send, tiny_client, tiny_engine, tiny_folder, tiny_port  # noqa: F401
from openai import OpenAI

from internlm.serve.engine_thread import EngineThread

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


def test_a_defect_is_an_answer_too(port: int, engine: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.language.tokenizer, "encode_batch", lambda _: 1 / 0)
    status, answer = send(port, "POST", "/tokenize", {"prompt": "a"})
    assert status == 500 and "the server failed (ZeroDivisionError)" in answer["error"]["message"]
