"""Blends of every kind of source: what ranks, workers and interruptions do not change; ends, names, settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.batch_order import SAMPLES, batches_of
from helpers.chat_templates import save_chat_tokenizer

from internlm.data.documents.document_file import FileFormat
from internlm.data.loaders.train_loader import TrainLoader, build_train_loader
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.packing.document_slice import make_slice
from internlm.data.packing.sample import Sample, concatenate_slices, padding_sample
from internlm.data.rows.open_rows import open_row_files
from internlm.data.rows.row_folders import find_row_files
from internlm.data.sources.blend import BlendedStream
from internlm.data.sources.blend_members import BlendGroup, BlendSource, source_seed
from internlm.data.sources.document_source import DocumentSource
from internlm.data.sources.row_encoder import TextRowEncoder
from internlm.data.sources.row_stream import RowStream
from internlm.data.sources.sample_stream import SampleStream, ShuffledSource, StreamEndError
from internlm.data.sources.shard_reader import RowPacking
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import ConfigError

SEQ_LEN, MICRO_BSZ = 16, 2
TOKENS = SEQ_LEN * MICRO_BSZ


@pytest.fixture(autouse=True)
def visible_logs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="internlm")


class Numbered:
    """Sample i has the token `first + i` everywhere; its types are taken in turn."""

    def __init__(self, first: int, size: int, types: Sequence[str] = ("text",)) -> None:
        self.first, self.size, self.type_names = first, size, list(types)
        self.facts = {"packing": "cut", "seq_len": SEQ_LEN}

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, epoch: int = 0) -> Sample:
        ids = np.full(TOKENS, self.first + index)
        slices = [make_slice(ids, np.ones(TOKENS, dtype=bool), TOKENS)]
        return concatenate_slices(slices, SEQ_LEN, TOKENS, "cut", index % len(self.type_names))

    def padding(self) -> Sample:
        return padding_sample(SEQ_LEN, MICRO_BSZ, "cut")


def numbered(name: str, first: int, size: int, weight: Any, *types: str, **options: Any) -> BlendSource:
    source = Numbered(first, size, types or (name,))
    return BlendSource(name, ShuffledSource(source, source_seed(1, name)), weight, **options)


def ids_of(stream: SampleStream, count: int, start: int = 0) -> list[int]:
    return [int(stream.sample(index).input_ids[0]) for index in range(start, start + count)]


def counts_of(stream: BlendedStream, index: int) -> dict[str, int]:
    progress = stream.progress_at(index)
    return {source.name: round(progress[f"source/{source.name}/tokens"] / TOKENS) for source in stream.sources}


# -- what changes nothing -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents as tokenized file, Megatron dataset, array and rows of text, each with ids of its own."""
    root, draw = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)

    def documents(first: int) -> list[list[int]]:
        return [draw.integers(first, first + 900, length).tolist() for length in draw.integers(2, 60, 60)]

    for kind in ("tokenized/en", "tokenized/code", "megatron", "arrays", "rows/en", "rows/code"):
        (root / kind).mkdir(parents=True)
    for name in ("en", "code"):
        with TokenizedWriter(root / "tokenized" / name / "a.bin") as tokenized:
            for document in documents(1000):
                tokenized.write(document)
    with MegatronWriter(root / "megatron" / "a.bin", np.dtype("uint16")) as megatron:
        for document in documents(2000):
            megatron.write(document)
    np.concatenate(documents(3000)).astype("uint16").tofile(root / "arrays" / "a.bin")
    for name in ("en", "code"):
        texts = [f"What is {number}? " + "The sum of two and three. " * (number % 5) for number in range(100)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (root / "rows" / name / "a.jsonl").write_text("".join(lines))
    save_chat_tokenizer(root / "tokenizer")
    return root


def of_documents(folder: Path, format: FileFormat, name: str, packing: str) -> SampleStream:
    source = DocumentSource(folder, format, seq_len=SEQ_LEN, micro_bsz=MICRO_BSZ, packing=packing, vocab_size=5000)  # type: ignore[arg-type]
    return ShuffledSource(source, source_seed(1, name))


def of_rows(root: Path, packing: str, num_shards: int) -> SampleStream:
    found, tokenizer = find_row_files(root / "rows"), load_tokenizer(root / "tokenizer")
    return RowStream(
        open_row_files([each.path for each in found.files], ["text"]),
        [each.type_id for each in found.files],
        found.types,
        TextRowEncoder(tokenizer, "text", [], [tokenizer.eos_id or 0]),
        RowPacking(SEQ_LEN, MICRO_BSZ, packing, packing != "unpacked", None, (0, 0), False),  # type: ignore[arg-type]
        num_shards=num_shards,
        seed=source_seed(1, "rows"),
        facts={"type": "streaming"},
    )


def blend_of_five(root: Path, packing: str, num_shards: int = 16) -> BlendedStream:
    """Irrational and scheduled weights, a group, a source that is dropped and one that is read several times."""
    tokenized = of_documents(root / "tokenized", TOKENIZED, "tokenized", packing)
    megatron = of_documents(root / "megatron", MEGATRON, "megatron", packing)
    arrays = of_documents(root / "arrays", ArrayFormat("uint16", None), "arrays", packing)
    assert megatron.samples_per_epoch is not None
    return BlendedStream(
        [
            BlendSource("tokenized", tokenized, [(0, 0.5), (900 * TOKENS, 0.1), (1301 * TOKENS, 0.0)]),
            BlendSource("megatron", megatron, np.pi / 10, epochs_max=4.5, on_end="drop"),
            BlendGroup(
                [(0, 0.3), (5000 * TOKENS + 1, 2)],
                [
                    BlendSource("arrays", arrays, 1),
                    BlendSource("rows", of_rows(root, packing, num_shards), 0.7),
                    numbered("numbered", 4000, 150, 0.2, "en"),
                ],
            ),
        ]
    )


@pytest.mark.parametrize("packing", ["cut", "best_fit", "unpacked"])
def test_ranks_workers_and_interruptions_change_no_batch(folder: Path, packing: str) -> None:
    """200 steps of a blend of five, in one process and with five interruptions, each with other ranks or workers."""
    if packing == "unpacked":
        # The custom source of this test is packed.
        def open_blend() -> BlendedStream:
            return BlendedStream(
                [
                    BlendSource("a", of_documents(folder / "tokenized", TOKENIZED, "a", packing), 0.7),
                    BlendSource("rows", of_rows(folder, packing, 16), 0.3),
                ]
            )
    else:

        def open_blend() -> BlendedStream:
            return blend_of_five(folder, packing)

    steps = 200 if packing == "cut" else 40
    expected = batches_of(open_blend, steps)
    stops = [steps * part // 200 for part in (1, 38, 101, 144, 190)]
    for sizes, workers in (((1, 2, 4, 8), (0, 1)), ((8, 1), (1, 0, 4)), ((2, 4, 1), (4, 0))):
        assert batches_of(open_blend, steps, sizes=sizes, workers=workers, stops=stops) == expected
    if packing != "unpacked":
        counts = counts_of(open_blend(), steps * SAMPLES)
        assert sum(counts.values()) == steps * SAMPLES and min(counts.values()) > 0


def test_a_checkpoint_has_the_cursors_of_all_ranks(folder: Path) -> None:
    """Those of a source of rows, which a resumed run would otherwise tokenize from the beginning again."""

    def state_of(size: int) -> dict[str, Any]:
        ranks = [
            build_train_loader(
                blend_of_five(folder, "cut"), micro_num=SAMPLES // size, data_rank=rank, data_size=size, prefetch=0
            )
            for rank in range(size)
        ]
        for loader in ranks:
            for _ in range(30):
                next(loader)
        merged = ranks[0].merge_states([loader.state_dict() for loader in ranks])
        state: dict[str, Any] = merged["stream"]["sources"]["rows"]["stream"]
        return state

    alone = state_of(1)
    assert len(alone["cursors"]) == 16
    assert state_of(2) == state_of(8) == alone


def test_each_source_is_read_in_its_own_order(folder: Path) -> None:
    blend = blend_of_five(folder, "cut")
    alone = {source.name: source.stream for source in blend_of_five(folder, "cut").sources}
    for index in range(1000):
        name, own_index = blend.source_at(index)
        sample, expected = blend.sample(index), alone[name].sample(own_index)
        assert (sample.input_ids == expected.input_ids).all() and (sample.labels == expected.labels).all()
        types = {blend.type_names[number] for number in np.unique(sample.type_ids)}
        own = {alone[name].type_names[number] for number in np.unique(expected.type_ids)}
        assert {each.removeprefix(f"{name}/") for each in types} == own


def test_another_source_changes_no_order() -> None:
    two = BlendedStream([numbered("a", 0, 50, 1), numbered("b", 100, 70, 2)])
    three = BlendedStream([numbered("0", 500, 9, 5), numbered("a", 0, 50, 3), numbered("b", 100, 70, 1)])
    for first in (0, 100):
        orders = [[each for each in ids_of(blend, 400) if first <= each < first + 100][:40] for blend in (two, three)]
        assert orders[0] == orders[1] and len(orders[0]) == 40


def test_skipped_steps_are_counted(folder: Path) -> None:
    def loader_of(skip: str) -> TrainLoader:
        return build_train_loader(blend_of_five(folder, "cut"), micro_num=SAMPLES, num_workers=1, skip_batches=skip)

    plain, skipping = loader_of(""), loader_of("2-4,9")
    for step in range(20):
        batch, other = next(plain), next(skipping)
        if step in (2, 3, 4, 9):
            assert other.num_valid_tokens == 0
        else:
            assert [each.input_ids.tolist() for each in batch.micro_batches] == [
                each.input_ids.tolist() for each in other.micro_batches
            ]
    assert plain.progress_at(160).keys() == skipping.progress_at(160).keys()
    plain.close()
    skipping.close()


# -- ends and changes -----------------------------------------------------------------------------------------------


def delivered(loader: TrainLoader) -> list[int]:
    ids = [int(micro.input_ids[0, 0]) for batch in loader for micro in batch.micro_batches]
    loader.close()
    return ids


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop_ends_training_on_all_ranks_at_the_same_step(num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    def open_blend() -> BlendedStream:
        return BlendedStream([numbered("a", 0, 10, 1, epochs_max=2, on_end="stop"), numbered("b", 100, 70, 3)])

    found = [
        delivered(build_train_loader(open_blend(), micro_num=3, data_rank=rank, data_size=2, num_workers=num_workers))
        for rank in range(2)
    ]
    # Sample 80 would be the 21st of "a": steps of six samples end before it.
    assert [len(ids) for ids in found] == [39, 39]
    assert "the training data ends at step 13: the blend ends after 8" in caplog.text
    assert "source 'a' has ended after 20 samples, and on_end = 'stop'" in caplog.text
    everything = [each for each in found[0] + found[1] if each < 100]
    assert len(everything) >= 18 and max(everything.count(each) for each in everything) == 2
    with pytest.raises(StreamEndError, match="the blend has no sample 90"):
        open_blend().sample(90)


def test_drop_is_logged_once_with_its_sample(caplog: pytest.LogCaptureFixture) -> None:
    blend = BlendedStream([numbered("a", 0, 10, 1, epochs_max=1.5, on_end="drop"), numbered("b", 100, 70, 1)])
    loader = build_train_loader(blend, micro_num=4, total_steps=30)
    ids = delivered(loader)
    last = max(index for index, each in enumerate(ids) if each < 100)
    assert sum(each < 100 for each in ids) == 15 and len(ids) == 120
    lines = [record.getMessage() for record in caplog.records if "'a' has ended" in record.getMessage()]
    assert lines == [
        f"blend: shares from sample {last + 1} (token {(last + 1) * TOKENS}) on: b 1; 'a' has ended after 1.5 epochs"
    ]


def test_a_part_of_an_epoch_ends_before_the_sample_that_exceeds_it() -> None:
    blend = BlendedStream([numbered("a", 0, 5, 1, epochs_max=1.5, on_end="drop"), numbered("b", 100, 9, 1)])
    assert counts_of(blend, 40) == {"a": 7, "b": 33}


def test_without_an_end_a_source_is_repeated() -> None:
    blend = BlendedStream([numbered("a", 0, 10, 1), numbered("b", 100, 70, 1)])
    ids = [each for each in ids_of(blend, 200) if each < 100]
    assert sorted(ids) == sorted([*range(10)] * 10)
    assert blend.progress_at(200) == {
        "source/a/tokens": 100 * TOKENS,
        "source/a/epochs": 10.0,
        "source/b/tokens": 100 * TOKENS,
        "source/b/epochs": 100 / 70,
    }
    assert blend.progress_at(40)["source/a/epochs"] == 2.0  # also backwards


def test_a_run_resumes_with_the_sources_in_another_order() -> None:
    def members() -> list[BlendSource]:
        return [numbered("a", 0, 10, 0.3), numbered("b", 100, 70, 0.3), numbered("c", 200, 9, 0.4)]

    straight, first, second = BlendedStream(members()), BlendedStream(members()), BlendedStream(members()[::-1])
    ids_of(first, 37)
    assert second.load_state(37, first.merge_states([first.state_at(37)])) == []
    expected = [straight.sample(index).input_ids.tolist() for index in range(100)]
    assert [second.sample(index).input_ids.tolist() for index in range(37, 100)] == expected[37:]
    assert second.type_names == first.type_names


def test_weights_change_at_the_sample_that_reaches_their_tokens(caplog: pytest.LogCaptureFixture) -> None:
    for tokens, first in ((64 * TOKENS, 64), (64 * TOKENS + 1, 65), (64 * TOKENS - 1, 64)):
        blend = BlendedStream(
            [numbered("a", 0, 50, [(0, 1), (tokens, 0)]), numbered("b", 100, 70, [(0, 0), (tokens, 1)])]
        )
        ids = ids_of(blend, 200)
        assert [each < 100 for each in ids] == [True] * first + [False] * (200 - first)
    build_train_loader(blend, micro_num=1).progress_at(100)
    assert "blend: shares from sample 0 (token 0) on: a 1" in caplog.text
    assert "blend: shares from sample 64 (token 2,048) on: b 1" in caplog.text


# -- resuming with other settings -----------------------------------------------------------------------------------


def state_after(blend: BlendedStream, index: int) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(blend.merge_states([blend.state_at(index)])))
    return state


def test_other_weights_are_accepted_and_exact_from_there() -> None:
    state = state_after(BlendedStream([numbered("a", 0, 50, 0.9), numbered("b", 100, 70, 0.1)]), 77)
    resumed = BlendedStream([numbered("a", 0, 50, 0.25), numbered("b", 100, 70, 0.75)])
    notices = resumed.load_state(77, state)
    assert notices == [
        "source 'a': its share was 0.9, is 0.25 from sample 77 on",
        "source 'b': its share was 0.1, is 0.75 from sample 77 on",
    ]
    before = counts_of(resumed, 77)
    assert before == {name: entry["samples"] for name, entry in state["sources"].items()}
    for count in range(1, 100):
        assert abs(counts_of(resumed, 77 + count)["a"] - before["a"] - 0.25 * count) <= 0.5
    # Each source continues after its own samples.
    alone = numbered("a", 0, 50, 1).stream
    found = [each for each in ids_of(resumed, 60, 77) if each < 100]
    assert found == ids_of(alone, len(found), before["a"])


def test_the_same_weights_in_other_words_change_nothing() -> None:
    straight = BlendedStream([numbered("a", 0, 50, 0.3), numbered("b", 100, 70, 0.7)])
    state = state_after(straight, 33)
    resumed = BlendedStream([numbered("b", 100, 70, 70), numbered("a", 0, 50, [(0, 30), (320_000, 30)])])
    assert resumed.load_state(33, state) == []
    assert ids_of(resumed, 100, 33) == ids_of(straight, 100, 33)


def test_sources_are_added_removed_and_added_again() -> None:
    def blend_of(*names: str) -> BlendedStream:
        return BlendedStream([numbered(name, 100 * "abc".index(name), 50, 1) for name in names])

    first = state_after(blend_of("a", "b"), 40)
    second = blend_of("b", "c")
    notices = second.load_state(40, first)
    assert "the blend has a new source 'c', which starts at its first sample" in notices
    assert any("no longer has the source 'a', which had 20 samples" in each for each in notices)
    assert counts_of(second, 60) == {"b": 30, "c": 10}
    third = blend_of("a", "b", "c")
    notices = third.load_state(60, state_after(second, 60))
    assert "the blend has the source 'a' again, which continues at its sample 20" in notices
    assert counts_of(third, 60) == {"a": 20, "b": 30, "c": 10}
    found = [each for each in ids_of(third, 30, 60) if each < 100]
    assert found == ids_of(numbered("a", 0, 50, 1).stream, 10, 20)


def test_a_checkpoint_without_a_blend_and_changed_sources_are_named() -> None:
    blend = BlendedStream([numbered("a", 0, 50, 1), numbered("b", 100, 70, 1)])
    [notice] = blend.load_state(500, {})
    assert "the checkpoint has no blend: every source starts at its first sample" in notice
    assert counts_of(blend, 510) == {"a": 5, "b": 5}
    state = state_after(blend, 520)
    changed = BlendedStream([numbered("a", 0, 60, 1, epochs_max=9, on_end="stop"), numbered("b", 100, 70, 1)])
    notices = changed.load_state(520, state)
    assert "source 'a': its epochs_max was None, is 9 from sample 520 on" in notices
    assert any("'a': its order differs" in each and "num_samples_per_epoch was 50, is 60" in each for each in notices)
    assert not any("'b'" in each for each in notices)


def test_more_epochs_continue_a_blend_that_had_ended() -> None:
    def blend_of(epochs: float, on_end: Any) -> BlendedStream:
        return BlendedStream([numbered("a", 0, 10, 1, epochs_max=epochs, on_end=on_end), numbered("b", 100, 70, 1)])

    ended = blend_of(1, "stop")
    assert ended.why_ended(20) is None and ended.why_ended(22) is not None
    state = state_after(ended, 20)
    more = blend_of(2, "stop")
    more.load_state(20, state)
    assert counts_of(more, 40) == {"a": 20, "b": 20}
    dropped = blend_of(1, "drop")
    dropped.load_state(20, state)
    assert counts_of(dropped, 40) == {"a": 10, "b": 30}


# -- types and mistakes ---------------------------------------------------------------------------------------------


def test_types_of_one_name_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    blend = BlendedStream([numbered("a", 0, 50, 1, "en", "code"), numbered("b", 100, 70, 1, "en")])
    assert blend.type_names == ["a/en", "code", "b/en"]
    assert "types that several sources have are named SOURCE/TYPE in metrics: en" in caplog.text
    for index in range(20):
        sample = blend.sample(index)
        first = int(sample.input_ids[0])
        assert blend.type_names[int(sample.type_ids)] == ("b/en" if first >= 100 else "code" if first % 2 else "a/en")


def test_a_blend_is_a_stream() -> None:
    inner = BlendedStream([numbered("a", 0, 50, 1), numbered("b", 100, 70, 1)])
    blend = BlendedStream([BlendSource("inner", inner, 2), numbered("c", 200, 50, 1)])
    ids = ids_of(blend, 90)
    assert [sum(first <= each < first + 100 for each in ids) for first in (0, 100, 200)] == [30, 30, 30]
    again = BlendedStream(
        [
            BlendSource("inner", BlendedStream([numbered("a", 0, 50, 1), numbered("b", 100, 70, 1)]), 2),
            numbered("c", 200, 50, 1),
        ]
    )
    assert again.load_state(41, state_after(blend, 41)) == []
    assert ids_of(again, 49, 41) == ids[41:]


def test_mistakes_are_named() -> None:
    for members, text in (
        ([], "at least one source"),
        ([numbered("a", 0, 5, 1), numbered("a", 0, 5, 1)], "several sources of one name"),
        ([numbered("a", 0, 5, 1, epochs_max=2)], "source 'a' has epochs_max, so on_end must be 'stop' or 'drop'"),
        ([numbered("a", 0, 5, 1, on_end="drop")], "source 'a' has on_end = 'drop', so it needs epochs_max"),
        ([numbered("a", 0, 5, 1, epochs_max=0.1, on_end="drop")], "epochs_max = 0.1 of 5 samples, which is less than"),
        ([numbered("a", 0, 5, -1)], "source 'a': its weights must be at least 0"),
        ([numbered("a", 0, 5, [(10, 1)])], "source 'a': the tokens of its weights must ascend, the first from 0"),
        ([numbered("a", 0, 5, 0)], "all weights of the blend are 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            BlendedStream(members)
    inner = BlendedStream([numbered("b", 0, 5, 1)])
    with pytest.raises(ConfigError, match="the number of its samples is not known before they are read"):
        BlendedStream([BlendSource("a", inner, 1, epochs_max=2, on_end="stop")])
    wide = ShuffledSource(Numbered(0, 5), 1)
    wide.source.padding = lambda: padding_sample(SEQ_LEN, 5, "cut")  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"different numbers of tokens: .*'a': 32"):
        BlendedStream([numbered("a", 0, 5, 1), BlendSource("b", wide, 1)])


def test_a_single_source_after_a_blend_is_named() -> None:
    state = state_after(BlendedStream([numbered("a", 0, 50, 1), numbered("b", 100, 70, 1)]), 30)
    [notice] = numbered("a", 0, 50, 1).stream.load_state(30, state)
    assert "the state of another kind of data: this source continues at its sample 30" in notice
