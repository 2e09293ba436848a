"""A server with a tiny model: fixtures to import, what its clients know, and what they expect of it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands.test_chat_command import make_folder
from openai import OpenAI

from helpers.servers import serving
from internlm.apis.engine import Text
from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.serve.app import create_app
from internlm.serve.engine_thread import EngineThread, Piece
from internlm.serve.language_model import LanguageModel, load_language_model
from internlm.serve.served_model import ServedModel, ServedModels, ServerSettings

KEY = "secret"
LENGTH = 64
"""Tokens of a text."""


@pytest.fixture(scope="module", name="folder")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module", name="language")
def tiny_language(folder: Path) -> LanguageModel:
    """For expected results; the server has a model of its own."""
    return load_language_model(str(folder / "run"), device="cpu")


@pytest.fixture(scope="module", name="engine")
def tiny_engine(folder: Path) -> Iterator[EngineThread]:
    language = load_language_model(str(folder / "run"), device="cpu")
    engine = EngineThread(language, max_length=LENGTH, num_rows=4, max_waiting=60)
    yield engine
    engine.close()


@pytest.fixture(scope="module", name="port")
def tiny_port(engine: EngineThread) -> Iterator[int]:
    template = engine.language.chat_template()
    settings = ServerSettings(api_key=KEY, max_body=100_000, seconds=60)
    app = create_app(ServedModels([ServedModel(engine, "tiny", template)], settings))
    with serving(app) as port:
        yield port


@pytest.fixture(scope="module", name="client")
def tiny_client(port: int) -> OpenAI:
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


def pieces_of(engine: EngineThread, text: Text, stops: Sequence[str] = ()) -> list[Piece]:
    pieces, done = [], threading.Event()

    def show(piece: Piece) -> None:
        pieces.append(piece)
        if piece.finish_reason is not None:
            done.set()

    engine.submit([text], stops, show)
    assert done.wait(30)
    return pieces
