"""Datasets by name: from a cache folder of Hugging Face, from a server on loopback, and errors of the network."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import errors

from internlm.data.rows.hub_datasets import locate_dataset
from internlm.utils.errors import DataError

COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached_dataset(hub: Path, *names: str) -> Path:
    repository = hub / "datasets--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text("x")
    return snapshot


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert locate_dataset(tmp_path) == tmp_path


def test_a_dataset_in_the_cache(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = cached_dataset(hub, "README.md", "data/train-00000-of-00001.parquet")
    with caplog.at_level(logging.INFO, "internlm"):
        assert locate_dataset("org/name") == snapshot
    assert str(snapshot) in caplog.text


@pytest.mark.parametrize("names", [["README.md"], ["data/train-00000-of-00002.parquet"]])
def test_a_part_in_the_cache(hub: Path, names: list[str]) -> None:
    cached_dataset(hub, *names)
    with pytest.raises(
        DataError, match=r"org/name: no such folder, only a part of it is in the cache .* cannot be reached"
    ):
        locate_dataset("org/name")


def test_offline(hub: Path) -> None:
    with pytest.raises(
        DataError, match=r"not in the cache.*network cannot be reached.*hf download --repo-type dataset"
    ):
        locate_dataset("org/name")
    with pytest.raises(DataError, match=r"^/no/such/folder: no such file or folder$"):
        locate_dataset("/no/such/folder")


def test_no_connection(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="network cannot be reached"):
        locate_dataset("org/name")


def test_downloads_what_has_rows(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        if options.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("not there")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_dataset("org/name", "v1") == tmp_path
    assert [call["revision"] for call in calls] == ["v1", "v1"]
    assert {"README.md", "*.parquet"} <= set(calls[1]["allow_patterns"])


@pytest.mark.parametrize(
    ("kind", "text"),
    [(errors.RepositoryNotFoundError, "neither a folder nor a dataset"), (errors.GatedRepoError, "accept the terms")],
)
def test_refusals_of_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], text: str) -> None:
    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("not there")
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError, match=text):
        locate_dataset("org/name")


class FakeHub(BaseHTTPRequestHandler):
    """Answers what `snapshot_download` asks for a dataset of three files."""

    files: ClassVar[dict[str, bytes]] = {
        "README.md": b"# A dataset\n",
        "data/train-00000-of-00001.jsonl": b'{"text": "a row"}\n',
        "image.png": b"not read",
    }
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?", maxsplit=1)[0]
        self.asked.append(path)
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": "1" * 40} for name, data in self.files.items()
        ]
        siblings = [{"rfilename": name} for name in self.files]
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name in self.files:
            self.answer(self.files[name], etag=f'"{name}"')
        elif "/tree/" in path:
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/datasets/org/name"):
            self.answer(json.dumps({"_id": "1", "id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self.send_error(404)

    def answer(self, data: bytes, etag: str | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def test_downloads_once_over_http(tmp_path: Path) -> None:
    """In a process of its own: the address of the hub is read when huggingface_hub is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from internlm.data.rows.hub_datasets import locate_dataset\n"
        "from internlm.data.rows.row_folders import find_row_files\n"
        "from internlm.data.rows.open_rows import open_rows\n"
        "folder = locate_dataset('org/name')\n"
        "assert folder == locate_dataset('org/name')\n"
        "assert not (folder / 'image.png').exists()\n"
        "print(open_rows(find_row_files(folder).files[0].path).read(0))"
    )
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "0", "XDG_CACHE_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'text': 'a row'}"
    assert not [path for path in FakeHub.asked if "image.png" in path]
