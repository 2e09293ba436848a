"""Servers, in threads of this process and as processes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
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


@contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process of `internlm serve` on a free port, its address, and the lines of its log up to there; ends it."""
    with subprocess.Popen(
        [sys.executable, "-m", "internlm.cli", "serve", *options, "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            assert process.stderr is not None
            lines: list[str] = []
            while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", "".join(lines[-1:]))):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            yield process, found[1], lines
        finally:
            process.kill()


def add_steps(run: Path, steps: Sequence[int], **numbers: Any) -> None:
    """Append steps to the metrics file of a run."""
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            values = {"step": step, "loss": 5 / (1 + step), "lr": 1e-3, "num_consumed_tokens": 64 * step, **numbers}
            file.write(json.dumps(values) + "\n")
