"""Datasets by name: from a cache folder of Hugging Face, and errors of the network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

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
