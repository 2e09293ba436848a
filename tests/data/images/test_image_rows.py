"""Rows with pictures: every picture stays whole and with its text, for any packing, ranks, workers and interruption."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.image_rows import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    TOKENS_PER_IMAGE,
    encoder_of,
    loader_of,
    settings_of,
    stream_of,
    turns,
    write_rows,
)
from PIL import Image

from internlm.data.batch import IGNORE_INDEX, Batch, MicroBatch
from internlm.data.documents.valid_sets import folder_sets
from internlm.data.images.image_documents import ImageDocumentFormat
from internlm.data.images.processor import ImageProcessor
from internlm.data.images.rendered_words import WordSettings, render_words
from internlm.data.loaders.train_loader import TrainLoader, build_train_loader
from internlm.data.loaders.valid_loader import build_valid_loaders
from internlm.data.packing.collate import to_micro_batch
from internlm.data.rows.open_rows import open_rows
from internlm.data.sources.encoded_rows import encoded_sets
from internlm.data.sources.open_source import open_source
from internlm.data.tokenize.command import main as tokenize
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.data.tokenized_files.tokenizer_record import read_record
from internlm.utils.errors import DataError

SEQ_LEN = 48


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "words"
    render_words(folder, WordSettings(num_train=40, num_valid=1, max_length=5, image_size=IMAGE_SIZE + 5))
    return folder


@pytest.fixture(scope="module")
def rows(words: Path) -> list[dict[str, Any]]:
    """Rows with one picture, two pictures, and none."""
    # With different words, so that an answer tells its pictures.
    by_word = {row["conversations"][1]["value"]: row for row in json.loads((words / "train.json").read_text())}
    found = list(by_word.values())
    for first, second in zip(found[::6], found[1::6], strict=False):
        if "image" in first and "image" in second:
            answers = [row["conversations"][1]["value"] for row in (first, second)]
            both = turns("<image> and <image>: read them.", "+".join(answers))
            found.append({"id": "two", "image": [first["image"], second["image"]], "conversations": both})
    return found


@pytest.fixture(scope="module")
def file(words: Path, rows: list[dict[str, Any]]) -> Path:
    return write_rows(words / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def tokenizer(words: Path) -> TextTokenizer:
    return load_tokenizer(words / "tokenizer")


@pytest.fixture(scope="module")
def pixels(words: Path, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Answer -> the pixels of its pictures."""
    found = {}
    for row in rows:
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        images = [Image.open(words / "images" / name) for name in names]
        arrays = [ImageProcessor(IMAGE_SIZE).process(image, "", "") for image in images]
        shape = (len(arrays), 3, IMAGE_SIZE, IMAGE_SIZE)
        found[row["conversations"][1]["value"]] = np.array(arrays, dtype=np.float32).reshape(shape)
    return found


def documents_of(micro: MicroBatch, tokenizer: TextTokenizer) -> list[tuple[str, list[int]]]:
    """(answer, indices of image features) of each document of a micro-batch."""
    ids, features = micro.input_ids.flatten().tolist(), micro.extra["image_features"].flatten().tolist()
    found, start = [], 0
    for position, id in enumerate(ids):
        if id == tokenizer.eos_id:
            inside = features[start : position + 1]
            text = [id for id, feature in zip(ids[start:position], inside, strict=False) if feature < 0]
            answer = tokenizer.decode(text).rpartition("\n")[2]
            found.append((answer, [feature for feature in inside if feature >= 0]))
            start = position + 1
    return found


def check_pictures(
    micro: MicroBatch, tokenizer: TextTokenizer, pixels: dict[str, np.ndarray], *, cuts_text: bool = False
) -> list[str]:
    """The pictures of a micro-batch are those of its documents, in order, each with all its tokens; their answers."""
    used, answers = 0, []
    for number, (answer, features) in enumerate(documents_of(micro, tokenizer)):
        # The end of a text that the sample before has begun.
        if cuts_text and number == 0 and not features:
            continue
        expected = pixels[answer]
        count = len(expected) * TOKENS_PER_IMAGE
        assert features == list(range(used * TOKENS_PER_IMAGE, used * TOKENS_PER_IMAGE + count))
        if len(expected):
            assert micro.images is not None
            assert np.array_equal(micro.images[used : used + len(expected)].numpy(), expected)
        used += len(expected)
        answers.append(answer)
    assert used == (0 if micro.images is None else len(micro.images))
    assert int(micro.input_ids.max()) < IMAGE_TOKEN
    assert IMAGE_TOKEN not in micro.labels
    return answers


def check_segments(micro: MicroBatch) -> None:
    """No attention segment ends inside a picture."""
    features = micro.extra["image_features"].flatten().tolist()
    for end in np.cumsum(micro.lengths or ()):
        feature = features[end] if end < len(features) else 0
        assert feature < 0 or feature % TOKENS_PER_IMAGE == 0


CASES = [("cut", True), ("pack_sample_into_one", False), ("best_fit", True), ("best_fit", False), ("unpacked", True)]


@pytest.mark.parametrize(("packing", "mask"), CASES)
def test_pictures_stay_whole_and_with_their_text(
    words: Path, file: Path, tokenizer: TextTokenizer, pixels: dict[str, np.ndarray], packing: str, mask: bool
) -> None:
    stream = stream_of(words, file, packing, mask=mask, num_shards=1)
    answers: list[str] = []
    for batch in build_train_loader(stream, total_steps=24, num_workers=0, micro_num=2, images=loader_of(words)):
        for micro in batch.micro_batches:
            check_segments(micro)
            answers += check_pictures(micro, tokenizer, pixels, cuts_text=packing in ("cut", "pack_sample_into_one"))
    # One epoch of a packing without a window has every row once.
    if packing == "unpacked":
        assert sorted(answers[: len(pixels)]) == sorted(pixels)
    assert {answer for answer in pixels if len(pixels[answer])} <= set(answers)


def test_text_alone_has_no_pictures_and_placeholders_no_loss(
    words: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    texts = [row for row in rows if "image" not in row]
    sample = stream_of(words, write_rows(tmp_path / "texts.jsonl", texts), "best_fit", num_shards=1).sample(0)
    micro = to_micro_batch(loader_of(words).complete(sample))
    assert micro.images is None and (micro.extra["image_features"] == -1).all()
    sample = stream_of(words, write_rows(tmp_path / "one.jsonl", rows[:1]), "unpacked", num_shards=1).sample(0)
    micro = to_micro_batch(loader_of(words).complete(sample))
    before = (micro.extra["image_features"] >= 0).roll(-1, dims=1)
    assert (micro.labels[before] == IGNORE_INDEX).all() and micro.num_valid_tokens > 0


def contents(batches: list[Batch]) -> list[Any]:
    return [
        [micro.input_ids.tolist(), None if micro.images is None else micro.images.sum((1, 2, 3)).tolist()]
        for batch in batches
        for micro in batch.micro_batches
    ]


def in_order(loaders: list[TrainLoader], steps: int) -> list[Any]:
    """Micro-batches of all ranks in the order of samples."""
    return [each for _ in range(steps) for loader in loaders for each in contents([next(loader)])]


def test_ranks_workers_and_interruptions_change_no_picture(words: Path, file: Path) -> None:
    def loaders(num_ranks: int, workers: int = 0) -> list[TrainLoader]:
        return [
            build_train_loader(
                stream_of(words, file, "cut", num_shards=4),
                micro_num=4 // num_ranks, data_rank=rank, data_size=num_ranks, num_workers=workers,
                images=loader_of(words), prefetch=0 if not workers else 1,
            )
            for rank in range(num_ranks)
        ]  # fmt: skip

    expected = in_order(loaders(1), 6)
    two = loaders(2)
    assert in_order(two, 3) == expected[:12]
    state = two[0].merge_states([loader.state_dict() for loader in two])
    [resumed] = loaders(1, workers=2)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert in_order([resumed], 3) == expected[12:]
    resumed.close()


def test_rows_with_too_many_pictures_are_left_out_and_counted(
    words: Path, rows: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = rows[0]["image"]
    long = {"image": [name] * 12, "conversations": turns("<image>" * 12, "many")}
    file = write_rows(tmp_path / "rows.jsonl", [rows[0], long])
    stream = stream_of(words, file, "unpacked", num_shards=1)
    with caplog.at_level(logging.WARNING):
        assert len(stream.sample(0).images_at) == 2
    assert "row 1 is left out: it has pictures and 54 tokens" in caplog.text and "(1 so far" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png", "conversations": turns("no place", "x")}, "has 0 '<image>', and 1 pictures"),
        ({"conversations": turns("<image>", "x")}, r"has 1 '<image>', and no picture in 'image' or 'images'.*columns"),
        ({"image": "a.png", "conversations": turns("<image><image>", "x")}, "has 2 '<image>', and 1 pictures"),
        ({"image": 3, "conversations": turns("<image>", "x")}, "picture 0 is int, neither a path, bytes"),
        ({"image": "a.png", "images": ["b.png"], "conversations": turns("<image>", "x")}, "image and images: name"),
        ({"image": "../a.png", "conversations": turns("<image>", "x")}, "leaves the image folder"),
        ({"image": "none.png", "conversations": turns("<image>", "x")}, r"none\.png: No such file"),
    ],
)
def test_a_row_that_does_not_fit_names_itself(words: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    stream = stream_of(words, write_rows(tmp_path / "rows.jsonl", [row]), "unpacked", num_shards=1)
    with pytest.raises(DataError, match=message) as caught:
        loader_of(words).complete(stream.sample(0))
    assert "rows.jsonl: row 0" in str(caught.value)


@pytest.mark.parametrize("packing", ["cut", "unpacked"])
def test_a_broken_picture_is_skipped_with_its_document(
    words: Path, rows: list[dict[str, Any]], tokenizer: TextTokenizer, pixels: Any, tmp_path: Path, packing: str
) -> None:
    (words / "images" / "broken.png").write_bytes(b"")
    broken = {"image": ["broken.png", rows[0]["image"]], "conversations": turns("<image><image>", "lost")}
    file = write_rows(tmp_path / "rows.jsonl", [broken, rows[1], rows[2]])
    stream = stream_of(words, file, packing, num_shards=1, skip=True)
    unreadable: list[str] = []
    for batch in build_train_loader(stream, micro_num=1, total_steps=3, images=loader_of(words, skip=True), prefetch=0):
        [micro] = batch.micro_batches
        check_pictures(micro, tokenizer, pixels, cuts_text=packing == "cut")
        unreadable += batch.unreadable
    assert unreadable and all("broken.png: the file is empty; it is a picture of" in each for each in unreadable)
    with pytest.raises(DataError, match=r"broken\.png"):
        list(build_train_loader(stream, micro_num=1, total_steps=3, images=loader_of(words), prefetch=0))


def test_bytes_in_parquet_are_the_same_pictures(words: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    def cell(name: str) -> dict[str, Any]:
        return {"bytes": (words / "images" / name).read_bytes(), "path": None}

    names = [row.get("image", []) for row in rows]
    images = [[cell(name) for name in ([each] if isinstance(each, str) else each)] for each in names]
    table = pyarrow.table({"images": images, "conversations": [row["conversations"] for row in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=1000)
    plain = write_rows(tmp_path / "rows.jsonl", rows)

    def batches(file: Path) -> list[Any]:
        encoder, file_of_rows = encoder_of(words, settings_of(words)), open_rows(file)
        found = encoder.encode([(file_of_rows, row) for row in range(len(rows))])
        return [
            (
                each.ids.tolist(),
                each.loss_mask.tolist(),
                [loader_of(words).pixels(image).tolist() for image in each.images],
            )
            for each in found
        ]

    assert batches(tmp_path / "rows.parquet") == batches(plain)


def test_a_picture_in_an_answer_has_no_loss(words: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    picture = next(row["image"] for row in rows if isinstance(row.get("image"), str))
    row = {"id": "drawn", "image": picture, "conversations": turns("Draw.", "Here: <image> done")}
    file = open_rows(write_rows(tmp_path / "rows.jsonl", [row]))
    [encoded] = encoder_of(words, settings_of(words)).encode([(file, 0)])
    places = np.flatnonzero(encoded.ids == IMAGE_TOKEN)
    assert len(places) == TOKENS_PER_IMAGE and len(encoded.images) == 1
    assert not encoded.loss_mask[places].any()
    assert encoded.loss_mask[places[0] - 1] and encoded.loss_mask[places[-1] + 1 :].all()


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet"])
def test_evaluation_has_every_row_once(
    words: Path, rows: list[dict[str, Any]], tokenizer: TextTokenizer, pixels: Any, tmp_path: Path, kind: str
) -> None:
    if kind == "rows.jsonl":
        file = write_rows(tmp_path / kind, rows)
    else:
        file = tmp_path / kind
        names = [row.get("image", []) for row in rows]
        images = [[(words / "images" / name).read_bytes() for name in np.atleast_1d(each)] for each in names]
        table = pyarrow.table({"image": images, "conversations": [row["conversations"] for row in rows]})
        pyarrow.parquet.write_table(table, file)
    settings = settings_of(words)
    folder = encoded_sets({"a": [open_rows(file)]}, encoder_of(words, settings), "x", settings.folder)
    for packed in (True, False):
        [loader] = build_valid_loaders(
            folder_sets(folder, ImageDocumentFormat(settings)),
            seq_len=SEQ_LEN, micro_bsz=2, vocab_size=tokenizer.vocab_size, packed=packed, images=loader_of(words),
        ).values()  # fmt: skip
        answers = [
            answer for batch in loader for micro in batch.micro_batches
            for answer in check_pictures(micro, tokenizer, pixels)
        ]  # fmt: skip
        assert sorted(answers) == sorted(pixels)


def test_dummy_documents_have_one_random_picture(words: Path) -> None:
    source = open_source(
        None, seq_len=SEQ_LEN, micro_bsz=2, packing="best_fit", vocab_size=100, images=settings_of(words)
    )
    sample = loader_of(words).complete(source.sample(3))
    assert sample.images is not None and sample.images.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    again = loader_of(words).complete(source.sample(3))
    assert again.images is not None and np.array_equal(sample.images, again.images)
    assert not np.array_equal(sample.images[0], sample.images[1])
    assert torch.from_numpy(sample.input_ids).max() < 100


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_tokenized_with_their_pictures(
    words: Path, rows: list[dict[str, Any]], tokenizer: TextTokenizer, pixels: Any, tmp_path: Path, kind: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        file = tmp_path / "rows.parquet"
        images = [
            [(words / "images" / name).read_bytes() for name in np.atleast_1d(row.get("image", []))] for row in rows
        ]
        table = pyarrow.table({"image": images, "conversations": [row["conversations"] for row in rows]})
        pyarrow.parquet.write_table(table, file, row_group_size=7)
    output = tmp_path / "out" / "a.bin"
    options = ["--image-token-id", str(IMAGE_TOKEN), "--tokens-per-image", str(TOKENS_PER_IMAGE)]
    folder = ["--image-folder", str(words / "images")] if kind == "jsonl" else []
    command = [str(file), "--conversations", "--tokenizer", str(words / "tokenizer"), "--output", str(output)]
    assert tokenize([*command, *options, *folder, "--processes", "1"]) == 0
    record = read_record(output)
    assert record is not None and f"pictures of {TOKENS_PER_IMAGE} tokens {IMAGE_TOKEN}" in record.format

    settings = settings_of(words)
    source = open_source(
        output, format=ImageDocumentFormat(settings), seq_len=SEQ_LEN, micro_bsz=2, packing="best_fit",
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    samples = [loader_of(words).complete(source.sample(index)) for index in range(len(source))]
    answers = [answer for each in samples for answer in check_pictures(to_micro_batch(each), tokenizer, pixels)]
    assert {answer for answer in pixels if len(pixels[answer])} <= set(answers)
    encoded = encoder_of(words, settings).encode([(open_rows(file), row) for row in range(len(rows))])
    written = ImageDocumentFormat(settings).open(output)
    for number, each in enumerate(encoded):
        ids, loss_mask = written.read(number)
        assert np.array_equal(ids, each.ids) and np.array_equal(loss_mask, each.loss_mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-token-id", "999"], "--image-token-id needs --tokens-per-image"),
        (["--image-token-id", "999", "--tokens-per-image", "0"], "--tokens-per-image 0: must be at least 1"),
        (["--image-token-id", "999", "--tokens-per-image", "4", "--image-folder", "none"], "none: no such folder"),
        (
            ["--image-token-id", "999", "--tokens-per-image", "4", "--image-folder", "."],
            r"\.png: no such file.*byte 0",
        ),
    ],
)
def test_options_of_pictures_that_do_not_fit(
    words: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    output = tmp_path / "a.bin"
    command = [str(file), "--conversations", "--tokenizer", str(words / "tokenizer"), "--output", str(output)]
    assert tokenize([*command, *options, "--processes", "1"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_parts_of_messages_may_be_pictures(words: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    first = rows[0]
    content = [{"type": "image", "text": None}, {"type": "text", "text": "\nRead it."}]
    answer = [{"type": "text", "text": first["conversations"][1]["value"]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    file = write_rows(tmp_path / "rows.jsonl", [first, {"images": [first["image"]], "messages": messages}])
    one, other = encoder_of(words, settings_of(words)).encode([(open_rows(file), row) for row in (0, 1)])
    assert other.error is None and np.array_equal(one.ids, other.ids) and np.array_equal(one.loss_mask, other.loss_mask)
    assert [image.read() for image in one.images] == [image.read() for image in other.images]
