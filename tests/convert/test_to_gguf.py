"""`internlm convert to-gguf`: llama.cpp computes with the file what our model does, with the tokens of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.chat_templates import CHATML, save_chat_tokenizer
from helpers.sentencepieces import AS_T5, train_sentencepiece
from helpers.tiny_checkpoints import save, write
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from internlm.cli import main
from internlm.convert.check_gguf import check_gguf
from internlm.convert.findings import Finding
from internlm.convert.gguf_model import GgufModel
from internlm.convert.sentencepiece_json import sentencepiece_json
from internlm.convert.to_gguf import convert_to_gguf
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

gguf = pytest.importorskip("gguf")

VOCAB = 640
GQA = {"num_kv_attention_heads": 2}
BLOCKS = {**GQA, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
TEXT = ["the model reads  the code\n    return 12345, it's 3.14\n\n\t你好，世界。"] * 3


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as this project trains it."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXT, 300, path)
    return path


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sp") / "own.model")


def convert(
    tmp_path: Path, model_type: str, tokenizer: Path, file_type: str = "f32", pre: str | None = None, **keys: Any
) -> Any:
    """Write `model.gguf` with a tiny model; returns the model."""
    model, checkpoint = save(tmp_path / "ours", model_type, **{"vocab_size": VOCAB, **keys})
    convert_to_gguf(
        checkpoint,
        tmp_path / "model.gguf",
        file_type=file_type,
        tokenizer=storage_path(tokenizer),
        pre_tokenizer=pre,
    )
    return model


def findings(tmp_path: Path, tokenizer: Path, file_type: str = "f32") -> dict[str, Finding]:
    """What llama.cpp says of `model.gguf`."""
    pytest.importorskip("xllamacpp")
    checkpoint = storage_path(tmp_path / "ours" / "0")
    found = check_gguf(checkpoint, tmp_path / "model.gguf", file_type, load_tokenizer(tokenizer))
    return {finding.subject: finding for finding in found}


def assert_passed(tmp_path: Path, tokenizer: Path, file_type: str = "f32") -> None:
    found = findings(tmp_path, tokenizer, file_type)
    assert not [str(finding) for finding in found.values() if finding.outcome != "passed"]


def metadata(tmp_path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}


# -- models ------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("INTERNLM", {"qk_interleaved": True}),
        ("INTERNLM2", {**GQA, "norm_head": True}),
        ("INTERNLM3", GQA),
        ("LLAMA2", {**GQA, "rope_scaling": YARN, "max_position_embeddings": 256}),
        ("LLAMA3", {**GQA, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
        ("LLAMA2", {**GQA, "rope_scaling": {"type": "linear", "factor": 3.0}}),
        ("MISTRAL", {**GQA, "head_dim": 10, "sliding_window": 40}),
        ("QWEN2", {**GQA, "tie_word_embeddings": True, "rope_base": 1e6}),
        ("QWEN3", {**GQA, "head_dim": 10}),
        ("GEMMA", {"num_kv_attention_heads": 1, "head_dim": 12}),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path: Path, bpe: Path, model_type: str, keys: dict[str, Any]) -> None:
    convert(tmp_path, model_type, bpe, **keys)
    assert_passed(tmp_path, bpe)


@pytest.mark.parametrize(
    ("file_type", "dtype"),
    [("f16", "float32"), ("bf16", "float32"), ("q8_0", "float32"), ("f16", "bfloat16"), ("bf16", "bfloat16")],
)
def test_types(tmp_path: Path, bpe: Path, file_type: str, dtype: str) -> None:
    model = convert(tmp_path, "LLAMA2", bpe, file_type, **BLOCKS, dtype=f"torch.{dtype}")
    assert_passed(tmp_path, bpe, file_type)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == file_type.upper()
    assert tensors["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
    down = tensors["blk.1.ffn_down.weight"]
    weight = model.state_dict()["layers.1.feed_forward.w2.weight"].float()
    if file_type == "q8_0":
        expected = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), down.tensor_type), down.tensor_type)
    else:
        expected = weight.to({"f16": torch.float16, "bf16": torch.bfloat16}[file_type]).float().numpy()
    assert np.array_equal(gguf.quants.dequantize(down.data, down.tensor_type), expected)


def test_rows_that_have_no_blocks_are_f16(tmp_path: Path, bpe: Path) -> None:
    convert(tmp_path, "LLAMA2", bpe, "q8_0", **{**BLOCKS, "intermediate_size": 88})
    assert_passed(tmp_path, bpe, "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_a_context_without_the_window(tmp_path: Path, bpe: Path) -> None:
    convert(tmp_path, "MISTRAL", bpe, sliding_window=40, max_position_embeddings=256)
    assert metadata(tmp_path)["llama.context_length"] == 40


@pytest.mark.parametrize("model_type", ["LLAMA2", "GEMMA"])
def test_weights_as_in_transformers_are_found_to_be_wrong(
    tmp_path: Path, bpe: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves where llama.cpp rotates adjacent pairs, and norms without the 1."""
    monkeypatch.setattr(GgufModel, "weight", lambda self, name, tensor: tensor)
    convert(tmp_path, model_type, bpe)
    assert findings(tmp_path, bpe)["log-probabilities"].outcome == "failed"


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        ("MIXTRALMOE", {"num_experts": 4, "top_k": 2, "moe_type": "Dropless"}, "the class 'mixtral' of transformers"),
        ("GEMMA", {"tie_word_embeddings": False}, "a head of its own in gemma"),
        ("QWEN3", {"no_bias": False}, "biases of attention in qwen3"),
        ("QWEN2", {"rope_scaling": LLAMA3}, "rope scaling of type llama3 in qwen2"),
    ],
)
def test_other_models_are_refused(
    tmp_path: Path, bpe: Path, model_type: str, keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"{model_type} is not written to GGUF: {reason}.*convert to-hf"):
        convert(tmp_path, model_type, bpe, **keys)
    assert not (tmp_path / "model.gguf").exists()


# -- tokenizers ------------------------------------------------------------


def test_special_tokens_and_chat_template(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(tmp_path / "tokenizer")
    convert(tmp_path, "QWEN2", folder)
    assert_passed(tmp_path, folder)
    values, tokenizer = metadata(tmp_path), load_tokenizer(folder)
    assert values["tokenizer.chat_template"] == CHATML
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert values["tokenizer.ggml.add_bos_token"] is False
    padding = range(tokenizer.vocab_size, VOCAB)
    assert values["tokenizer.ggml.tokens"][tokenizer.vocab_size :] == [f"[PAD{id}]" for id in padding]


def test_sentencepiece(tmp_path: Path, sentencepiece: Path) -> None:
    convert(tmp_path, "INTERNLM2", sentencepiece, **GQA)
    assert_passed(tmp_path, sentencepiece)
    assert metadata(tmp_path)["tokenizer.ggml.model"] == "llama"


def test_sentencepiece_with_added_tokens_and_bos(tmp_path: Path, sentencepiece: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece.read_bytes())
    size = load_tokenizer(sentencepiece).vocab_size
    added = {str(size): {"content": "<|user|>", "special": True}, str(size + 2): {"content": "<tool>"}}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    convert(tmp_path, "LLAMA2", folder)
    assert findings(tmp_path, folder)["log-probabilities"].outcome == "passed"
    values = metadata(tmp_path)
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.token_type"][size : size + 3] == [3, 5, 4]


def test_sentencepiece_as_json(tmp_path: Path, sentencepiece: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(sentencepiece_json(sentencepiece, {}, (None, None)))
    convert(tmp_path, "LLAMA2", path)
    assert_passed(tmp_path, path)


def bpe_with(path: Path, pattern: str | None, *, ignore_merges: bool = False, normalizer: Any = None) -> Path:
    """A byte-level BPE that splits text by a pattern."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(path))
    return path


QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [(QWEN2_PATTERN, False, "qwen2"), (QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), True, "llama-bpe")],
)
def test_published_pre_tokenizers(tmp_path: Path, pattern: str, ignore_merges: bool, name: str) -> None:
    path = bpe_with(tmp_path / "tokenizer.json", pattern, ignore_merges=ignore_merges)
    convert(tmp_path, "QWEN2", path)
    assert metadata(tmp_path)["tokenizer.ggml.pre"] == name
    assert_passed(tmp_path, path)


def test_an_unknown_pattern_is_refused_until_it_has_a_name(tmp_path: Path) -> None:
    path = bpe_with(tmp_path / "tokenizer.json", r"\d|\s+|\w+")
    with pytest.raises(ConfigError, match=r"is not known \(pattern .*--pre-tokenizer"):
        convert(tmp_path, "LLAMA2", path)
    convert(tmp_path / "named", "LLAMA2", path, pre="gpt-2")
    found = findings(tmp_path / "named", path)["tokenizer"]
    assert found.outcome == "failed" and "in llama.cpp" in found.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (AS_T5, "is not BPE"),
        ({"byte_fallback": False}, "no bytes"),
        ({"remove_extra_whitespaces": True}, "white space"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"llama.cpp has no tokenizer like this: .*{reason}"):
        convert(tmp_path, "LLAMA2", train_sentencepiece(tmp_path / "own.model", **options))


def test_other_tokenizers_are_refused(tmp_path: Path, bpe: Path) -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has 300 tokens, the embedding only 97 rows"):
        convert(tmp_path, "LLAMA2", bpe, vocab_size=97)
    lower = bpe_with(tmp_path / "lower.json", None, normalizer=normalizers.Lowercase())
    with pytest.raises(ConfigError, match="its normalizer Lowercase"):
        convert(tmp_path / "lower", "LLAMA2", lower)
    _, checkpoint = save(tmp_path / "none", "LLAMA2")
    with pytest.raises(ConfigError, match=r"llama\.cpp needs a tokenizer: .*--tokenizer PATH"):
        convert_to_gguf(checkpoint, tmp_path / "none.gguf", file_type="f32")


# -- the command ------------------------------------------------------------


def test_the_command(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    save(tmp_path / "ours", "LLAMA2", vocab_size=VOCAB)
    out = tmp_path / "new" / "model.gguf"
    command = ["convert", "to-gguf", "--ckpt", f"{tmp_path}/ours", "--out", str(out), "--type", "bf16"]
    assert main([*command, "--tokenizer", str(bpe), "--check"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}\nlog-probabilities: passed: ") and "\ntokenizer: passed: " in printed
    before = out.read_bytes()
    assert main([*command, "--tokenizer", str(bpe)]) == 2
    assert f"'{out}' exists; remove it" in capsys.readouterr().err
    assert out.read_bytes() == before and [path.name for path in out.parent.iterdir()] == ["model.gguf"]


def test_what_does_not_fit_leaves_nothing(tmp_path: Path, bpe: Path) -> None:
    model, _ = save(tmp_path / "fits", "LLAMA2", vocab_size=VOCAB)
    with torch.no_grad():
        model.get_parameter("output.weight")[3, 4] = 1e5
    checkpoint = write(tmp_path / "ours", model, "LLAMA2", vocab_size=VOCAB)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' has values up to 1e\+05, above the largest float16"):
        convert_to_gguf(checkpoint, tmp_path / "out" / "m.gguf", file_type="f16", tokenizer=storage_path(bpe))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("module", "package"), [("to_gguf", r"internlm\[gguf\]"), ("check_gguf", "xllamacpp")])
def test_missing_packages_are_named(
    tmp_path: Path, module: str, package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"internlm.convert.{module}.why_unusable", lambda name: f"{name} is not installed")
    command = ["convert", "to-gguf", "--ckpt", "ours", "--out", str(tmp_path / "m.gguf"), "--type", "f32", "--check"]
    assert main(command) == 2
    assert f"pip install {package.replace(chr(92), '')}" in capsys.readouterr().err.replace("'", "")
