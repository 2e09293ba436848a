"""A folder of rendered words with conversations, and the parts that read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from internlm.data.conversations.encoder import ConversationEncoder, ConversationOptions, load_template_for
from internlm.data.images.image_row_encoder import ImageRowEncoder
from internlm.data.images.loading import ImageLoader
from internlm.data.images.placeholder_tokenizer import PlaceholderTokenizer
from internlm.data.images.processor import ImageProcessor
from internlm.data.images.settings import IMAGE_MARKER, ImageSettings
from internlm.data.rows.open_rows import open_row_files
from internlm.data.sources.row_encoder import ConversationRowEncoder
from internlm.data.sources.row_stream import RowStream
from internlm.data.sources.shard_reader import RowPacking
from internlm.data.tokenize.text_tokenizer import load_tokenizer

IMAGE_TOKEN, TOKENS_PER_IMAGE, IMAGE_SIZE = 5000, 4, 28


def settings_of(words: Path, seq_len: int = 48, **more: Any) -> ImageSettings:
    return ImageSettings(IMAGE_TOKEN, TOKENS_PER_IMAGE, seq_len, words / "images", **more)


def encoder_of(words: Path, settings: ImageSettings) -> ImageRowEncoder:
    tokenizer = PlaceholderTokenizer(load_tokenizer(words / "tokenizer"), settings)
    options = ConversationOptions(image_marker=IMAGE_MARKER)
    template = load_template_for(options, words / "tokenizer")
    return ImageRowEncoder(ConversationRowEncoder(ConversationEncoder(tokenizer, template, options)), settings)


def stream_of(
    words: Path,
    rows: Path,
    packing: str,
    *,
    seq_len: int = 48,
    mask: bool = True,
    num_shards: int = 4,
    skip: bool = False,
) -> RowStream:
    packed = RowPacking(seq_len, 2, packing, mask, None, (0,), skip)  # type: ignore[arg-type]
    encoder = encoder_of(words, settings_of(words, seq_len))
    return RowStream(
        open_row_files([rows], None), [0], ["en"], encoder, packed, num_shards=num_shards, seed=3, facts={}
    )


def loader_of(words: Path, seq_len: int = 48, skip: bool = False) -> ImageLoader:
    return ImageLoader(settings_of(words, seq_len), ImageProcessor(IMAGE_SIZE), skip)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
