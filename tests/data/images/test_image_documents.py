"""Tokenized files with pictures: InternEvo's lines, documents that are too long, and lines that do not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internlm.data.documents.valid_sets import held_out_sets
from internlm.data.images.image_documents import ImageDocumentFormat
from internlm.data.images.loading import ImageLoader
from internlm.data.images.processor import ImageProcessor
from internlm.data.images.settings import ImageSettings
from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.loaders.valid_loader import build_valid_loaders
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.sample import Packing
from internlm.data.sources.open_source import open_source
from internlm.data.sources.sample_stream import ShuffledSource
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.writer import rebuild_meta
from internlm.utils.errors import DataError

PLACE, P, SEQ_LEN, VOCAB = 200_000, 3, 16, 100
PICTURE = [PLACE] * P
DOCUMENTS: list[dict[str, Any]] = [
    {"tokens": [-5, *PICTURE, 6, 7], "images": ["1.png"]},
    {"tokens": list(range(10, 50))},
    {"tokens": [*PICTURE, *PICTURE, 8], "images": ["1.png", "2.png"]},
    {"tokens": [*PICTURE, *range(50, 64)], "images": ["2.png"]},
    {"tokens": [9, *PICTURE, 0, *range(70, 80)], "images": ["2.png"]},
]
TOO_LONG = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        Image.new("RGB", (6, 6), (number, 0, 0)).save(tmp_path / f"{number}.png")
    write(tmp_path, DOCUMENTS)
    return tmp_path


def write(folder: Path, documents: list[dict[str, Any]]) -> None:
    path = folder / "a.bin"
    path.write_text("".join(json.dumps(each) + "\n" for each in documents))
    rebuild_meta(path)


def settings_of(folder: Path) -> ImageSettings:
    return ImageSettings(PLACE, P, SEQ_LEN, folder)


def source_of(folder: Path, packing: Packing, **options: Any) -> Any:
    format = ImageDocumentFormat(settings_of(folder))
    sizes: dict[str, Any] = {"seq_len": SEQ_LEN, "micro_bsz": 1, "packing": packing, "vocab_size": VOCAB}
    return open_source(folder / "a.bin", format=format, **sizes, **options)


@pytest.mark.parametrize("packing", ["best_fit", "unpacked"])
def test_documents_have_their_pictures(folder: Path, packing: Packing, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        source = source_of(folder, packing)
    assert "1 of 5 documents are left out, such as document 3" in caplog.text
    loader = ImageLoader(settings_of(folder), ImageProcessor(6, mean=(0, 0, 0), std=(1 / 255, 1, 1)))
    found = []
    for index in range(len(source)):
        micro = to_micro_batch(loader.complete(source.sample(index)))
        reds = [] if micro.images is None else micro.images[:, 0, 0, 0].round().int().tolist()
        features, ids = (tensor.flatten().tolist() for tensor in (micro.extra["image_features"], micro.input_ids))
        assert [feature for feature in features if feature >= 0] == list(range(len(reds) * P))
        found += [f"picture {reds[f // P]}" if f >= 0 else str(id) for f, id in zip(features, ids, strict=True)]
    text = " ".join(found)
    one, two = ("picture 1 " * P, "picture 2 " * P)
    assert f"5 {one}6 7" in text and f"{one}{two}8" in text and f"9 {two}0 70" in text
    assert text.count("picture 1") == 2 * P and text.count("picture 2") == 2 * P
    assert " 50 " not in text


def test_a_slice_at_a_time_is_read_like_the_whole(folder: Path) -> None:
    file = ImageDocumentFormat(settings_of(folder)).open(folder / "a.bin", VOCAB)
    assert file.counts().tolist() == [6, 40, 7, 0, 15] and len(file.read(TOO_LONG)[0]) == 0
    ids, loss_mask = file.read(4)
    assert not loss_mask[1:4].any() and loss_mask[4:].all()
    for start in range(15):
        part, mask_of_part = file.read(4, start, start + 2)
        assert np.array_equal(part, ids[start : start + 2]) and np.array_equal(
            mask_of_part, loss_mask[start : start + 2]
        )
    with pytest.raises(DataError, match="token 200000 at position 1 is outside the vocabulary"):
        TokenizedFile(folder / "a.bin", VOCAB).read(0)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"tokens": [1, *PICTURE, 2]}, "1 groups of placeholders, and 0 pictures"),
        ({"tokens": [1, *PICTURE, 2], "images": ["1.png", "2.png"]}, "1 groups of placeholders, and 2 pictures"),
        ({"tokens": [1, PLACE, 2], "images": ["1.png"]}, r"1 placeholders \(token 200000\) in sequence, and a picture"),
        ({"tokens": [1, *PICTURE, 2], "images": "1.png"}, "'images' is not a list"),
        ({"tokens": [1, *PICTURE, 2], "images": [{"path": "1.png"}]}, "expected a path relative to data.image_folder"),
        ({"tokens": [1, *PICTURE, 2], "images": ["3.png"]}, r"3\.png: No such file"),
    ],
)
def test_a_line_that_does_not_fit_names_itself(folder: Path, document: dict[str, Any], message: str) -> None:
    write(folder, [document])
    loader = ImageLoader(settings_of(folder), ImageProcessor(6))
    with pytest.raises(DataError, match=message) as caught:
        loader.complete(source_of(folder, "unpacked").sample(0))
    assert "a.bin: document 0" in str(caught.value)
    stream = ShuffledSource(source_of(folder, "unpacked", skip_bad_documents=True), 0)
    [batch] = build_train_loader(
        stream, micro_num=1, total_steps=1, images=ImageLoader(settings_of(folder), ImageProcessor(6), True), prefetch=0
    )
    assert len(batch.unreadable) == 1 and batch.micro_batches[0].images is None and not batch.num_valid_tokens


def test_held_out_documents_keep_their_pictures(folder: Path) -> None:
    settings = settings_of(folder)
    sets = held_out_sets(folder / "a.bin", ImageDocumentFormat(settings), 0.99, 0, None)
    loader = ImageLoader(settings, ImageProcessor(6))
    [valid] = build_valid_loaders(sets, seq_len=SEQ_LEN, micro_bsz=1, vocab_size=VOCAB, images=loader).values()
    micros = [micro for batch in valid for micro in batch.micro_batches]
    assert sum(0 if micro.images is None else len(micro.images) for micro in micros) in (1, 2, 3, 4)
    for micro in micros:
        num_placeholders = int((micro.extra["image_features"] >= 0).sum())
        assert num_placeholders == (0 if micro.images is None else len(micro.images) * P)
