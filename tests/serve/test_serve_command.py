"""`internlm serve` as a process: it says where it listens, and ends when it is told to."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from commands.test_chat_command import make_folder


def test_a_server_says_where_it_listens_answers_and_ends_by_a_signal(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    command = [sys.executable, "-m", "internlm.cli", "serve", "--ckpt", str(folder / "run"), "--port", "0"]
    with subprocess.Popen(
        [*command, "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            assert process.stderr is not None
            lines: list[str] = []
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", "".join(lines))):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            assert int(found[1]) > 0 and "8 texts of up to 32 tokens at a time" in lines[-1]
            body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
            with urllib.request.urlopen(found[0] + "/completions", body, timeout=60) as response:
                assert json.load(response)["usage"]["completion_tokens"] == 3
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
