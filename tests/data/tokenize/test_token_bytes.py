"""Bytes of text by token: those of the original text for byte-level BPE and SentencePiece, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sentencepieces import AS_T5, train_sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from internlm.data.documents.label_bytes import count_label_bytes
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.data.tokenize.token_bytes import UNKNOWN
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import DataError

TEXTS = [
    "def add(first, second):\n    return first + second\n",
    " starts with a space,  has  runs   of them, and ends with one ",
    "naïve café, Größe, 中文文本, 日本語, emoji 👩‍👩‍👧 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢, a \u00a0 space",
    "\ttabs\tand\n\nnew lines\r\n",
    "a",
    " ",
    "e\u0301 combining, \ufb01 ligature",
]


def byte_level(folder: Path, **options: Any) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.pop("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    tokenizer.normalizer = options.pop("normalizer", None)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def sentencepiece(folder: Path, **options: Any) -> Path:
    return train_sentencepiece(folder / "tokenizer.model", **options)


def with_names(folder: Path) -> Path:
    """A SentencePiece folder with special tokens, which split the text."""
    sentencepiece(folder)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|user|>"]}
    tokens |= {"added_tokens_decoder": {"341": {"content": "<|user|>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def converted(folder: Path, metaspace: bool) -> Path:
    """A SentencePiece BPE as conversions to tokenizer.json write it: with Llama's normalizer, or Metaspace."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefgnorstw(),:+",
        "▁a",
        "re",
    ]
    merges = [("▁", "a"), ("r", "e")]
    bpe = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    bpe.fuse_unk = True
    tokenizer = Tokenizer(bpe)
    parts: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *parts, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *parts, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


LOSSLESS = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece with special tokens": with_names,
    "converted": lambda folder: converted(folder, metaspace=False),
    "converted with Metaspace": lambda folder: converted(folder, metaspace=True),
}


@pytest.fixture(params=LOSSLESS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    return load_tokenizer(LOSSLESS[request.param](tmp_path))


def bytes_of(tokenizer: TextTokenizer, ids: list[int], mask: list[bool] | None = None) -> int:
    counted = np.array(mask if mask is not None else [True] * len(ids))
    return tokenizer.token_bytes().count(np.array(ids, dtype=np.int64), counted, starts_document=True)


def test_bytes_equal_those_of_the_text(tokenizer: TextTokenizer) -> None:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert eos is not None
    bos = eos if bos is None else bos
    table = tokenizer.token_bytes()
    for text in TEXTS:
        if text == " starts with a space,  has  runs   of them, and ends with one " and table.added_space == "document":
            continue  # Metaspace encodes this as without its first space
        (ids,) = tokenizer.encode_batch([text])
        if text == " " and table.added_space == "document":
            continue
        assert bytes_of(tokenizer, [bos, *ids, eos]) == len(text.encode()), text
        table.check([bos, *ids, eos], tokenizer.decode)
        # Parts of a document, each preceded by the last token of the one before.
        whole, flags = np.array([bos, *ids, eos]), np.ones(len(ids) + 2, dtype=np.bool_)
        parts = [
            table.count(whole[start : start + 4], flags[start : start + 4], starts_document=start == 0)
            for start in range(0, len(whole) - 1, 3)
        ]
        assert sum(parts) == len(text.encode())


def test_masked_and_first_tokens_have_no_bytes(tokenizer: TextTokenizer) -> None:
    bos = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    assert bos is not None
    (ids,) = tokenizer.encode_batch([TEXTS[0]])
    total = bytes_of(tokenizer, [bos, *ids])
    for place in range(1, len(ids) + 1):
        mask = [index == place for index in range(len(ids) + 1)]
        total -= bytes_of(tokenizer, [bos, *ids], mask)
    assert total == 0 and bytes_of(tokenizer, [bos, *ids], [False] * (len(ids) + 1)) == 0
    lengths = tokenizer.token_bytes().lengths
    assert bytes_of(tokenizer, ids) == len(TEXTS[0].encode()) - (lengths[ids[0]] - len(added_to(tokenizer, ids[0])))


def added_to(tokenizer: TextTokenizer, first: int) -> str:
    """The space that the tokenizer has put in front of the text."""
    table = tokenizer.token_bytes()
    return " " if table.added_space != "never" and table.begins_with_space[first] else ""


def test_text_after_a_special_token_inside_a_document(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_names(tmp_path))
    texts = ["the model", "reads the text", " and a space"]
    (ids,) = tokenizer.encode_batch(["<s>" + "<|user|>".join(texts) + "</s>"])
    assert ids[0] == tokenizer.bos_id and ids.count(341) == 2
    assert bytes_of(tokenizer, ids) == sum(len(text.encode()) for text in texts)
    tokenizer.token_bytes().check(ids, tokenizer.decode)


def test_a_space_after_a_special_token_is_of_the_text_if_only_documents_get_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(converted(tmp_path, metaspace=True))
    table = tokenizer.token_bytes()
    (ids,) = tokenizer.encode_batch(["a</s> a"])
    document = np.array([tokenizer.pieces().index("<s>"), *ids])
    assert table.added_space == "document" and table.special[document].tolist() == [True, False, True, False]
    flags = np.ones(len(document), dtype=np.bool_)
    assert table.count(document, flags, starts_document=True) == 3
    # Also where a part of a document begins with the special token.
    assert table.count(document[2:], flags[2:], starts_document=False) == 2


def test_added_tokens_of_ordinary_text_have_bytes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    (ids,) = tokenizer.encode_batch(["x        y"])
    added = tokenizer.vocab_size - 1
    assert ids.count(added) == 2 and bytes_of(tokenizer, [tokenizer.eos_id or 0, *ids]) == 10


def test_unknown_tokens_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path, **AS_T5))
    table = tokenizer.token_bytes()
    assert "forms of characters" in table.normalization and "runs of spaces" in table.normalization
    (ids,) = tokenizer.encode_batch(["the 中 text"])
    with pytest.raises(DataError, match=r"the text of token \d+ is not known"):
        bytes_of(tokenizer, [1, *ids])
    with pytest.raises(DataError, match=r"token 5000 is not in its vocabulary of"):
        bytes_of(tokenizer, [1, 5000])
    assert (table.lengths == UNKNOWN).sum() == 1


def test_normalization_is_named(tmp_path: Path) -> None:
    assert load_tokenizer(byte_level(tmp_path)).token_bytes().normalization == ""
    assert load_tokenizer(byte_level(tmp_path, normalizer=normalizers.NFC())).token_bytes().normalization == "NFC"


def test_decoders_that_join_words_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="its decoder \\(WordPiece\\) does not tell the bytes of a token"):
        load_tokenizer(tmp_path / "tokenizer.json").token_bytes()
    with pytest.raises(DataError, match="adds a space in front of texts"):
        load_tokenizer(byte_level(tmp_path, add_prefix_space=True)).token_bytes()


def test_a_table_that_disagrees_with_decoded_text_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    table = tokenizer.token_bytes()
    (ids,) = tokenizer.encode_batch([TEXTS[0]])
    table.check(ids, tokenizer.decode)
    table.lengths[ids[3]] += 1
    with pytest.raises(DataError, match="bytes of decoded text are"):
        table.check(ids, tokenizer.decode)


def test_the_count_of_a_file_is_cached_by_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    eos = tokenizer.eos_id
    assert eos is not None
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        for ids in tokenizer.encode_batch(TEXTS):
            writer.write([eos, *ids, eos])
    file = TokenizedFile(tmp_path / "a.bin")
    table = tokenizer.token_bytes()
    found = count_label_bytes([file, file], table, tokenizer.decode, "1-a")
    assert found.bytes == 2 * sum(len(text.encode()) for text in TEXTS)
    assert found.labels == 2 * int((file.counts() - 1).sum())
    table.lengths[:] = 0
    assert count_label_bytes([file], table, tokenizer.decode, "1-a").bytes == found.bytes // 2
    with pytest.raises(DataError, match="bytes of decoded text"):
        count_label_bytes([file], table, tokenizer.decode, "1-b")


def test_placeholders_of_pictures_are_no_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    placeholder = 200_000  # outside of the vocabulary
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        for ids in tokenizer.encode_batch(TEXTS):
            writer.write([*[-placeholder] * 4, *ids])
    files, table = [TokenizedFile(tmp_path / "a.bin")], tokenizer.token_bytes()
    with pytest.raises(DataError, match="token 200000 is not in its vocabulary"):
        count_label_bytes(files, table, tokenizer.decode, "1-a")
    found = count_label_bytes(files, table, tokenizer.decode, "1-a", placeholder)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.labels == sum(map(len, tokenizer.encode_batch(TEXTS)))


@pytest.mark.parametrize("part", [1, 2, 3, 7])
def test_documents_that_are_read_in_parts_have_the_same_count(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert eos is not None
    texts = ["the first, the second", "a", "return first"]
    documents = [[eos if bos is None else bos, *ids, eos] for ids in tokenizer.encode_batch(texts)]
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        for ids in documents:
            writer.write(ids)
    monkeypatch.setattr("internlm.data.documents.label_bytes._PART", part)
    found = count_label_bytes([TokenizedFile(tmp_path / "a.bin")], tokenizer.token_bytes(), tokenizer.decode, "1-a")
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.labels == sum(len(ids) - 1 for ids in documents)
