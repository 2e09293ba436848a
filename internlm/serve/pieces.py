"""The texts of one request on the event loop: pieces as they come, and their end when nobody reads them."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from internlm.apis.engine import Text
from internlm.serve.engine_thread import BusyError, EngineThread, Piece
from internlm.serve.requests import RequestError

Result = TypeVar("Result")

POLL_SECONDS = 0.5
"""How often a waiting request looks whether its client and the engine are still there."""
CLOSED = 499
"""Status of a request whose client has gone; nobody reads it."""


class Pieces:
    """Submits texts, and iterates over their pieces; texts that nobody iterates over any more are cancelled.

    Args:
        engine: continues the texts.
        texts: of the request.
        stops: texts that end each of them.
        seconds: how long all of it may take.
        is_disconnected: whether the client has gone; None if the caller is cancelled then.

    Raises:
        RequestError: 429 if too many texts wait. While iterating: 504 after `seconds`, 500 if the engine fails.
    """

    def __init__(
        self,
        engine: EngineThread,
        texts: Sequence[Text],
        stops: Sequence[str],
        *,
        seconds: float,
        is_disconnected: Callable[[], Awaitable[bool]] | None,
    ) -> None:
        self._engine = engine
        self._texts = texts
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._is_disconnected = is_disconnected
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()
        try:
            engine.submit(texts, stops, _threadsafe(self._queue.put_nowait))
        except BusyError:
            raise RequestError("too many requests wait already; try again later", status=429) from None
        # A stream whose client goes before its first event is dropped without being iterated.
        weakref.finalize(self, engine.cancel, texts)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        remaining = len(self._texts)
        next_poll = time.monotonic() + POLL_SECONDS
        try:
            while remaining:
                if time.monotonic() >= next_poll:
                    await self._check()
                    next_poll = time.monotonic() + POLL_SECONDS
                try:
                    piece = await asyncio.wait_for(self._queue.get(), POLL_SECONDS)
                except TimeoutError:
                    continue
                if piece.finish_reason == "failed":
                    raise RequestError("the model's logits became inf or NaN, or the server failed", status=500)
                remaining -= piece.finish_reason is not None
                yield piece
        finally:
            self._engine.cancel(self._texts)

    async def _check(self) -> None:
        if not self._engine.is_alive:
            raise RequestError("the server is shutting down", status=503)
        if time.monotonic() > self._deadline:
            raise RequestError(f"the request took more than {self._seconds:g} seconds", status=504)
        if self._is_disconnected is not None and await self._is_disconnected():
            raise RequestError("the client has gone", status=CLOSED)


async def compute(engine: EngineThread, function: Callable[[], Result]) -> Result:
    """The result of a function that uses the model, computed in the engine's thread.

    Raises:
        RequestError: 503 if the engine has ended.
    """
    found: asyncio.Queue[Result | Exception] = asyncio.Queue()
    engine.compute(function, _threadsafe(found.put_nowait))
    while True:
        try:
            result = await asyncio.wait_for(found.get(), POLL_SECONDS)
            break
        except TimeoutError:
            if not engine.is_alive:
                raise RequestError("the server is shutting down", status=503) from None
    if isinstance(result, Exception):
        raise result
    return result


def _threadsafe(function: Callable[[Result], None]) -> Callable[[Result], None]:
    """A function for other threads that calls this one in the present event loop, unless that is closed."""
    loop = asyncio.get_running_loop()

    def call(value: Result) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(function, value)

    return call
