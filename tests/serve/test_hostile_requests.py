"""200 requests of ill will: each is answered, none with a defect, and the server goes on as before."""

from __future__ import annotations

from collections import Counter
from random import Random

from helpers.hostile_requests import send_hostile
from helpers.tiny_server import KEY, tiny_client, tiny_engine, tiny_folder, tiny_port  # noqa: F401
from openai import OpenAI

from internlm.serve.engine_thread import EngineThread


def test_hostile_requests_change_nothing(port: int, client: OpenAI, engine: EngineThread) -> None:
    def text() -> str:
        return client.completions.create(model="tiny", prompt="a probe", max_tokens=9, temperature=0).choices[0].text

    before, random = text(), Random(7)
    statuses = Counter(send_hostile(port, KEY, random) for _ in range(200))
    assert not [status for status in statuses if status is not None and status >= 500], statuses
    # The requests are neither all refused nor all harmless.
    assert statuses[200] and statuses[400] > 50, statuses
    assert text() == before and engine.num_texts == 0
