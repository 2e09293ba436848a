"""Hugging Face -> ours -> Hugging Face: every tensor bit for bit, and the same function on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.hf_folders import (
    NATIVE,
    assert_same_logits,
    assert_same_tensors,
    load_native,
    native_model,
    random_tokens,
    save_native,
    save_published,
    tensors_of,
)

from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.checkpoint.load_model import load_model_for_inference
from internlm.cli import main
from internlm.convert.from_hf import convert_from_hf
from internlm.convert.to_hf import LayoutChoice, convert_to_hf
from internlm.utils.storage import storage_path

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe")


def there_and_back(tmp_path: Path, layout: LayoutChoice = "transformers") -> None:
    """`theirs` -> `ours` -> `back`."""
    convert_from_hf(storage_path(tmp_path / "theirs"), storage_path(tmp_path / "ours"))
    convert_to_hf(
        storage_path(tmp_path / "ours"), storage_path(tmp_path / "back"), layout=layout, max_shard_bytes=50_000
    )


def our_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model, _ = load_model_for_inference(folder)
    with torch.no_grad():
        return model.logits(model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens)))  # type: ignore[operator]


@pytest.mark.parametrize("name", NATIVE)
def test_classes_of_transformers(tmp_path: Path, name: str) -> None:
    """Longer than the windows, and than the context from which dynamic and yarn positions stretch."""
    model = save_native(name, tmp_path / "theirs")
    there_and_back(tmp_path)
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    tokens = random_tokens(2, 80)
    with torch.no_grad():
        theirs, back = model(tokens).logits, load_native(tmp_path / "back")(tokens).logits
    # The same class with the same weights: the same operations in the same order.
    assert torch.equal(back, theirs)
    assert_same_logits(our_logits(tmp_path / "ours", tokens), theirs)


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-tied-window", "gemma", "internlm3", *MIXTURES])
def test_half_precision_stays_as_it_is(tmp_path: Path, name: str) -> None:
    save_native(name, tmp_path / "theirs", torch.bfloat16)
    there_and_back(tmp_path)
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    assert load_native(tmp_path / "back").dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["transformers", "published"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_through_the_command_line(tmp_path: Path, name: str, layout: str) -> None:
    save_native(name, tmp_path / "theirs", torch.bfloat16)
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", "from-hf", "--hf", str(tmp_path / "theirs"), "--out", ours]) == 0
    assert main(["convert", "to-hf", "--ckpt", ours, "--out", back, "--layout", layout]) == 0
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    model, _ = load_model_for_inference(tmp_path / "ours")
    router = model.state_dict()["layers.1.feed_forward.router.weight"]
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    gate = tensors_of(tmp_path / "theirs")[f"model.layers.1.{block}.gate.weight"]
    assert router.dtype == torch.float32 and torch.equal(router, gate.float())


@pytest.mark.parametrize("name", [*MIXTURES, "mixtral-window-tied", "deepseek-v2-yarn", "deepseek-v3"])
def test_imported_mixtures_generate_the_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    """With the cache of keys and values: the experts see a token at a time."""
    theirs = save_native(name, tmp_path / "theirs")
    convert_from_hf(storage_path(tmp_path / "theirs"), storage_path(tmp_path / "ours"))
    model, _ = load_model_for_inference(tmp_path / "ours")
    prompts = random_tokens(2, 7)
    expected = theirs.generate(prompts, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = generate(model, prompts.tolist(), Sampling(max_new_tokens=16))  # type: ignore[arg-type]
    assert [own[0].new_ids for own in found] == expected[:, prompts.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["internlm", "internlm2", "baichuan2"])
def test_published_layouts(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    save_published(name, tmp_path / "theirs", dtype)
    there_and_back(tmp_path, "published")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))


@pytest.mark.parametrize("name", ["internlm", "internlm2", "baichuan2"])
def test_published_layouts_compute_what_their_llama_does(tmp_path: Path, name: str) -> None:
    """They load in transformers without code of their own."""
    llama = save_published(name, tmp_path / "theirs")
    there_and_back(tmp_path)
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        theirs = llama(tokens).logits
        assert torch.equal(load_native(tmp_path / "back")(tokens).logits, theirs)
    assert_same_logits(our_logits(tmp_path / "ours", tokens), theirs)


def test_another_number_format_is_that_of_torch(tmp_path: Path) -> None:
    save_native("llama", tmp_path / "theirs")
    convert_from_hf(storage_path(tmp_path / "theirs"), storage_path(tmp_path / "ours"), dtype=torch.bfloat16)
    convert_to_hf(storage_path(tmp_path / "ours"), storage_path(tmp_path / "back"), dtype=torch.float32)
    expected = {name: tensor.bfloat16().float() for name, tensor in tensors_of(tmp_path / "theirs").items()}
    assert_same_tensors(tensors_of(tmp_path / "back"), expected)
    assert load_native(tmp_path / "back").dtype == torch.float32


def test_selection_biases_stay_in_fp32(tmp_path: Path) -> None:
    model = native_model("glm4-moe", torch.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = model.get_buffer(name).uniform_(-1, 1).clone()
    model.save_pretrained(tmp_path / "theirs")
    convert_from_hf(storage_path(tmp_path / "theirs"), storage_path(tmp_path / "ours"), dtype=torch.bfloat16)
    convert_to_hf(storage_path(tmp_path / "ours"), storage_path(tmp_path / "back"), dtype=torch.bfloat16)
    back = tensors_of(tmp_path / "back")
    assert torch.equal(back[name], bias) and back[name].dtype == torch.float32
    assert back["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    loaded, _ = load_model_for_inference(tmp_path / "ours")
    assert torch.equal(loaded.state_dict()["layers.1.feed_forward.router.selection_bias"], bias)


def test_object_stores_serve_as_disks_do(tmp_path: Path) -> None:
    save_native("llama", tmp_path / "theirs")
    store = storage_path("memory://bucket/round-trip")
    for file in (tmp_path / "theirs").iterdir():
        (store / "theirs" / file.name).write_bytes(file.read_bytes())
    convert_from_hf(store / "theirs", store / "ours")
    convert_to_hf(store / "ours", store / "back", max_shard_bytes=50_000)
    (tmp_path / "back").mkdir()
    for name in (store / "back").names():
        (tmp_path / "back" / name).write_bytes((store / "back" / name).read_bytes())
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    load_native(tmp_path / "back")
