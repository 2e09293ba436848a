"""The memo encoder gives exactly the ids of the `tokenizers` library."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from internlm.data.tokenize.memo_encoder import _SPLIT_PATTERNS, build_memo_encoder
from internlm.data.tokenize.text_tokenizer import load_tokenizer

TEXT = "The model's   tokens\n\n  don't 'LL 12345 x==y; café 你好，世界！ naïve\r\n\t# comment 3.14 🙂 ½ ²\n"


def make_tokenizer(pattern=None, nfc=False, **byte_level):
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | byte_level))
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 3, TEXT.upper()], trainer)
    return tokenizer


TOKENIZERS = [make_tokenizer(), make_tokenizer(nfc=True), *map(make_tokenizer, _SPLIT_PATTERNS)]
ENCODERS = [build_memo_encoder(tokenizer) for tokenizer in TOKENIZERS]
TRICKY = (
    st.sampled_from(
        ["'s", "'S", "'ſ", "'ll", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u200b"]
    )
    | st.sampled_from(
        ["1", "½", "²", "a", "é", "e\u0301", "你", "！", "🙂", "\U0001f468\u200d\U0001f469", "-", "_", "<|end|>", "<|"]
    )
    | st.sampled_from(["\x00", "İ", "\u0345", "𐐀"])
)


@pytest.mark.parametrize("number", range(len(TOKENIZERS)))
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(TRICKY | st.text(max_size=5), max_size=20))
def test_same_ids_as_the_library(number, parts):
    text = "".join(parts).encode("utf-8", "ignore").decode()
    encoder = ENCODERS[number]
    if encoder.accepts(text):
        assert encoder.encode(text) == TOKENIZERS[number].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("number", range(len(TOKENIZERS)))
def test_same_ids_on_every_character_it_accepts(number):
    encoder, tokenizer = ENCODERS[number], TOKENIZERS[number]
    characters = [chr(point) for point in range(0x20000) if not 0xD800 <= point < 0xE000]
    accepted = [character for character in characters if encoder.accepts(character)]
    assert len(accepted) > 60_000 and set(TEXT) <= set(accepted)
    text = "".join(f"a{character}1 {character}{character}" for character in accepted[number :: len(TOKENIZERS)])
    if encoder.accepts(text):  # not, where joining made an unnormalized sequence
        assert encoder.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_what_it_leaves_to_the_library():
    plain, nfc = ENCODERS[0], ENCODERS[1]
    assert plain.accepts(TEXT) and nfc.accepts(TEXT)
    assert not plain.accepts("an <|end|> in the text") and not plain.accepts("it'ſ")
    assert plain.accepts("e\u0301") and not nfc.accepts("e\u0301")


def test_other_kinds_of_tokenizers_have_none():
    assert build_memo_encoder(make_tokenizer(add_prefix_space=True)) is None
    assert build_memo_encoder(make_tokenizer(pattern=r"\w+|\W+")) is None
    lower = make_tokenizer()
    lower.normalizer = normalizers.Lowercase()
    assert build_memo_encoder(lower) is None
    word_level = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    word_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert build_memo_encoder(word_level) is None
    dropout = make_tokenizer()
    dropout.model.dropout = 0.5
    assert build_memo_encoder(dropout) is None


def test_long_inputs_switch_to_it_without_a_change(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("naïve", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [TEXT * 40, "no accents here " * 400] * 200
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    batches = [loaded.encode_batch(texts[start : start + 20]) for start in range(0, len(texts), 20)]
    assert loaded._memo is not None
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts[:2]]
    assert [ids for batch in batches for ids in batch] == expected * 200
