"""Single tokens as they are within a text, with the tokenizers that drop spaces or cut characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.serve.token_texts import TokenOffsets, TokenTexts

TEXT = "the true cat 😀 is untrue é"


@pytest.fixture
def words(tmp_path: Path) -> TextTokenizer:
    """Words begin with a space, which the text has none of at its beginning; unknown characters are bytes."""
    text = "the true cat and the dog are true to the untrue thing"
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 20),
            model_writer=file,
            vocab_size=290,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    return load_tokenizer(tmp_path / "tokenizer.model")


@pytest.fixture
def letters(tmp_path: Path) -> TextTokenizer:
    """Every byte is a token, spelled as a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


def test_tokens_have_the_spaces_of_their_words(words: TextTokenizer) -> None:
    texts = TokenTexts(words)
    pieces = words.pieces()
    assert texts.spelling(pieces.index("▁t")) == " t" and texts.spelling(pieces.index("t")) == "t"
    ids = words.encode_batch([TEXT])[0]
    assert b"".join(map(texts.bytes_of, ids)).decode() == f" {TEXT}"


@pytest.mark.parametrize("kind", ["words", "letters"])
def test_parts_of_a_character_are_bytes(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: TextTokenizer = request.getfixturevalue(kind)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode_batch(["a😀"])[0][-4:]
    assert [texts.spelling(id) for id in ids] == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"]
    assert b"".join(map(texts.bytes_of, ids)) == "😀".encode() and {*map(texts.text_of, ids)} == {"\ufffd"}
    if kind == "letters":
        assert sorted(map(texts.bytes_of, range(256))) == [bytes([n]) for n in range(256)]


@pytest.mark.parametrize("kind", ["words", "letters"])
def test_offsets_are_positions_in_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: TextTokenizer = request.getfixturevalue(kind)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode_batch([TEXT])[0]
    at_once = TokenOffsets(texts).take(ids, TEXT)
    offsets = TokenOffsets(texts)
    assert offsets.take(ids[:3], TEXT[:3]) + offsets.take(ids[3:], TEXT[3:]) == at_once
    assert at_once[0] == 0
    for id, offset in list(zip(ids, at_once, strict=True))[1:]:
        spelling = texts.spelling(id)
        if spelling.startswith("bytes:"):
            assert TEXT[offset] in "😀é"
        else:
            assert TEXT.startswith(spelling, offset)
