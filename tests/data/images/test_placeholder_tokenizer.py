"""Placeholders in ids: those of transformers where the tokenizer knows `<image>`, else between texts of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.chat_templates import save_chat_tokenizer
from transformers import AutoTokenizer

from internlm.data.images.placeholder_tokenizer import PlaceholderTokenizer
from internlm.data.images.settings import ImageSettings
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.utils.errors import ConfigError

P = 3
TEXTS = [
    "<image>\nWhat is the sum?",
    "one <image> two <image><image>",
    "no picture",
    "",
    "<image>",
    "<|im_start|>user <image>",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_chat_tokenizer(tmp_path)


def test_a_tokenizer_that_knows_the_marker_gives_the_ids_of_transformers(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs.save_pretrained(folder)
    ours = PlaceholderTokenizer(load_tokenizer(folder), ImageSettings(theirs.convert_tokens_to_ids("<image>"), P, 99))
    expanded = [theirs(text.replace("<image>", "<image>" * P), add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert ours.encode_batch(TEXTS) == expanded
    assert [ours.decode(ids) for ids in expanded] == TEXTS


def test_other_texts_are_encoded_between_the_placeholders(folder: Path) -> None:
    plain = load_tokenizer(folder)
    ours = PlaceholderTokenizer(plain, ImageSettings(7000, P, 99))
    picture = [7000] * P

    def ids(text: str) -> list[int]:
        return plain.encode_batch([text])[0] if text else []

    assert ours.encode_batch(TEXTS[:3]) == [
        [*picture, *ids("\nWhat is the sum?")],
        [*ids("one "), *picture, *ids(" two "), *picture, *picture],
        ids("no picture"),
    ]
    assert [ours.decode(each) for each in ours.encode_batch(TEXTS)] == TEXTS
    assert ours.decode([*picture, 7000]) == "<image><image>"


def test_a_token_of_ordinary_text_is_no_placeholder(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ordinary = next(id for id in range(tokenizer.vocab_size) if id not in tokenizer.special_ids)
    with pytest.raises(ConfigError, match=f"the placeholder of pictures, {ordinary}, is the token"):
        PlaceholderTokenizer(tokenizer, ImageSettings(ordinary, P, 99))
