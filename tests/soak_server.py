"""Keeps a server under load for minutes: good requests, hostile ones and broken connections, with checks meanwhile.

    python tests/soak_server.py --seconds 300 --seed 7

Checked are: the greedy text of a fixed prompt is the same at all times; no answer has a 5xx status but 503; the
memory of the server does not grow from the second quarter of the time to the last one; the server ends with 0 at an
interrupt. Exits 1 when any of these does not hold.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from commands.test_chat_command import make_folder
from helpers.hostile_requests import send_hostile

MOST_GROWTH = 16
"""MiB between the second quarter of the time and the last one."""


class Load:
    """What the clients have seen."""

    def __init__(self, port: int, seconds: float) -> None:
        self.port, self.end = port, time.monotonic() + seconds
        self.statuses: Counter[int | None] = Counter()
        self.problems: list[str] = []

    def run(self, seed: int) -> None:
        """Send requests of all kinds one after the other until the time is over."""
        random = Random(seed)
        while time.monotonic() < self.end and not self.problems:
            kind = random.random()
            try:
                if kind < 0.3:
                    status = send_hostile(self.port, None, random)
                elif kind < 0.5:
                    status = self._leave(random)
                else:
                    status = self._complete(random)
            except (OSError, http.client.HTTPException) as error:
                self.problems.append(f"{type(error).__name__}: {error}")
                return
            self.statuses[status] += 1
            if status is not None and status >= 500 and status != 503:
                self.problems.append(f"status {status}")

    def probe(self) -> str:
        """The greedy text of a fixed prompt."""
        body = {"prompt": "a probe of the server", "max_tokens": 8, "temperature": 0}
        while True:
            status, answer = _send(self.port, "/v1/completions", body)
            if status != 429:
                assert status == 200, answer
                return str(answer["choices"][0]["text"])
            time.sleep(0.2)

    def _complete(self, random: Random) -> int:
        body = {
            "prompt": "x" * random.randrange(1, 20),
            "max_tokens": random.randrange(1, 12),
            "seed": random.randrange(9),
        }
        if random.random() < 0.3:
            body |= {"echo": True, "logprobs": 2}
        if random.random() < 0.3:
            body |= {"stop": ["e"], "n": 2}
        return _send(self.port, "/v1/completions", body)[0]

    def _leave(self, random: Random) -> int | None:
        """Ask for a stream, and close the connection in the middle of it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = {"prompt": "y", "max_tokens": 24, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body))
            if random.random() < 0.5:
                return None
            response = connection.getresponse()
            response.read(random.randrange(1, 400))
            return response.status
        finally:
            connection.close()


def _send(port: int, path: str, body: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def _memory(pid: int) -> float:
    """Resident memory of a process in MiB."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def _soak(process: subprocess.Popen[str], port: int, seconds: float, seed: int) -> list[str]:
    """Put the server under load; returns what is wrong."""
    load = Load(port, seconds)
    expected = load.probe()
    threads = [threading.Thread(target=load.run, args=(seed * 100 + number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < load.end and not load.problems:
        time.sleep(1)
        memory.append(_memory(process.pid))
        if (found := load.probe()) != expected:
            load.problems.append(f"the probe is {found!r}, not {expected!r}")
    for thread in threads:
        thread.join()
    quarter = max(1, len(memory) // 4)
    second, last = statistics.median(memory[quarter : 2 * quarter] or memory), statistics.median(memory[-quarter:])
    print(f"{load.statuses.total():,} requests: {dict(load.statuses)}; memory {second:.0f} -> {last:.0f} MiB")
    if last - second > MOST_GROWTH:
        load.problems.append(f"memory grew from {second:.0f} to {last:.0f} MiB")
    return load.problems


def main() -> int:
    """Start a server, put it under load, and end it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = make_folder(Path(name)) / "run"
        command = [sys.executable, "-m", "internlm.cli", "serve", "--ckpt", str(run), "--port", "0", "--device", "cpu"]
        log = Path(name) / "log"
        with log.open("w", encoding="utf-8") as stderr, subprocess.Popen(command, stderr=stderr, text=True) as process:
            try:
                while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", log.read_text(encoding="utf-8"))):
                    assert process.poll() is None, log.read_text(encoding="utf-8")
                    time.sleep(0.2)
                problems = _soak(process, int(found[1]), options.seconds, options.seed)
                process.send_signal(signal.SIGINT)
                if process.wait(60) != 0:
                    problems.append(f"the server ended with {process.returncode}")
            finally:
                process.kill()
        if problems:
            print(log.read_text(encoding="utf-8")[-4000:])
    for problem in problems:
        print(f"WRONG: {problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
