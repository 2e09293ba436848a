"""Files of an object store are fetched before they are read, and once an epoch even if the cache takes only a few."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data_folders import upload
from helpers.fault_proxy import Fault, FaultProxy
from helpers.s3 import Bucket

from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.remote import mirror
from internlm.data.remote.fetch_ahead import FetchAhead
from internlm.data.remote.mirror import DataCache, local_folder
from internlm.data.rows.open_rows import open_rows
from internlm.data.rows.shuffled_rows import RowPosition, ShuffledRows
from internlm.data.sources.document_source import DocumentSource
from internlm.data.sources.sample_stream import SampleStream, ShuffledSource
from internlm.data.sources.windowed_source import WindowedSource
from internlm.utils.storage import retry

NUM_FILES, WINDOW = 12, 2


@pytest.fixture(autouse=True)
def _every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_SMALL_BYTES", 0)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A train folder of files of equal size."""
    random = np.random.default_rng(0)
    (tmp_path / "train").mkdir()
    for number in range(NUM_FILES):
        with MegatronWriter(tmp_path / "train" / f"{number}.bin", np.dtype(np.uint16)) as writer:
            for _ in range(40):
                writer.write(random.integers(1, 900, 64))
    return tmp_path / "train"


SIZE = 40 * 64 * 2
SAMPLES = 20 * NUM_FILES


def source(folder: str | Path) -> DocumentSource:
    return DocumentSource(folder, MEGATRON, seq_len=64, micro_bsz=2, packing="cut", vocab_size=1000)


def batches(stream: SampleStream, first: int = 0, num_workers: int = 0, steps: int = SAMPLES) -> list[Any]:
    loader = build_train_loader(stream, micro_num=1, num_workers=num_workers, total_steps=first + steps)
    loader.seek(first, first)
    return [batch.micro_batches[0].input_ids.tolist() for batch in loader]


def downloads(proxy: FaultProxy) -> Counter[str]:
    return Counter(seen.path for seen in proxy.seen if seen.method == "GET" and ".bin" in seen.path)


def wait_for(count: int, cache: Path) -> None:
    deadline = time.monotonic() + 5
    while len(list(cache.glob("*/content/*/*"))) < count:
        assert time.monotonic() < deadline, list(cache.glob("*/*/*/*"))
        time.sleep(0.01)


def test_with_windows_each_file_is_fetched_once_an_epoch(bucket: Bucket, tmp_path: Path, folder: Path) -> None:
    upload(folder, bucket, "train")
    local = batches(WindowedSource(source(folder), 1, WINDOW))
    with FaultProxy(bucket.port) as proxy:
        cache = DataCache(tmp_path / "cache", (2 * WINDOW + 1) * SIZE)
        here = local_folder(f"{bucket.url_through(proxy.port)}/train", cache)
        assert batches(WindowedSource(source(here), 1, WINDOW)) == local
        found = downloads(proxy)
        assert len(found) == NUM_FILES and sum(found.values()) <= NUM_FILES + 2 * WINDOW
        # In the middle, with other processes.
        assert batches(WindowedSource(source(here), 1, WINDOW), 100, num_workers=2, steps=50) == local[100:150]
    assert sorted(map(str, local)) == sorted(map(str, batches(ShuffledSource(source(folder), 1))))
    assert local != batches(ShuffledSource(source(folder), 1))


def test_the_next_window_is_there_before_it_is_read(bucket: Bucket, tmp_path: Path, folder: Path) -> None:
    url = upload(folder, bucket, "train")
    stream = WindowedSource(source(local_folder(url, DataCache(tmp_path / "cache"))), 1, WINDOW)
    stream.sample(0)
    wait_for(2 * WINDOW, tmp_path / "cache")
    time.sleep(0.2)
    assert len(list((tmp_path / "cache").glob("*/content/*/*"))) == 2 * WINDOW
    stream.sample(20 * WINDOW)
    wait_for(3 * WINDOW, tmp_path / "cache")


def test_without_windows_all_files_are_fetched_if_there_is_room(bucket: Bucket, tmp_path: Path, folder: Path) -> None:
    url = upload(folder, bucket, "train")
    stream = ShuffledSource(source(local_folder(url, DataCache(tmp_path / "all"))), 1)
    assert not list((tmp_path / "all").glob("*/content/*/*"))
    stream.sample(0)
    wait_for(NUM_FILES, tmp_path / "all")
    bounded = ShuffledSource(source(local_folder(url, DataCache(tmp_path / "few", 3 * SIZE))), 1)
    bounded.sample(0)
    time.sleep(0.3)
    assert len(list((tmp_path / "few").glob("*/content/*/*"))) == 1


def test_a_resumed_run_with_another_window_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = build_train_loader(WindowedSource(source(folder), 1, 2), micro_num=1).state_dict()
    loader = build_train_loader(WindowedSource(source(folder), 1, 3), micro_num=1)
    loader.load_state_dict(loader.merge_states([state]))
    assert "shuffle_files was 2, is 3" in caplog.text


def test_a_fault_ahead_of_need_is_logged_and_read_again(
    bucket: Bucket, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNLM_STORAGE_RETRY_SECONDS", "0")
    upload(folder, bucket, "train")
    with FaultProxy(bucket.port) as proxy:
        here = Path(local_folder(f"{bucket.url_through(proxy.port)}/train", DataCache(tmp_path / "cache")))
        proxy.plan(Fault(status=403, code="AccessDenied"), method="GET", text="0.bin")
        ahead = FetchAhead()
        ahead.request([here / "0.bin"])
        deadline = time.monotonic() + 20
        while "cannot fetch ahead of need" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ahead.request([here / "0.bin"])
        wait_for(1, tmp_path / "cache")


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_rows_with_windows(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    paths = []
    for number in range(6):
        path = tmp_path / f"{number}.{name}"
        rows = [{"text": f"{number} {row}"} for row in range(10 + number)]
        if name == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
        paths.append(path)
    files = [open_rows(path) for path in paths]
    order = ShuffledRows(files, 3, seed=1, num_files=2)
    for epoch in (0, 1):
        found = []
        for shard in range(3):
            rows_of_shard = [
                row for row in order.rows(shard, RowPosition(epoch), order.num_rows) if row.position.epoch == epoch
            ]
            for row in rows_of_shard:
                window = order.window_of(shard, row.position)
                assert window is not None and window[0] == epoch
                assert row.file in order.files_from(window)[:2]
            found += [(row.file, row.row) for row in rows_of_shard]
        assert sorted(found) == [(file, row) for file in range(6) for row in range(10 + file)]
