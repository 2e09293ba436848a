"""What the page is made of, without a browser: its files, the paths of a run, several models beside each other."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands.test_chat_command import make_folder
from helpers.servers import add_steps, serving, started

from internlm.config.schema import Config
from internlm.monitor.run_file import StartedRun, write_run_file
from internlm.serve.app import create_run_app
from internlm.serve.page_files import FOLDER, page_files
from internlm.serve.run_folder import RunFolder
from internlm.utils.errors import ConfigError

KEY = "secret"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run_pages") / "run"
    add_steps(run, range(1, 5))
    return run


@pytest.fixture(scope="module")
def port(run: Path) -> Iterator[int]:
    with serving(create_run_app(RunFolder(run), KEY)) as port:
        yield port


def get(port: int, path: str, key: str | None = KEY, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read()


def test_files_need_no_key_and_everything_else_does(port: int) -> None:
    for path in page_files():
        status, headers, body = get(port, path, key=None)
        assert status == 200 and body and "default-src 'self'" in headers["content-security-policy"]
    others = ("/overview", "/run/curves", "/run/layout", "/page/", "/page/../overview", "/page/%2e%2e/app.py", "/page")
    for path in others:
        for key in (None, "wrong"):
            assert get(port, path, key)[0] == 401, path
    assert get(port, "/", None, "POST")[0] == 401
    assert get(port, "/page/../app.py")[0] == 404


def test_the_page_names_nothing_elsewhere_and_has_no_code_in_markup() -> None:
    """What the policy would refuse is not there; the licence of what is vendored is."""
    for file in FOLDER.glob("*.*"):
        text = file.read_text(encoding="utf-8")
        addresses = re.findall(r"(?:https?:)?//[\w.]+\.\w+", text)
        assert set(addresses) <= {"http://www.w3.org", "https://html.spec.whatwg.org"}, file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\son\w+=\"", text), (
            file.name
        )
        assert len(text.splitlines()) < 300, file.name
    assert "MIT License" in (FOLDER / "vendor" / "uplot" / "LICENSE").read_text()


def test_a_run_without_a_model(port: int, run: Path) -> None:
    assert json.loads(get(port, "/overview")[2]) == {"models": [], "run": f"{run.parent.name}/run"}
    view = json.loads(get(port, "/run/curves?name=loss&name=absent")[2])
    assert view["steps"] == [1, 2, 3, 4] and list(view["curves"]) == ["loss"] and view["is_complete"]
    assert view["notices"] == []
    written = time.time() - 7200
    os.utime(run / "metrics.jsonl", (written, written))
    assert 7200 <= json.loads(get(port, "/run/curves?name=loss")[2])["age"] < 7300
    for query in ("version=x", "start=", "&".join(["name=a"] * 101)):
        status, _, body = get(port, f"/run/curves?{query}")
        assert status == 400 and query.split("=")[0] in json.loads(body)["error"]["message"]
    assert get(port, "/v1/models")[0] == 404


def test_notices_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    folder = RunFolder(run)
    assert "the run writes it when its first step has ended" in folder.curves([])["notices"][0]
    add_steps(run, [1, 2, 3])
    folder.curves([])
    add_steps(run, [2])
    (run / "metrics.jsonl").open("a").write("garbage\n")
    (run / "metrics.replaced.jsonl").touch()
    found = folder.curves(["loss"])
    assert [re.sub(r"\D", "", text) for text in found["notices"]] == ["2", "", "1"]
    assert found["curves"]["loss"]["mean"] == [2.5, pytest.approx(5 / 3)]
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    assert "was replaced or cut" in folder.curves([])["notices"][0]


def test_a_layout_that_cannot_be_shown_is_told(port: int, run: Path) -> None:
    status, _, body = get(port, "/run/layout")
    assert status == 400 and "run.json' does not exist" in json.loads(body)["error"]["message"]
    model = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    config = Config.model_validate(
        {"model_type": "INTERNLM2", "model": model, "data": {"seq_len": 16, "micro_bsz": 1, "total_steps": 9}}
    )
    write_run_file(run, StartedRun(config, 2))
    layout = json.loads(get(port, "/run/layout?rank=1")[2])
    assert layout["world_size"] == 2 and layout["timeline"]["rows"][0]["actions"][0] == [0, 1, "F", 0, 0]
    assert layout["tables"][-1]["rows"][1][:3] == ["0", "0-1", "embedding + 0-3 + head"]
    status, _, body = get(port, "/run/layout?rank=2")
    assert status == 400 and "must be from 0 to 1" in json.loads(body)["error"]["message"]


def test_folders_that_hold_runs_are_named(tmp_path: Path) -> None:
    add_steps(tmp_path / "one", [1])
    with pytest.raises(ConfigError, match="the folders of runs in it: one"):
        RunFolder(tmp_path)
    assert RunFolder(tmp_path / "one" / "metrics.jsonl").path == tmp_path / "one"


def test_commands_serve_a_run_and_two_checkpoints(tmp_path: Path) -> None:
    """`--beside` and `--run`, as a process; names, texts at one seed, and its end by a signal."""
    folder = make_folder(tmp_path)
    add_steps(tmp_path / "curves", [1])
    checkpoint = ["--ckpt", str(folder / "run"), "--beside", str(folder / "run"), "--run", str(tmp_path / "curves")]

    def ask(address: str, **body: Any) -> Any:
        with urllib.request.urlopen(address, json.dumps(body).encode() if body else None, timeout=60) as response:
            return json.load(response)

    with started(*checkpoint) as (process, address, _):
        state = ask(f"{address}/overview")
        first, beside = (model["id"] for model in state["models"])
        assert beside == f"{first}-0" and state["run"].endswith("/curves")
        texts = [
            ask(f"{address}/v1/completions", prompt="a", max_tokens=9, seed=3, **body)
            for body in ({}, {"model": first}, {"model": beside})
        ]
        assert [text["model"] for text in texts] == [first, first, beside]
        assert len({text["choices"][0]["text"] for text in texts}) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def open_port(run: Path) -> Iterator[int]:
    """A server without a key."""
    with serving(create_run_app(RunFolder(run), None)) as port:
        yield port


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "MyMachine"}, 200),
        ({"Host": "runs.localhost"}, 200),
        ({"Host": "attacker.example:8000"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Host": "attacker.example."}, 403),
        ({"Host": "attacker.example/page/main.js?"}, 403),
        ({"Host": "["}, 200),
        ({"Host": "127.0.0.1", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "127.0.0.1", "Sec-Fetch-Site": "none"}, 200),
        ({"Host": "127.0.0.1", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_pages_of_other_sites_get_nothing_from_a_server_without_a_key(
    open_port: int, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", open_port, timeout=60)
    connection.request("GET", "/run/curves?name=loss", headers=headers)
    response = connection.getresponse()
    body = response.read()
    assert response.status == status
    assert (b'"loss"' in body) == (status == 200)
    assert "access-control-allow-origin" not in response.headers


def test_whoever_has_the_key_may_use_any_name(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", "Host": "models.example", "Sec-Fetch-Site": "cross-site"}
    connection.request("GET", "/overview", headers=headers)
    assert connection.getresponse().status == 200


def test_lines_that_are_no_text_are_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    add_steps(run, range(1, 3))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0, "\\ud800": 1.0}\n{"step": 4, "loss": 1.0, "unit": "\\udfff"}\n[]\n')
    add_steps(run, [5])
    with serving(create_run_app(RunFolder(run), None)) as port:
        status, _, body = get(port, "/run/curves?name=loss", key=None)
    assert status == 200
    assert json.loads(body)["last_step"] == 5
    assert json.loads(body)["notices"] == ["3 lines are no JSON object with a step, and are not shown"]
