"""Servers with a page, in threads of this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """The port at which an application is served."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def add_steps(run: Path, steps: Sequence[int], **numbers: Any) -> None:
    """Append steps to the metrics file of a run."""
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            values = {"step": step, "loss": 5 / (1 + step), "lr": 1e-3, "num_consumed_tokens": 64 * step, **numbers}
            file.write(json.dumps(values) + "\n")
