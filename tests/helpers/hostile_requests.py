"""Requests that no client of good will sends: wrong fields, wrong values, wrong JSON, wrong HTTP."""

from __future__ import annotations

import http.client
import json
import socket
from random import Random
from typing import Any

PATHS = (
    *("/v1/completions", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions", "/tokenize"),
    *("/detokenize", "/api", "/v1/models", "/v1/x"),
)
FIELDS = (
    *(
        "prompt",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
        "stream",
        "echo",
    ),
    *(
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "frequency_penalty",
        "presence_penalty",
        "min_tokens",
        "best_of",
        "model",
    ),
    *(
        "stream_options",
        "tokens",
        "add_special_tokens",
        "prompts",
        "tokens_to_generate",
        "add_BOS",
        "content",
        "__class__",
    ),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        10**30,
        1e308,
        -1e-308,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "a",
        "\x00",
        "\ufffe",
    ),
    *("\ud800", "𝕏" * 50, "a" * 5000, [], [[]], [None], [1, "a"], [-1], [10**20], [[1], ["a"]], {}, {"a": {}}),
    *({"1": 1e9}, {"-1": 0}, [{"role": "user", "content": "a"}], [{"role": "x" * 999}], [{}], [["a"] * 9] * 9),
)
RAW = (
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: " + b"b" * 70_000 + b"\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PUT /api HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n{",
)


def send_hostile(port: int, key: str | None, random: Random) -> int | None:
    """Send one; returns the status of the answer, None if the connection was closed instead."""
    if random.random() < 0.15:
        return _send_raw(port, random.choice(RAW))
    body = _body(random)
    headers = {"Content-Type": random.choice(("application/json", "text/plain", "multipart/form-data; boundary=a", ""))}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        method = random.choice(("POST",) * 9 + ("PUT", "GET", "DELETE", "HEAD", "OPTIONS"))
        connection.request(method, random.choice(PATHS), body, headers)
        response = connection.getresponse()
        if random.random() < 0.9:
            response.read()
        return response.status
    finally:
        connection.close()


def _body(random: Random) -> bytes:
    fields: dict[str, Any] = {}
    if random.random() < 0.7:
        fields |= {"prompt": "a", "max_tokens": 2}
    for _ in range(random.randrange(1, 4)):
        fields[random.choice(FIELDS)] = random.choice(VALUES)
    data = json.dumps(fields).encode()
    if random.random() < 0.2:
        place = random.randrange(len(data))
        return data[:place] + random.choice((b"", b"\xff", b"}", b"[" * 999)) + data[place + 1 :]
    return data


def _send_raw(port: int, data: bytes) -> int | None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(64)
        except OSError:
            return None
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else None
