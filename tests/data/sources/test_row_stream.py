"""The stream of rows against the tokenizer itself; ranks, workers and interruptions; rows that cannot be used."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.batch_order import SAMPLES, batches_of
from helpers.chat_templates import save_chat_tokenizer
from tokenizers import Tokenizer

from internlm.data.batch import IGNORE_INDEX
from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle
from internlm.data.rows.open_rows import open_row_files
from internlm.data.rows.row_file import RowFile
from internlm.data.rows.row_folders import find_row_files
from internlm.data.rows.shuffled_rows import RowPosition, ShuffledRows
from internlm.data.sources.row_encoder import EncodedRow, TextRowEncoder
from internlm.data.sources.row_stream import RowStream
from internlm.data.sources.shard_reader import RowPacking
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.utils.errors import DataError

TEXTS = {
    "code": [f"What is {number}? " + "The sum of two and three. " * (number % 4) for number in range(90)],
    "en": [f"user {number} answer " + "system tool " * (number % 9) for number in range(150)],
}
NUM_ROWS = sum(map(len, TEXTS.values()))


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    for name in TEXTS:
        (root / name).mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS["en"]]
    (root / "en" / "a.jsonl").write_text("".join(lines[:40]))
    (root / "en" / "b.jsonl").write_text("".join(lines[40:]))
    table = pyarrow.table({"text": TEXTS["code"]})
    pyarrow.parquet.write_table(table, root / "code" / "a.parquet", row_group_size=25)
    return root


def packing_of(
    packing: str = "cut", seq_len: int = 16, micro_bsz: int = 2, mask: bool | None = None, **more: Any
) -> RowPacking:
    settings: dict[str, Any] = {"fim": None, "min_lengths": (0, 0), "skip_bad_documents": False} | more
    mask = packing != "pack_sample_into_one" if mask is None else mask
    return RowPacking(seq_len, micro_bsz, packing, mask, **settings)  # type: ignore[arg-type]


def open_stream(
    folder: Path, tokenizer: Path, packing: RowPacking | None = None, num_shards: int = 16, seed: int = 3
) -> RowStream:
    found = find_row_files(folder)
    loaded = load_tokenizer(tokenizer)
    assert loaded.eos_id is not None
    return RowStream(
        open_row_files([each.path for each in found.files], ["text"]),
        [each.type_id for each in found.files],
        found.types,
        TextRowEncoder(loaded, "text", [], [loaded.eos_id]),
        packing or packing_of(),
        num_shards=num_shards,
        seed=seed,
        facts={},
    )


def documents(tokenizer: Path) -> dict[str, list[list[int]]]:
    """The ids of each row, by the `tokenizers` library itself."""
    peer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos = peer.token_to_id("<|endoftext|>")
    return {name: [[*peer.encode(text).ids, eos] for text in texts] for name, texts in TEXTS.items()}


def test_one_epoch_has_every_row_once(folder: Path, tokenizer: Path) -> None:
    stream = open_stream(folder, tokenizer, packing_of("unpacked", seq_len=256, micro_bsz=1), num_shards=1)
    found: dict[str, list[list[int]]] = {"code": [], "en": []}
    orders = []
    for epoch in range(2):
        order = []
        for index in range(epoch * NUM_ROWS, (epoch + 1) * NUM_ROWS):
            sample = stream.sample(index)
            [length] = sample.row_lengths or ()
            ids = sample.input_ids[0, :length].tolist()
            assert sample.labels[0, :length].tolist() == [*ids[1:], IGNORE_INDEX]
            assert isinstance(sample.type_ids, int)
            found[stream.type_names[sample.type_ids]].append(ids)
            order.append(ids)
        orders.append(order)
    expected = documents(tokenizer)
    assert {name: sorted(rows) for name, rows in found.items()} == {
        name: sorted(2 * rows) for name, rows in expected.items()
    }
    assert orders[0] != orders[1]


def of_shard(stream: RowStream, shard: int, count: int) -> list[Any]:
    return [stream.sample(shard + number * stream.num_shards) for number in range(count)]


def test_cut_samples_are_the_documents_of_a_shard_one_after_the_other(folder: Path, tokenizer: Path) -> None:
    cut = of_shard(open_stream(folder, tokenizer), 5, 40)
    ids = np.concatenate([sample.input_ids for sample in cut]).tolist()
    labels = np.concatenate([sample.labels for sample in cut]).tolist()
    types = np.concatenate([np.broadcast_to(sample.type_ids, 32) for sample in cut]).tolist()
    whole = of_shard(open_stream(folder, tokenizer, packing_of("unpacked", seq_len=256, micro_bsz=1)), 5, 120)
    expected_ids, expected_labels, expected_types = [], [], []
    for sample in whole:
        length = sample.row_lengths[0]
        expected_ids += sample.input_ids[0, :length].tolist()
        expected_labels += sample.labels[0, :length].tolist()
        expected_types += [sample.type_ids] * length
    assert len(set(types)) == 2
    assert (ids, labels, types) == tuple(each[: len(ids)] for each in (expected_ids, expected_labels, expected_types))


def test_best_fit_keeps_documents_whole(folder: Path, tokenizer: Path) -> None:
    stream = open_stream(folder, tokenizer, packing_of("best_fit", seq_len=64, micro_bsz=1), num_shards=1)
    typed = [(ids, stream.type_names.index(name)) for name, rows in documents(tokenizer).items() for ids in rows]
    known = [ids for ids, _ in typed]
    assert max(map(len, known)) <= 64
    num_mixed = 0
    left = [*known]
    for index in range(40):
        sample = stream.sample(index)
        start = 0
        is_mixed = np.ndim(sample.type_ids) > 0 and len(np.unique(sample.type_ids)) > 1
        num_mixed += is_mixed
        for length in sample.lengths:
            ids = sample.input_ids[start : start + length].tolist()
            if any(ids):
                left.remove(ids)
            if is_mixed:
                # Padding has type 0.
                expected = next(type_id for each, type_id in typed if each == ids) if any(ids) else 0
                assert set(np.asarray(sample.type_ids)[start : start + length].tolist()) == {expected}
            start += length
    assert num_mixed > 5
    # What is left would have followed.
    assert 0 < len(left) < len(known) // 2


def test_padding_behind_best_fit_bins_has_type_0(folder: Path, tokenizer: Path) -> None:
    """Without a document mask each row of a sample is a bin, and the last sample of a window may lack some."""
    stream = open_stream(folder, tokenizer, packing_of("best_fit", seq_len=64, micro_bsz=4, mask=False), num_shards=1)
    num_tokens = 0
    for index in range(60):
        sample = stream.sample(index)
        if np.ndim(sample.type_ids) > 0:
            ids, type_ids = sample.input_ids.reshape(-1), np.asarray(sample.type_ids).reshape(-1)
            padding = type_ids[int(np.flatnonzero(ids)[-1]) + 2 :]
            assert not padding.any()
            num_tokens += len(padding)
    assert num_tokens > 64


def test_best_fit_does_not_sort_samples_by_the_length_of_documents(folder: Path, tokenizer: Path) -> None:
    num_shards = 24
    stream = open_stream(folder, tokenizer, packing_of("best_fit", seq_len=64, micro_bsz=1), num_shards=num_shards)
    longest = [max(stream.sample(index).lengths) for index in range(num_shards * 8)]
    by_number = np.array(longest).reshape(8, num_shards).mean(axis=1)
    # Sorted, the first sample of a window would have documents twice as long as the last one.
    assert by_number.max() < 1.35 * by_number.min()


FIM = FillInTheMiddle(rate=0.5, spm_rate=0.5, prefix=1, middle=2, suffix=3, level="document", bos=None, eos=0, seed=1)


@pytest.mark.parametrize(
    "mode",
    [
        {"packing": "cut"},
        {"packing": "cut", "fim": FIM},
        {"packing": "pack_sample_into_one"},
        {"packing": "unpacked"},
        {"packing": "best_fit"},
        {"packing": "best_fit", "mask": False},
    ],
    ids=lambda mode: "-".join(map(str, mode.values()))[:24],
)
def test_ranks_workers_and_interruptions_change_nothing(folder: Path, tokenizer: Path, mode: dict[str, Any]) -> None:
    def open_it() -> RowStream:
        return open_stream(folder, tokenizer, packing_of(**mode), num_shards=8 * SAMPLES)

    expected = batches_of(open_it, 30)
    assert batches_of(open_it, 30, sizes=(2, 1, 4), workers=(0, 3), stops=(7, 8, 20)) == expected


def test_two_hundred_steps(folder: Path, tokenizer: Path) -> None:
    def open_it() -> RowStream:
        return open_stream(folder, tokenizer, num_shards=8 * SAMPLES)

    expected = batches_of(open_it, 200)
    stops = (20, 21, 60, 99, 150)
    assert batches_of(open_it, 200, sizes=(2, 8, 1, 4), workers=(0, 1, 4), stops=stops) == expected


def test_shards_that_no_rank_owns_change_nothing(folder: Path, tokenizer: Path) -> None:
    def open_it() -> RowStream:
        return open_stream(folder, tokenizer, num_shards=5)

    expected = batches_of(open_it, 30)
    assert batches_of(open_it, 30, sizes=(4, 2), workers=(3, 0), stops=(11, 12)) == expected


class CountingEncoder:
    def __init__(self, encoder: TextRowEncoder) -> None:
        self.encoder, self.num_rows = encoder, 0

    def encode(self, rows: Sequence[tuple[RowFile, int]]) -> list[EncodedRow]:
        self.num_rows += len(rows)
        return self.encoder.encode(rows)


def test_ranks_that_resumed_save_their_newest_cursors(folder: Path, tokenizer: Path) -> None:
    """A rank that resumed also knows the old cursors of shards that others have read since."""
    state: dict[str, Any] = {}
    for total in (5, 12, 20):
        ranks = [
            build_train_loader(open_stream(folder, tokenizer), micro_num=4, data_rank=rank, data_size=2, prefetch=0)
            for rank in range(2)
        ]
        for loader in ranks:
            if state:
                loader.load_state_dict(state)
            while loader.step < total:
                next(loader)
        state = ranks[0].merge_states([loader.state_dict() for loader in ranks])
        # Of 16 shards, each step reads 8.
        expected = {str(shard): -(-(8 * total - shard) // 16) for shard in range(16)}
        assert {shard: entry[0] for shard, entry in state["stream"]["cursors"].items()} == expected


class SharedCountingEncoder:
    """Counts the rows that all processes together encode."""

    def __init__(self, encoder: TextRowEncoder) -> None:
        self.encoder, self.num_rows = encoder, multiprocessing.Value("l", 0)

    def encode(self, rows: Sequence[tuple[RowFile, int]]) -> list[EncodedRow]:
        with self.num_rows.get_lock():
            self.num_rows.value += len(rows)
        return self.encoder.encode(rows)


def test_resuming_reads_nothing_again(folder: Path, tokenizer: Path) -> None:
    first = build_train_loader(open_stream(folder, tokenizer), micro_num=8)
    for _ in range(50):
        next(first)
    state = first.merge_states([first.state_dict()])
    expected = next(first).micro_batches[0].input_ids.tolist()
    first.close()
    stream = open_stream(folder, tokenizer)
    stream._encoder = encoder = CountingEncoder(stream._encoder)  # type: ignore[arg-type]
    loader = build_train_loader(stream, micro_num=8, prefetch=0)
    loader.load_state_dict(state)
    assert next(loader).micro_batches[0].input_ids.tolist() == expected
    # About a sample of 32 tokens for each of the 8 shards of this step.
    assert encoder.num_rows < 60


@pytest.mark.parametrize("index", [1, 16, 21, 40])
def test_without_a_position_every_shard_is_read_from_its_first_sample(
    folder: Path, tokenizer: Path, index: int
) -> None:
    stream, fresh = open_stream(folder, tokenizer, num_shards=16), open_stream(folder, tokenizer, num_shards=16)
    [notice] = stream.load_state(index, {})
    assert "they are read from the beginning" in notice
    for number in range(index, index + 16):
        assert stream.sample(number).input_ids.tolist() == fresh.sample(number % 16).input_ids.tolist()


@pytest.mark.parametrize("num_workers", [3, 7, 40])
def test_workers_share_the_rows(folder: Path, tokenizer: Path, num_workers: int) -> None:
    """No row is tokenized by several workers, whatever their number is to that of the shards."""

    def rows_of(workers: int) -> int:
        stream = open_stream(folder, tokenizer)
        stream._encoder = encoder = SharedCountingEncoder(stream._encoder)  # type: ignore[arg-type]
        loader = build_train_loader(stream, micro_num=2, num_workers=workers, total_steps=100)
        assert len(list(loader)) == 100
        return int(encoder.num_rows.value)

    assert rows_of(num_workers) == rows_of(1)


def test_another_number_of_shards_continues_with_that_of_the_checkpoint(folder: Path, tokenizer: Path) -> None:
    first = build_train_loader(open_stream(folder, tokenizer, num_shards=16), micro_num=8)
    for _ in range(5):
        next(first)
    state = first.merge_states([first.state_dict()])
    expected = [next(first).micro_batches[0].input_ids.tolist() for _ in range(20)]
    first.close()
    second = build_train_loader(open_stream(folder, tokenizer, num_shards=48), micro_num=8)
    second.load_state_dict(state)
    assert [next(second).micro_batches[0].input_ids.tolist() for _ in range(20)] == expected
    second.close()


def test_a_checkpoint_of_other_data_starts_at_the_beginning(
    folder: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stream = open_stream(folder, tokenizer, num_shards=16)
    loader = build_train_loader(stream, micro_num=8)
    loader.load_state_dict({"step": 3, "consumed_samples": 24, "packing": "cut", "stream": {}})
    batch = next(loader)
    assert batch.sample_indices == list(range(24, 32))
    fresh = open_stream(folder, tokenizer, num_shards=16)
    # Sample 24 is the first of shard 8.
    assert batch.micro_batches[0].input_ids[0].tolist() == fresh.sample(8).input_ids.tolist()
    assert "has no position in these rows" in caplog.text
    loader.close()


def test_rows_that_are_no_documents_are_named(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "What is the sum? " * 9}, {"text": ""}, {"text": "answer"}] * 4
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = open_stream(tmp_path, tokenizer, packing_of(min_lengths=(20,)), num_shards=1)
    ids = {tuple(stream.sample(index).input_ids.tolist()) for index in range(30)}
    assert len(ids) > 1
    assert "it has no token" in caplog.text and "data.min_length is 20" in caplog.text
    loader = build_train_loader(
        open_stream(tmp_path, tokenizer, packing_of(min_lengths=(10_000,)), num_shards=1), micro_num=1, prefetch=0
    )
    with pytest.raises(
        DataError, match=r"are no documents, at last: .*row \d+: it has \d+ tokens, and data.min_length is 10000"
    ) as caught:
        next(loader)
    # To leave out one document would not help.
    assert "skip_bad_documents" not in str(caught.value)


def test_a_document_with_exactly_the_minimum_length_is_kept(tmp_path: Path, tokenizer: Path) -> None:
    text = "What is the sum of two and three?"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    num_tokens = len(load_tokenizer(tokenizer).encode_batch([text])[0]) + 1
    open_stream(tmp_path, tokenizer, packing_of(min_lengths=(num_tokens,))).sample(0)
    with pytest.raises(DataError, match=r"are no documents, at last: .*data.min_length is"):
        open_stream(tmp_path, tokenizer, packing_of(min_lengths=(num_tokens + 1,))).sample(0)


def test_fill_in_the_middle_differs_between_epochs(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "What is the sum of two and three?"}) + "\n")
    stream = open_stream(tmp_path, tokenizer, packing_of("unpacked", 128, 1, fim=FIM, min_lengths=(0,)))
    assert len({tuple(stream.sample(index).input_ids.reshape(-1).tolist()) for index in range(20)}) > 5


@pytest.mark.parametrize("packing", ["cut", "best_fit", "unpacked"])
def test_short_shards_without_a_document_in_some_epochs(tmp_path: Path, tokenizer: Path, packing: str) -> None:
    """With as many shards as rows, most shards have only empty rows for several epochs."""
    rows = [{"text": f"What is {number}?" if number % 8 == 0 else ""} for number in range(64)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = open_stream(tmp_path, tokenizer, packing_of(packing, min_lengths=(0,)), num_shards=64)
    assert stream.num_shards == 64
    for index in range(192):
        assert len(stream.sample(index).input_ids.reshape(-1)) == 32


def test_files_without_rows_among_others(folder: Path, tmp_path: Path, tokenizer: Path) -> None:
    table = pyarrow.table({"text": TEXTS["code"]})
    pyarrow.parquet.write_table(table[:0], tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=25)
    pyarrow.parquet.write_table(table[:0], tmp_path / "c.parquet")
    files = open_row_files([tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet")], ["text"])
    order = ShuffledRows(files, 4, 3)
    alone = ShuffledRows(files[1:2], 4, 3)
    for shard in range(4):
        found = [(each.file, each.row) for each in order.rows(shard, RowPosition(), 40)]
        assert found == [(1, each.row) for each in alone.rows(shard, RowPosition(), 40)]


@pytest.mark.parametrize("packing", ["cut", "best_fit", "unpacked"])
def test_a_cursor_of_other_settings_continues(folder: Path, tokenizer: Path, packing: str) -> None:
    """Another packing counts otherwise, and another tokenizer makes shorter documents."""
    stream = open_stream(folder, tokenizer, packing_of(packing))
    stream.load_state(16, {"num_shards": 16, "cursors": {str(shard): [1, 0, 2, 0, 99_999] for shard in range(16)}})
    samples = [stream.sample(index) for index in range(16, 64)]
    # Continued from the cursors of these samples, the next ones are the same.
    again = open_stream(folder, tokenizer, packing_of(packing))
    again.note_delivered(range(16, 32), [sample.cursor for sample in samples[:16]])
    for index in range(32, 64):
        assert again.sample(index).input_ids.tolist() == samples[index - 16].input_ids.tolist()


def test_unreadable_rows(tmp_path: Path, tokenizer: Path) -> None:
    good = json.dumps({"text": "What is the sum of two and three? " * 3})
    (tmp_path / "a.jsonl").write_text("\n".join([good, '{"other": 1}', good, "{broken", good]) + "\n")
    stream = open_stream(tmp_path, tokenizer, num_shards=1)
    with pytest.raises(DataError, match=r"a.jsonl: row (1 has no column 'text'|3 \(byte \d+\) is not JSON)"):
        for index in range(20):
            stream.sample(index)
    loader = build_train_loader(
        open_stream(tmp_path, tokenizer, packing_of(skip_bad_documents=True), num_shards=1), micro_num=2
    )
    batches = [next(loader) for _ in range(10)]
    loader.close()
    messages = [message for batch in batches for message in batch.unreadable]
    assert any("row 1 has no column" in each for each in messages) and any("row 3" in each for each in messages)
    skipping = build_train_loader(open_stream(tmp_path, tokenizer, num_shards=1), micro_num=2, skip_batches="0-8")
    for step, expected in enumerate(batches[:9]):
        assert next(skipping).num_valid_tokens == 0 < expected.num_valid_tokens, step
    skipping.close()


def test_a_folder_where_nothing_can_be_read_stops(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n' * 50)
    stream = open_stream(tmp_path, tokenizer, packing_of(skip_bad_documents=True), num_shards=1)
    with pytest.raises(DataError, match=r"more than 1,000 rows in sequence cannot be read, at last: .*'text'"):
        stream.sample(0)
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no row"):
        open_stream(tmp_path, tokenizer)


def test_row_order_of_blocks_and_single_rows(folder: Path) -> None:
    found = find_row_files(folder)
    files = open_row_files([each.path for each in found.files], ["text"])
    for chosen in (files, files[:1], files[1:]):
        total = sum(map(len, chosen))
        for num_shards in (1, 3, 60):
            order = ShuffledRows(chosen, num_shards, seed=1)
            for epoch in (0, 2):
                rows = []
                for shard in range(order.num_shards):
                    for row in order.rows(shard, RowPosition(epoch), total // order.num_shards + 40):
                        if row.position.epoch > epoch:
                            break
                        rows.append((row.file, row.row))
                assert sorted(rows) == [(file, row) for file, each in enumerate(chosen) for row in range(len(each))]
            # In parts as at once.
            whole = order.rows(0, RowPosition(), 300)
            position, parts = RowPosition(), []
            while len(parts) < 300:
                parts += order.rows(0, position, 7)
                position = parts[-1].following
            assert parts[:300] == whole


def test_each_epoch_has_another_order_of_units_and_of_their_rows(folder: Path) -> None:
    order = ShuffledRows(open_row_files([folder / "code" / "a.parquet"], ["text"]), 1, seed=1)
    epochs = [[row.row for row in order.rows(0, RowPosition(epoch), 90)] for epoch in (0, 1)]
    # The first row group of 25 rows is split into units of 22 and 3.
    units = [[row for row in rows if row < 22] for rows in epochs]
    assert sorted(units[0]) == sorted(units[1]) == list(range(22))
    assert units[0] != units[1] and units[0] != sorted(units[0])
    starts = [[row // 25 for row in rows] for rows in epochs]
    assert starts[0] != starts[1]


@pytest.mark.parametrize("packing", ["cut", "best_fit", "unpacked"])
def test_the_first_row_that_cannot_be_read_stops_the_run(tmp_path: Path, tokenizer: Path, packing: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n' * 20)
    with pytest.raises(DataError, match=r"a.jsonl: row \d+ has no column 'text'"):
        open_stream(tmp_path, tokenizer, packing_of(packing), num_shards=1).sample(0)


def test_epochs_are_counted_alike_on_any_number_of_ranks(folder: Path, tokenizer: Path) -> None:
    def epochs(size: int, steps: int) -> list[float]:
        found = []
        for rank in range(size):
            stream = open_stream(folder, tokenizer, num_shards=16)
            loader = build_train_loader(stream, micro_num=8 // size, data_rank=rank, data_size=size)
            for _ in range(steps):
                next(loader)
            found.append(stream.progress_at(8 * steps)["epoch"])
            loader.close()
        return found

    # An epoch has about as many samples as the rows have tokens.
    tokens = sum(len(ids) for rows in documents(tokenizer).values() for ids in rows)
    for size in (1, 2):
        for steps in (1, 6, 40):
            for found in epochs(size, steps):
                assert found == pytest.approx(8 * steps * 32 / tokens, rel=0.35), (size, steps)
