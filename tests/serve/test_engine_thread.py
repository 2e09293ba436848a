"""The thread that owns a served model: texts that end, are cancelled, or fail."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_server import LENGTH, greedy, pieces_of, tiny_engine, tiny_folder, tiny_language  # noqa: F401

from internlm.apis.engine import Prompt, Text
from internlm.apis.sampling import Sampling
from internlm.serve.engine_thread import EngineThread, Piece
from internlm.serve.language_model import LanguageModel, load_language_model
from internlm.serve.pieces import CLOSED, Pieces, compute
from internlm.serve.requests import RequestError


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
