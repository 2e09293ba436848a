"""Tokenizer folders: precedence of the files, and special tokens from the other files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import sentencepiece
from helpers.sentencepieces import train_sentencepiece

from internlm.data.tokenize.alpaca import tokenize_alpaca
from internlm.data.tokenize.fingerprint import tokenizer_fingerprint
from internlm.data.tokenize.probes import PROBE_TEXTS
from internlm.data.tokenize.special_tokens import stop_ids
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.utils.errors import DataError


@pytest.fixture(autouse=True)
def _log_to_caplog(monkeypatch):
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model")


@pytest.fixture(scope="module")
def json_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    train_bpe(["some text to learn a few merges from"] * 3, 270, path)
    path.with_name("tokenizer_config.json").unlink()
    return path


def folder_of(tmp_path: Path, source: Path, **files: object) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(source, folder)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_a_sentencepiece_model_in_a_folder_is_read_by_sentencepiece(tmp_path, model_file):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = load_tokenizer(folder_of(tmp_path, model_file, tokenizer_config={"tokenizer_class": "LlamaTokenizer"}))
    assert tokenizer.encode_batch(list(PROBE_TEXTS)) == [processor.encode(text) for text in PROBE_TEXTS]
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(model_file))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_special_tokens_of_the_folder_are_found_in_the_text(tmp_path, model_file):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    size = processor.vocab_size()
    folder = folder_of(
        tmp_path,
        model_file,
        tokenizer_config={
            "eos_token": "<|end|>",
            "added_tokens_decoder": {
                "5": {"content": "<|user|>", "lstrip": False, "rstrip": False, "single_word": False, "special": True},
                str(size): {"content": "<|end|>", "special": True},
            },
        },
    )
    tokenizer = load_tokenizer(folder)
    text = "<|user|>the  model<|end|>\n    return</s>"
    ids = [5, *processor.encode("the  model"), size, *processor.encode("\n    return"), 2]
    assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.decode(ids) == "<|user|>the  model<|end|>\n    return</s>"
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pieces()[size]) == (size + 1, size, "<|end|>")
    # Without a folder's files, text is text.
    assert 2 not in load_tokenizer(model_file).encode_batch(["a</s>"])[0]


def test_special_tokens_that_strip_white_space_or_are_single_words(tmp_path, model_file):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    size = processor.vocab_size()
    added = [
        {"content": "<mask>", "lstrip": True},
        {"content": "<cut>", "rstrip": True},
        {"content": "code", "single_word": True},
        {"content": "<cut><mask>"},
    ]
    decoder = {str(size + number): token for number, token in enumerate(added)}
    folder = folder_of(tmp_path, model_file, tokenizer_config={"added_tokens_decoder": decoder})
    text = "the  <mask> text<cut> \n a<cut><mask> codes code"
    expected = [
        *(*processor.encode("the"), size, *processor.encode(" text"), size + 1, *processor.encode("a"), size + 3),
        *(*processor.encode(" codes "), size + 2),
    ]
    assert load_tokenizer(folder).encode_batch([text]) == [expected]


def test_a_folder_with_two_different_tokenizers_is_reported(tmp_path, model_file, json_file, caplog):
    folder = folder_of(tmp_path, model_file)
    shutil.copy(json_file, folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_batch(["text"]) == load_tokenizer(json_file).encode_batch(["text"])
    ours, theirs = (load_tokenizer(path).encode_batch(["Hello world"])[0] for path in (json_file, model_file))
    assert f"{folder}: tokenizer.json is used; tokenizer.model is a different tokenizer" in caplog.text
    assert f"'Hello world' is {ours} by tokenizer.json and {theirs} by tokenizer.model" in caplog.text


@pytest.mark.parametrize("kind", ["json_file", "model_file"])
def test_eos_named_in_the_special_tokens_map_alone(tmp_path, request, kind):
    source = request.getfixturevalue(kind)
    piece = load_tokenizer(source).pieces()[7]
    folder = folder_of(tmp_path, source, special_tokens_map={"eos_token": {"content": piece}}, tokenizer_config={})
    assert load_tokenizer(folder).eos_id == 7
    assert load_tokenizer(folder / source.name).eos_id == 7


@pytest.mark.parametrize("with_decoder", [False, True])
def test_files_that_name_different_tokens_are_reported(tmp_path, json_file, caplog, with_decoder):
    one, other = load_tokenizer(json_file).pieces()[7:9]
    config = {"eos_token": one, **({"added_tokens_decoder": {}} if with_decoder else {})}
    folder = folder_of(tmp_path, json_file, tokenizer_config=config, special_tokens_map={"eos_token": other})
    # As transformers chooses.
    assert load_tokenizer(folder).eos_id == (7 if with_decoder else 8)
    assert "eos_token is" in caplog.text and one in caplog.text and other in caplog.text


@pytest.mark.parametrize("kind", ["json_file", "model_file"])
@pytest.mark.parametrize("key", ["eos_token", "bos_token"])
def test_bos_or_eos_missing_from_the_vocabulary(tmp_path, request, kind, key):
    folder = folder_of(tmp_path, request.getfixturevalue(kind), tokenizer_config={key: "<|end_of_turn|>"})
    with pytest.raises(DataError, match=rf"{key} is '<\|end_of_turn\|>', but the vocabulary has no such token"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config", ["a"]),
        ("tokenizer_config", {"eos_token": 3}),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("special_tokens_map", {"eos_token": {"text": "a"}}),
        ("added_tokens", {"a": "b"}),
    ],
)
def test_malformed_files(tmp_path, model_file, name, content):
    with pytest.raises(DataError, match=rf"{name}\.json: "):
        load_tokenizer(folder_of(tmp_path, model_file, **{name: content}))


def test_custom_code_is_not_run_by_default(tmp_path, json_file, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the standard input"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizer\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizer):\n"
        "    vocab_size = 256\n\n"
        "    def get_vocab(self):\n        return {chr(id): id for id in range(256)}\n\n"
        "    def _tokenize(self, text):\n        return list(text)\n\n"
        "    def _convert_token_to_id(self, token):\n        return ord(token)\n\n"
        "    def _convert_id_to_token(self, id):\n        return chr(id)\n"
    )
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"custom code \(tokenization_own\.OwnTokenizer\).*--trust-remote-code"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, trust_remote_code=True).encode_batch(["ab"]) == [[97, 98]]
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    # The ids of a tokenizer.json need no code, but transformers makes the chat template's tokenizer by it.
    shutil.copy(json_file, folder)
    load_tokenizer(folder)
    with pytest.raises(DataError, match="--trust-remote-code"):
        tokenize_alpaca(tmp_path / "data.json", tmp_path / "out", folder, format_name="chat-template")


def test_stop_ids(tmp_path, json_file):
    assert stop_ids(tmp_path) == ()
    folder = folder_of(tmp_path, json_file, generation_config={"eos_token_id": [5, 3]})
    assert stop_ids(folder) == (5, 3)
    (folder / "generation_config.json").write_text('{"eos_token_id": "5"}')
    with pytest.raises(DataError, match="eos_token_id must be an id or a list of ids, got '5'"):
        stop_ids(folder)


def test_what_a_chat_template_puts_around_the_response(tmp_path, model_file):
    """The bos of the template has no loss; the end of the turn and the newline after it have."""
    size = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).vocab_size()
    template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    added = ("<|user|>", "<|assistant|>", "<|end|>")
    decoder = {str(size + number): {"content": content, "special": True} for number, content in enumerate(added)}
    folder = folder_of(
        tmp_path,
        model_file,
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "<|end|>",
            "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, **decoder},
            "chat_template": template,
        },
    )
    (tmp_path / "data.json").write_text('[{"instruction": "a text", "output": "the code"}]')
    tokenize_alpaca(tmp_path / "data.json", tmp_path / "out", folder, valid_fraction=0, format_name="chat-template")
    ids, learned = TokenizedFile(tmp_path / "out" / "train" / "en" / "data.bin").read(0)
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).encode
    masked = [1, size, *encode("a text"), size + 2, *encode("\n"), size + 1]
    assert ids.tolist() == [*masked, *encode("the code"), size + 2, *encode("\n")]
    assert learned.tolist() == [False] * len(masked) + [True] * (len(ids) - len(masked))
