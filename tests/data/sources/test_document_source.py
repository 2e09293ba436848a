"""Every packing mode with every format of documents: nothing lost or doubled, in any order of reading."""

import logging
import multiprocessing
import re
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm.data.documents import best_fit_index
from internlm.data.documents.document_file import FileFormat
from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle
from internlm.data.packing.sample import Sample
from internlm.data.sources.document_source import DocumentSource
from internlm.data.sources.sample_stream import ShuffledSource
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import ConfigError, DataError

SEQ_LEN, MICRO_BSZ = 8, 3
EOS, PRE, MID, SUF, VOCAB = 4000, 4001, 4002, 4003, 4004
FORMATS: list[FileFormat] = [TOKENIZED, MEGATRON, ArrayFormat("uint16", EOS)]
MODES: list[dict[str, Any]] = [
    {"packing": "cut"},
    {"packing": "pack_sample_into_one"},
    {"packing": "cut", "document_mask": False},
    {"packing": "unpacked"},
    {"packing": "best_fit"},
    {"packing": "best_fit", "document_mask": False},
]


def flat(documents: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(documents))


def document_lists() -> dict[str, list[list[int]]]:
    """Documents by file: every token but the eos at the end of each has an id of its own."""
    random = np.random.default_rng(0)
    token, files = 1, {}
    for name, count, longest in (("code/a", 40, 30), ("en/b", 30, 60), ("en/c", 50, 7)):
        files[name] = []
        for length in random.integers(1, longest, count).tolist():
            files[name].append([*range(token, token + length), EOS])
            token += length
    assert token < EOS
    return files


FILES = document_lists()
DOCUMENTS = [document for documents in FILES.values() for document in documents]


def write_folder(root: Path, format: FileFormat) -> Path:
    for name, documents in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if format is TOKENIZED:
            with TokenizedWriter(path.with_suffix(".bin")) as tokenized:
                for document in documents:
                    tokenized.write(document)
        elif format is MEGATRON:
            with MegatronWriter(path.with_suffix(".bin"), np.dtype("uint16")) as megatron:
                for document in documents:
                    megatron.write(document)
        else:
            np.array(flat(documents), "uint16").tofile(path.with_suffix(".bin"))
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {format.name: write_folder(tmp_path_factory.mktemp(format.name), format) for format in FORMATS}


def open_folder(folder: Path, format: FileFormat = TOKENIZED, **options: Any) -> DocumentSource:
    return DocumentSource(folder, format, seq_len=SEQ_LEN, micro_bsz=MICRO_BSZ, vocab_size=VOCAB, **options)


def segments(sample: Sample) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, labels, positions) of each attention segment; of each row when unpacked."""
    micro = to_micro_batch(sample)
    rows = micro.input_ids.shape[0]
    lengths = micro.lengths or (micro.input_ids.shape[1],) * rows
    ends = np.cumsum(lengths)
    ids, labels, positions = (
        tensor.flatten().tolist() for tensor in (micro.input_ids, micro.labels, micro.position_ids)
    )
    return [
        (ids[end - length : end], labels[end - length : end], positions[end - length : end])
        for end, length in zip(ends, lengths, strict=True)
    ]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_no_token_is_lost_or_doubled(folders: dict[str, Path], format: FileFormat, mode: dict[str, Any]) -> None:
    source = open_folder(folders[format.name], format, **mode)
    samples = [source.sample(index) for index in range(len(source))]
    ids = np.concatenate([sample.input_ids.reshape(-1) for sample in samples])
    labels = np.concatenate([sample.labels.reshape(-1) for sample in samples])
    read, learned = ids[ids > 0], labels[labels >= 0]
    following = {first: second for document in DOCUMENTS for first, second in pairwise(document)}
    if mode["packing"] == "best_fit":
        assert sorted(read) == sorted(flat(DOCUMENTS))
        assert sorted(learned) == sorted(flat(document[1:] for document in DOCUMENTS))
        assert source.num_tokens == len(read)
    elif mode["packing"] == "unpacked":
        assert sorted(read) == sorted(flat(document[:SEQ_LEN] for document in DOCUMENTS))
        assert sorted(learned) == sorted(flat(document[1 : SEQ_LEN + 1] for document in DOCUMENTS))
    else:
        kept = [sum(map(len, each)) // (SEQ_LEN * MICRO_BSZ) * SEQ_LEN * MICRO_BSZ for each in FILES.values()]
        assert len(read) == len(ids) == sum(kept)
        assert len(set(read[read < EOS])) == (read < EOS).sum()
    # Labels are the next token of the document, with or without a document mask.
    assert labels[ids > 0].tolist() == [following.get(token, -100) for token in ids[ids > 0].tolist()]
    assert (labels[ids == 0] == -100).all()


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("mask", [True, False])
def test_best_fit_keeps_documents_whole(
    folders: dict[str, Path],
    format: FileFormat,
    mask: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="internlm")
    source = open_folder(folders[format.name], format, packing="best_fit", document_mask=mask)
    samples = [source.sample(index) for index in range(len(source))]
    texts = ["-".join(map(str, ids)) + "-" for sample in samples for ids, _, _ in segments(sample)]
    for document in DOCUMENTS:
        for start in range(0, len(document), SEQ_LEN):
            piece = "-".join(map(str, document[start : start + SEQ_LEN])) + "-"
            if mask:
                assert piece in texts
            else:
                assert any(f"-{piece}" in f"-{text}" for text in texts)
    for sample in samples:
        assert sample.lengths is not None and max(sample.lengths) <= SEQ_LEN
        for _, _, positions in segments(sample):
            assert positions == list(range(len(positions)))
        if not mask:
            assert sample.lengths == (SEQ_LEN,) * MICRO_BSZ
    num_padding = sum(int((sample.input_ids == 0).sum()) for sample in samples)
    share = 100 * num_padding / (len(source) * SEQ_LEN * MICRO_BSZ)
    assert f"best-fit packing: {len(source)} samples, {share:.3f} % padding" in caplog.text
    assert sum(sample.num_documents for sample in samples) == sum(-(-len(each) // SEQ_LEN) for each in DOCUMENTS)


@pytest.mark.parametrize("mask", [True, False])
def test_best_fit_windows_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: bool) -> None:
    """Small windows, and windows split because their documents are long."""
    monkeypatch.setattr(best_fit_index, "_WINDOW", 16)
    monkeypatch.setattr(best_fit_index, "_MAX_PIECES", 5)
    source = open_folder(write_folder(tmp_path, TOKENIZED), packing="best_fit", document_mask=mask)
    ids = np.concatenate([source.sample(index).input_ids for index in range(len(source))])
    assert sorted(ids[ids > 0]) == sorted(flat(DOCUMENTS))


def test_contradictions_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"document_mask = False with data.packing = 'unpacked'"):
        open_folder(folders["tokenized"], packing="unpacked", document_mask=False)
    with pytest.raises(ConfigError, match=r"document_mask = True with data.packing = 'pack_sample_into_one'"):
        open_folder(folders["tokenized"], packing="pack_sample_into_one", document_mask=True)


# -- fill-in-the-middle ---------------------------------------------------------------------------------------------


def fim(level: str, rate: float = 1.0) -> FillInTheMiddle:
    return FillInTheMiddle(rate, 0.5, PRE, MID, SUF, level, None, EOS, seed=3)  # type: ignore[arg-type]


def undo(ids: list[int]) -> list[int]:
    """The tokens of a transformed document, or part of one, in their order; without a transform, the tokens."""
    if PRE not in ids:
        return ids
    suffix_at, middle_at, last = ids.index(SUF), ids.index(MID), ids[-1:] * (ids[-1] == EOS)
    assert ids[0] == PRE
    return ids[1:suffix_at] + ids[middle_at + 1 : len(ids) - len(last)] + ids[suffix_at + 1 : middle_at] + last


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_whole_documents_are_transformed(folders: dict[str, Path], format: FileFormat, mode: dict[str, Any]) -> None:
    """Each sample has the tokens of the transformed documents where it has those of the documents without."""
    plain = open_folder(folders[format.name], format, **mode)
    source = open_folder(folders[format.name], format, fim=fim("document"), **mode)
    assert len(source) == len(plain)
    expected: dict[int, list[int]] = {}
    for file_number, name in enumerate(sorted(FILES)):
        for number, document in enumerate(FILES[name]):
            everything = np.ones(len(document), dtype=bool)
            changed = fim("document").transform(np.array(document), everything, 0, file_number, number)
            expected[document[0]] = document if changed is None else changed[0].tolist()
            if changed is not None:
                assert undo(expected[document[0]]) == [*document[:-4], EOS]
    place = {token: (document[0], at) for document in DOCUMENTS for at, token in enumerate(document[:-1])}
    for index in range(len(source)):
        before, after = plain.sample(index), source.sample(index)
        assert before.lengths == after.lengths and before.num_documents == after.num_documents
        ids, new_ids, new_labels = (each.reshape(-1) for each in (before.input_ids, after.input_ids, after.labels))
        for at in np.flatnonzero((ids > 0) & (ids < EOS)):
            first, offset = place[int(ids[at])]
            assert new_ids[at] == expected[first][offset] and new_labels[at] == expected[first][offset + 1]
        assert (new_ids[(ids == 0) | (ids == EOS)] == ids[(ids == 0) | (ids == EOS)]).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parts_within_a_segment_are_transformed(folders: dict[str, Path], mode: dict[str, Any]) -> None:
    """At context level, the part of a document within each attention segment is transformed alone."""
    plain, source = (open_folder(folders["tokenized"], fim=each, **mode) for each in (None, fim("context")))
    first_of = {token: document[0] for document in DOCUMENTS for token in document[:-1]}
    num_transformed = 0
    for index in range(len(source)):
        for (ids, labels, _), (new_ids, new_labels, _) in zip(
            segments(plain.sample(index)), segments(source.sample(index)), strict=True
        ):
            owner = [first_of.get(token, 0) for token in ids]
            starts = [
                at
                for at in range(len(ids))
                if at == 0 or ids[at - 1] == EOS or (owner[at] != owner[at - 1] and ids[at] != EOS)
            ]
            for start, stop in pairwise([*starts, len(ids)]):
                part, new = ids[start:stop], new_ids[start:stop]
                while part and part[-1] == 0:
                    part, new = part[:-1], new[:-1]
                stop = start + len(part)
                has_eos = part[-1:] == [EOS]
                if PRE not in new:
                    assert new == part and new_labels[start:stop] == labels[start:stop]
                    assert len(part) - has_eos <= 3
                    continue
                num_transformed += 1
                assert undo(new) == part[: len(part) - 3 - has_eos] + [EOS] * has_eos
                assert new_labels[start:stop] == [*new[1:], -100]
    assert num_transformed > 50


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("level", ["document", "context"])
def test_samples_are_a_pure_function(folders: dict[str, Path], mode: dict[str, Any], level: str) -> None:
    source = open_folder(folders["tokenized"], fim=fim(level, 0.5), **mode)
    expected = [source.sample(index) for index in range(len(source))]
    again = open_folder(folders["tokenized"], fim=fim(level, 0.5), **mode)
    epochs_differ = False
    for index in reversed(range(len(again))):
        sample, later = again.sample(index), again.sample(index, epoch=1)
        assert (sample.input_ids == expected[index].input_ids).all()
        assert (sample.labels == expected[index].labels).all() and sample.lengths == expected[index].lengths
        assert later.lengths == sample.lengths
        epochs_differ |= not np.array_equal(later.input_ids, sample.input_ids)
    assert epochs_differ
    other_seed = open_folder(folders["tokenized"], fim=FillInTheMiddle(**{**fim(level, 0.5).facts, "seed": 4}), **mode)
    assert any((other_seed.sample(index).input_ids != each.input_ids).any() for index, each in enumerate(expected))


@pytest.mark.parametrize("mode", [{"packing": "best_fit"}, {"packing": "best_fit", "document_mask": False}], ids=str)
def test_ranks_workers_and_resuming_change_nothing(folders: dict[str, Path], mode: dict[str, Any]) -> None:
    def batches(size: int, workers: int, stops: tuple[int, ...]) -> list[list[int]]:
        """The ids of 60 steps of 4 samples; at `stops`, all ranks are closed and resume from the state."""
        result: list[list[int]] = []
        state = None
        for first, last in pairwise((0, *stops, 60)):
            loaders = [
                build_train_loader(
                    ShuffledSource(open_folder(folders["tokenized"], fim=fim("context", 0.5), **mode), seed=1),
                    micro_num=4 // size, data_rank=rank, data_size=size, num_workers=workers,
                )
                for rank in range(size)
            ]  # fmt: skip
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            for _ in range(first, last):
                micros = [micro for loader in loaders for micro in next(loader).micro_batches]
                result.append([token for micro in micros for token in micro.input_ids.flatten().tolist()])
            state = loaders[0].state_dict()
            for loader in loaders:
                loader.close()
        return result

    expected = batches(1, 0, ())
    assert batches(2, 0, (7, 31)) == expected
    assert batches(4, 0, (5,)) == expected
    assert batches(1, 2, (11, 12)) == expected


def test_a_changed_transform_is_noticed_on_resume(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    states = []
    for transform in (fim("context"), None):
        loader = build_train_loader(
            ShuffledSource(open_folder(folders["tokenized"], packing="cut", fim=transform), seed=1), micro_num=1
        )
        if states:
            loader.load_state_dict(states[0])
        states.append(loader.state_dict())
        loader.close()
    assert "fim was {'rate': 1.0" in caplog.text


def test_documents_too_long_for_document_level(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.data.sources.document_source._MAX_WHOLE_DOCUMENT", 50)
    with pytest.raises(DataError, match=r"b\.bin: a document has \d+ tokens.* set data.fim.level = 'context'"):
        open_folder(folders["tokenized"], packing="cut", fim=fim("document"))
    open_folder(folders["tokenized"], packing="cut", fim=fim("context"))
    with pytest.raises(ConfigError, match=r"data.fim.prefix = 5000 is outside model.vocab_size"):
        open_folder(
            folders["tokenized"], packing="cut", fim=FillInTheMiddle(**{**fim("context").facts, "prefix": 5000})
        )


# -- opening --------------------------------------------------------------------------------------------------------


def _open_and_count(folder: Path, builds: Any) -> None:
    """Open a source; report the packings that this process runs."""
    original = best_fit_index.pack_best_fit

    def counted(lengths: Any, capacity: int) -> Any:
        builds.put(len(lengths))
        return original(lengths, capacity)

    best_fit_index.pack_best_fit = counted
    open_folder(folder, packing="best_fit")


def test_one_process_builds_the_index_while_others_wait(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, TOKENIZED)
    context = multiprocessing.get_context("fork")
    builds = context.SimpleQueue()
    processes = [context.Process(target=_open_and_count, args=(folder, builds)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 6
    num_builds = 0
    while not builds.empty():
        num_builds += builds.get() > 0
    assert num_builds == len(FILES)
    assert not list(tmp_path.rglob(".lock-*")) and not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("packing", ["cut", "unpacked", "best_fit"])
@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("damage", ["vanished", "cut", "companion"])
def test_a_file_that_is_damaged_in_mid_run(tmp_path: Path, packing: str, is_open: bool, damage: str) -> None:
    for name in "ab":
        with TokenizedWriter(tmp_path / f"{name}.bin") as writer:
            for number in range(20):
                writer.write(np.arange(1, 30) + number)
    options: dict[str, Any] = {"seq_len": 8, "micro_bsz": 2, "packing": packing, "vocab_size": 100}
    stopping = DocumentSource(tmp_path, TOKENIZED, **options)
    skipping = DocumentSource(tmp_path, TOKENIZED, **options, skip_bad_documents=True)
    expected = [stopping.sample(index) for index in range(len(stopping))] if is_open else []
    if is_open:
        assert [skipping.sample(index).unreadable for index in range(len(skipping))] == [()] * len(skipping)
    path = tmp_path / ("b.bin.meta" if damage == "companion" else "b.bin")
    if damage == "cut":
        with open(path, "r+b") as file:
            file.truncate(100)
    else:
        path.unlink()
    if damage == "cut":
        message = re.escape(f"{path} has 100 bytes, and had ")
    else:
        message = re.escape(str(path)) + " (is missing|cannot be read any more)|b.bin: no such file"
    last = len(stopping) - 1
    with pytest.raises(DataError, match=message):
        stopping.sample(last)
    sample = skipping.sample(last)
    assert (sample.labels == -100).all() and sample.input_ids.shape == skipping.padding().input_ids.shape
    assert len(sample.unreadable) == 1 and re.search(message, sample.unreadable[0])
    # The other file is read as before.
    assert skipping.sample(0).unreadable == () and (skipping.sample(0).labels != -100).any()
    if expected:
        assert (stopping.sample(0).input_ids == expected[0].input_ids).all()
