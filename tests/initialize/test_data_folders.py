"""The folders of data of a config that are in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.configs import small_config
from helpers.data_folders import upload, write_folder
from helpers.fault_proxy import FaultProxy
from helpers.s3 import Bucket

from internlm.initialize import data_folders
from internlm.initialize.data_folders import check_same_listing, local_data, train_folder
from internlm.utils.errors import RemoteDataError


@pytest.fixture(autouse=True)
def _nothing_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data_folders, "_listed", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_local_folders_are_as_they_are() -> None:
    config = small_config({"data.train_folder": "/no/such/folder"})
    assert train_folder(config) == local_data(config, "/no/such/folder") == "/no/such/folder"
    context: Any = None
    check_same_listing(config, context)


def test_a_start_lists_a_folder_once_and_a_later_one_again(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(write_folder(tmp_path / "train", "megatron"), bucket, "train")
    with FaultProxy(bucket.port) as proxy:
        place = f"{bucket.url_through(proxy.port)}/train"
        config = small_config({"data.train_folder": place, "data.cache_folder": str(tmp_path / "here")})
        folder = train_folder(config)
        assert folder is not None and Path(folder).is_relative_to(tmp_path / "here")
        count = len(proxy.seen)
        assert train_folder(config) == folder and len(proxy.seen) == count
        monkeypatch.setattr(data_folders, "_FRESH_SECONDS", 0.0)
        assert train_folder(config) == folder and len(proxy.seen) > count


def test_ranks_that_have_listed_different_files_stop(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(write_folder(tmp_path / "train", "megatron"), bucket, "train")
    config = small_config({"data.train_folder": url})
    context: Any = None

    def of_two_ranks(context: Any, digest: str) -> list[str]:
        if not seen:
            seen.append(digest)
        return [seen[0], digest]

    seen: list[str] = []
    monkeypatch.setattr(data_folders, "of_all_ranks", of_two_ranks)
    check_same_listing(config, context)
    bucket.client.put_object(Bucket=bucket.name, Key="train/en/b.bin", Body=b"another version")
    monkeypatch.setattr(data_folders, "_FRESH_SECONDS", 0.0)
    with pytest.raises(RemoteDataError, match="ranks have found different files there, so something writes to it"):
        check_same_listing(config, context)
