"""The train loader: the same global batches for any number of ranks and workers, and a cursor that is exact."""

import inspect
import itertools
import json
import logging
import os
import re
import shutil
import threading

import numpy as np
import pytest

from internlm.data.documents.index_cache import CACHE_FOLDER
from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.packing.document_slice import make_slice
from internlm.data.packing.sample import concatenate_slices, padding_sample
from internlm.data.sources.open_source import open_source
from internlm.data.sources.sample_order import sample_order
from internlm.data.sources.sample_stream import ShuffledSource
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import ConfigError, DataError

SEQ_LEN, MICRO_BSZ = 8, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    random = np.random.default_rng(0)
    for name in ("cn/a", "en/b", "en/c"):
        with TokenizedWriter(root / f"{name}.bin") as writer:
            for _ in range(30):
                writer.write(random.integers(1, 1000, random.integers(1, 20)).tolist())
    return root


SOURCE_OPTIONS = set(inspect.signature(open_source).parameters) - {"folder", "seed"}


def build(folder, **options):
    defaults = {
        "seq_len": SEQ_LEN,
        "micro_bsz": MICRO_BSZ,
        "micro_num": 2,
        "packing": "cut",
        "seed": 7,
        "vocab_size": 1000,
    }
    options = defaults | options
    of_source = {name: options.pop(name) for name in list(options) if name in SOURCE_OPTIONS}
    seed = options.pop("seed")
    return build_train_loader(ShuffledSource(open_source(folder, seed=seed, **of_source), seed), **options)


def content(micro):
    cu_seqlens = None if micro.cu_seqlens is None else tuple(micro.cu_seqlens.tolist())
    tensors = (micro.input_ids, micro.labels, micro.position_ids, micro.type_ids)
    return *(tuple(tensor.flatten().tolist()) for tensor in tensors), cu_seqlens, micro.lengths, micro.num_valid_tokens


def global_batches(folder, steps, data_size, **options):
    """[step][position in the global batch] -> content."""
    loaders = [build(folder, data_rank=rank, data_size=data_size, **options) for rank in range(data_size)]
    try:
        result = []
        for _ in range(steps):
            batches = [next(loader) for loader in loaders]
            assert len({len(batch.micro_batches) for batch in batches}) == 1
            assert {batch.num_samples for batch in batches} == {sum(len(batch.micro_batches) for batch in batches)}
            indices = [index for batch in batches for index in batch.sample_indices]
            assert indices == list(range(indices[0], indices[0] + len(indices)))
            result.append([content(micro) for batch in batches for micro in batch.micro_batches])
        return result
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("packing", ["cut", "unpacked"])
def test_global_batches_do_not_depend_on_ranks_or_workers(folder, packing):
    # 12 samples a step over about 50 samples an epoch: batches straddle epochs.
    expected = global_batches(folder, 6, 1, micro_num=12, packing=packing)
    for data_size in (2, 3, 4):
        assert global_batches(folder, 6, data_size, micro_num=12 // data_size, packing=packing) == expected
    for num_workers in (1, 2):
        options = {"micro_num": 6, "packing": packing, "num_workers": num_workers}
        assert global_batches(folder, 6, 2, **options) == expected
    assert global_batches(folder, 6, 2, micro_num=6, packing=packing, prefetch=0) == expected


def test_every_epoch_has_every_sample_once_in_another_order(folder):
    loader = build(folder, micro_num=1)
    count = loader.num_samples_per_epoch
    epochs = [[content(next(loader).micro_batches[0]) for _ in range(count)] for _ in range(2)]
    assert len(set(epochs[0])) == count
    assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]
    loader.close()


def test_order_is_that_of_sample_order(folder):
    loader = build(folder, micro_num=3, data_rank=1, data_size=2)
    next(loader)
    batch = next(loader)
    assert batch.sample_indices == [9, 10, 11]
    order = sample_order(np.array(batch.sample_indices), loader.num_samples_per_epoch, 7)
    source = loader._read.stream.source
    for micro, index in zip(batch.micro_batches, order, strict=True):
        assert micro.input_ids[0].tolist() == source.sample(int(index)).input_ids.tolist()
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_by_state_is_exact_and_prefetch_does_not_move_the_cursor(folder, num_workers):
    whole = build(folder)
    expected = [[content(micro) for micro in next(whole).micro_batches] for _ in range(10)]
    first = build(folder, num_workers=num_workers, prefetch=4)
    for _ in range(4):
        next(first)
    state = first.state_dict()
    assert (state["step"], state["consumed_samples"]) == (4, 8)
    second = build(folder, num_workers=num_workers)
    second.load_state_dict(state)
    assert [[content(micro) for micro in next(second).micro_batches] for _ in range(6)] == expected[4:]
    second.seek(2, 4)
    assert [content(micro) for micro in next(second).micro_batches] == expected[2]
    for loader in (whole, first, second):
        loader.close()


def test_resume_with_another_number_of_ranks_continues_with_the_next_sample(folder):
    (everything,) = global_batches(folder, 1, 1, micro_num=30)
    before = build(folder, micro_num=2, data_size=3)
    next(before)
    next(before)
    after = [build(folder, micro_num=3, data_rank=rank, data_size=2) for rank in range(2)]
    for loader in after:
        loader.load_state_dict(before.state_dict())
    got = [content(micro) for loader in after for micro in next(loader).micro_batches]
    assert got == everything[12:18]
    for loader in (before, *after):
        loader.close()


def test_ramp_up_is_a_function_of_the_step(folder):
    options = {"micro_num": 5, "rampup_batch_size": "1 2 2"}
    loader = build(folder, data_rank=1, data_size=2, **options)
    batches = [next(loader) for _ in range(6)]
    assert [len(batch.micro_batches) for batch in batches] == [1, 1, 3, 3, 5, 5]
    assert [batch.sample_indices[0] for batch in batches] == [1, 3, 7, 13, 21, 31]
    assert loader.consumed_samples == sum(batch.num_samples for batch in batches) == 36
    resumed = build(folder, data_rank=1, data_size=2, **options)
    resumed.seek(3, 10)
    assert next(resumed).sample_indices == batches[3].sample_indices
    loader.close()
    resumed.close()


def test_changed_data_is_logged_when_resuming(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    loader = build(folder)
    next(loader)
    other = build(folder, seed=8, micro_bsz=3)
    other.load_state_dict(loader.state_dict())
    assert "seed was 7, is 8" in caplog.text and "micro_bsz was 2, is 3" in caplog.text
    grown = build(folder, data_size=2)
    caplog.clear()
    grown.load_state_dict(loader.state_dict())
    assert not caplog.text
    loader.close()


def test_total_steps_ends_the_loader(folder):
    for options in ({}, {"prefetch": 0}, {"num_workers": 1}):
        assert len(list(build(folder, total_steps=5, **options))) == 5
    loader = build(folder, total_steps=5)
    loader.seek(5, 0)
    assert list(loader) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_malformed_document_is_named_when_its_batch_is_due(folder, tmp_path, num_workers):
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        for token in range(10):
            writer.write([token * 100] * SEQ_LEN * MICRO_BSZ)
    loader = build(tmp_path, vocab_size=900, micro_num=1, num_workers=num_workers)
    good = 0
    with pytest.raises(DataError) as caught:
        for batch in loader:
            assert batch.micro_batches[0].input_ids.max() < 900
            good += 1
    assert loader.step == good < 10
    assert f"{tmp_path / 'a.bin'}: document 9 at byte" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(DataError, match="document 9"):
        next(loader)


@pytest.fixture(scope="module", params=["not JSON", "id outside of the vocabulary"])
def damaged(folder, request, tmp_path_factory):
    """A copy of the folder in which one document cannot be read: (folder, its file, its number, its tokens)."""
    root = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns(CACHE_FOLDER))
    path = root / "en" / "b.bin"
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(index for index, line in enumerate(lines) if line.count(b",") > SEQ_LEN)
    tokens = json.loads(lines[number])["tokens"]
    bad = lines[number].replace(b"{", b"?") if request.param == "not JSON" else None
    if bad is None:
        large = [token if token < 100 else 5000 + token for token in tokens]
        bad = json.dumps({"tokens": large}).encode() + b"\n"
    lines[number] = bad
    with TokenizedWriter(path.with_name("new.bin")) as writer:
        for index, line in enumerate(lines):
            writer.write_line(line, len(tokens) if index == number else line.count(b",") + 1)
    os.replace(path.with_name("new.bin"), path)
    os.replace(path.with_name("new.bin.meta"), path.with_name("b.bin.meta"))
    return root, path, number, tokens


@pytest.mark.parametrize("packing", ["cut", "unpacked"])
def test_a_skipped_document_changes_no_other(folder, damaged, caplog, packing):
    root, path, number, tokens = damaged
    # With three documents a sample, the bad one is followed by others.
    micro_bsz = 3 if packing == "unpacked" else MICRO_BSZ
    expected = global_batches(folder, 6, 1, micro_num=12, packing=packing, micro_bsz=micro_bsz)
    whole = global_batches(root, 6, 1, micro_num=12, packing=packing, micro_bsz=micro_bsz, skip_bad_documents=True)
    lines = [line for line in caplog.messages if "skipped an unreadable document" in line]
    assert lines and all(f"{path}: document {number} at byte" in line for line in lines)
    assert f"{len(lines)} so far on data rank 0)" in lines[-1]
    changed = 0
    for micro, good in zip(itertools.chain(*whole), itertools.chain(*expected), strict=True):
        ids, labels = np.array(micro[:2])
        is_good = ids == np.array(good[0])
        assert (labels[is_good] == np.array(good[1])[is_good]).all()
        assert (ids[~is_good] == 0).all() and (labels[~is_good] == -100).all()
        assert set(np.array(good[0])[~is_good]) <= set(tokens)
        changed += (~is_good).sum()
    assert changed > 0
    for data_size, num_workers in ((2, 0), (3, 2)):
        options = {"micro_num": 12 // data_size, "packing": packing, "micro_bsz": micro_bsz}
        options["num_workers"] = num_workers
        assert global_batches(root, 6, data_size, skip_bad_documents=True, **options) == whole
    resumed = build(root, micro_num=12, packing=packing, micro_bsz=micro_bsz, skip_bad_documents=True)
    resumed.seek(4, 48)
    assert [content(micro) for micro in next(resumed).micro_batches] == whole[4]
    resumed.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_skipped_batch_is_not_read(folder, damaged, num_workers):
    root, path, number, _ = damaged
    expected = global_batches(folder, 6, 1, micro_num=12)
    with pytest.raises(DataError, match=rf"{path}: document {number} at byte") as caught:
        global_batches(root, 6, 1, micro_num=12, num_workers=num_workers)
    step = int(re.search(r"Step (\d+) needs this document", str(caught.value)).group(1)) - 1
    assert f"{step} to data.skip_batches (counted from 0)" in str(caught.value)
    batches = global_batches(root, step + 1, 1, micro_num=12, num_workers=num_workers, skip_batches=f"99,{step}")
    assert batches[:step] == expected[:step]
    for micro, read in zip(batches[step], expected[step], strict=True):
        assert len(micro[0]) == len(read[0]) and set(micro[1]) == {-100}


def test_truncated_answers_are_counted(tmp_path, caplog):
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        for prompt in (2, SEQ_LEN, 3 * SEQ_LEN):
            writer.write([-5] * prompt + [7, 8])
        writer.write([-5] * 30)  # has no answer
        writer.write([-5] * SEQ_LEN + [-7, -8])
    loader = build(tmp_path, packing="unpacked", micro_bsz=5, micro_num=1)
    batch = next(loader)
    # The label of the last place is the token behind the cut, so that a prompt of SEQ_LEN tokens has one.
    assert (batch.num_truncated_answers, batch.num_valid_tokens) == (1, 2 + 1)
    assert "step 1: 1 unpacked document(s) have no label left after truncation at data.seq_len = 8" in caplog.text
    next(loader), next(loader)
    loader.close()
    assert "data rank 0: 3 of the documents read lost every label by truncation at data.seq_len" in caplog.text


@pytest.mark.parametrize("packing", ["cut", "unpacked"])
def test_folders_of_one_token_documents_are_refused(tmp_path, packing):
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        for token in range(40):
            writer.write([token])
    with pytest.raises(DataError, match="each of the 40 documents has a single token"):
        build(tmp_path, packing=packing)


def test_close_ends_the_thread(folder):
    def threads():
        return sum(thread.name == "data-read-ahead" for thread in threading.enumerate())

    before = threads()
    loader = build(folder)
    next(loader)
    assert threads() == before + 1
    loader.close()
    assert threads() == before
    next(loader)
    del loader
    assert threads() == before


def test_dummy_data_for_a_missing_folder():
    expected = global_batches(None, 3, 1, micro_num=4)
    assert global_batches(None, 3, 2, num_workers=1) == expected
    assert build(None).type_names == ["en", "cn", "code"]


def test_bad_arguments(folder):
    with pytest.raises(ConfigError, match="packing = 'cutt'"):
        build(folder, packing="cutt")
    with pytest.raises(ConfigError, match=r"data_rank = 2 is not in \[0, data_size = 2\)"):
        build(folder, data_rank=2, data_size=2)


class CountingSource:
    """A custom source: sample i has the token i + 1."""

    type_names = ("numbers",)

    def __init__(self, **facts):
        self.facts = {"seq_len": 4, **facts}

    def __len__(self):
        return 10

    def sample(self, index, epoch=0):
        ids = np.full(4, index + 1)
        return concatenate_slices([make_slice(ids, np.ones(4, dtype=bool), 4)], 4, 4, "cut", 0)

    def padding(self):
        return padding_sample(4, 1, "cut")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_custom_source_is_loaded_and_resumed(num_workers):
    def tokens(loader, count):
        return [int(micro.input_ids[0, 0]) for _ in range(count) for micro in next(loader).micro_batches]

    straight = build_train_loader(ShuffledSource(CountingSource(), 1), micro_num=2, num_workers=num_workers)
    expected = tokens(straight, 5)
    assert sorted(expected) == list(range(1, 11))
    resumed = build_train_loader(ShuffledSource(CountingSource(), 1), micro_num=2, num_workers=num_workers)
    resumed.seek(3, 6)
    assert tokens(resumed, 2) == expected[6:]
    straight.close()
    resumed.close()


def test_facts_with_names_of_the_cursor_are_refused():
    with pytest.raises(ValueError, match=r"must not name its facts \['seed'\]"):
        build_train_loader(ShuffledSource(CountingSource(seed=2), 1), micro_num=1)
    with pytest.raises(ValueError, match=r"must not name its facts \['step'\]"):
        build_train_loader(ShuffledSource(CountingSource(step=1), 1), micro_num=1)
