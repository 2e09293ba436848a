"""Streaming text never breaks a character, with decoders as tokenizers have them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from internlm.apis.text_stream import StopTexts, TextStream

TEXT = "naïve 日本語 text, emoji 👩‍🚀🎉 and\n\ttabs — done"


def bytes_decode(tokens: list[int]) -> str:
    """One token a byte."""
    return bytes(tokens).decode("utf-8", errors="replace")


def sentencepiece_like_decode(tokens: list[int]) -> str:
    """Like SentencePiece: words begin with a space, which is dropped at the start of a text."""
    return "".join(f" w{token}" for token in tokens).removeprefix(" ")


def test_no_piece_holds_half_a_character():
    tokens = list(TEXT.encode())
    stream = TextStream(bytes_decode)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    # The text so far is always shown up to the last whole character.
    for count in range(len(tokens) + 1):
        assert "".join(pieces[:count]) == bytes(tokens[:count]).decode(errors="ignore")


def test_spaces_between_words_survive():
    stream = TextStream(sentencepiece_like_decode, prompt=[1, 2])
    assert [stream.push(token) for token in (3, 4, 5)] == [" w3", " w4", " w5"]
    assert stream.finish() == ""
    stream = TextStream(sentencepiece_like_decode)
    assert [stream.push(token) for token in (3, 4)] == ["w3", " w4"]


def test_a_text_cut_inside_a_character_ends_with_a_replacement():
    stream = TextStream(bytes_decode)
    assert [stream.push(token) for token in "né".encode()[:2]] == ["n", ""]
    assert stream.finish() == "\ufffd"


def test_a_replacement_character_that_is_text_is_kept():
    stream = TextStream(bytes_decode)
    pieces = "".join(stream.push(token) for token in "a\ufffdb".encode())
    assert pieces + stream.finish() == "a\ufffdb"


@pytest.mark.parametrize("split", [0, 1, 8])
def test_byte_level_bpe(split):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["naïve text and emoji"], BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    )
    prompt, rest = tokenizer.encode(TEXT[:split]).ids, tokenizer.encode(TEXT[split:]).ids
    stream = TextStream(tokenizer.decode, prompt)
    assert tokenizer.decode(prompt) + "".join(map(stream.push, rest)) + stream.finish() == TEXT


@pytest.mark.parametrize(
    ("pieces", "shown", "found"),
    [
        (["ab", "cd"], ["ab", "cd", ""], False),
        (["a", "b<", "en", "d>c", "d"], ["a", "b", "", "", "", ""], True),
        (["a<en", "x", "<end"], ["a", "<enx", "", "<end"], False),
        (["a\n", "\n", "b"], ["a", "", "", ""], True),
        (["<<end><end>"], ["<", ""], True),
        (["\nb\n\n"], ["\nb", ""], True),
    ],
)
def test_a_stop_text_and_what_follows_is_not_shown(pieces: list[str], shown: list[str], found: bool) -> None:
    until = StopTexts(["<end>", "\n\n"])
    assert [*map(until.push, pieces), until.finish()] == shown and until.found == found


def test_without_stop_texts_all_is_shown_at_once() -> None:
    until = StopTexts([])
    assert [until.push("a"), until.push(""), until.finish()] == ["a", "", ""]
