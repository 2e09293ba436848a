"""`internlm serve` as a process: it says where it listens, and ends when it is told to."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

from commands.test_chat_command import make_folder
from helpers.servers import started


def test_a_server_says_where_it_listens_answers_and_ends_by_a_signal(tmp_path: Path) -> None:
    with started("--ckpt", str(make_folder(tmp_path) / "run")) as (process, address, log):
        assert "8 texts of up to 32 tokens at a time" in log[-1] and not address.endswith(":0")
        body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
        with urllib.request.urlopen(f"{address}/v1/completions", body, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head + b"zz\r\n{}\r\n0\r\n\r\n")
            while connection.recv(999):
                pass
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        rest = process.stderr.read()
        assert "Invalid HTTP request received" in rest and "Traceback" not in rest, rest
        assert process.wait(30) == 0
