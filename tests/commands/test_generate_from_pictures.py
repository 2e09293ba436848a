"""`internlm generate --image`: the text that transformers generates from the same weights and pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.llava import CLIP
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from internlm.cli import main
from internlm.convert.from_hf import convert_from_hf
from internlm.data.images.decoding import decode_image
from internlm.data.images.processor import ImageProcessor
from internlm.utils.storage import storage_path

PLACEHOLDER = 300


@pytest.fixture(scope="module")
def model_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' model, and a folder with its checkpoint, a tokenizer of bytes and two pictures."""
    import transformers

    folder = tmp_path_factory.mktemp("pictures")
    vision = {key: value for key, value in CLIP.items() if key != "model_type"}
    text = transformers.LlamaConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    torch.manual_seed(4)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision),
            text_config=text,
            image_token_index=PLACEHOLDER,
            image_seq_length=4,
        )
    ).eval()
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    model.save_pretrained(folder / "hf")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    convert_from_hf(storage_path(folder / "hf"), storage_path(folder / "checkpoint"))
    return model, folder


def run(folder: Path, *options: str) -> int:
    paths = ["--ckpt", str(folder / "checkpoint"), "--tokenizer", str(folder / "tokenizer.json")]
    return main(["generate", *paths, "--greedy", "--max-new-tokens", "8", *options])


def expected_text(model: Any, folder: Path, prompt: str, files: list[str]) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = []
    for number, part in enumerate(prompt.split("<image>")):
        ids += [PLACEHOLDER] * 4 if number else []
        ids += tokenizer.encode(part).ids
    pixels = [ImageProcessor(8).process(decode_image((folder / f).read_bytes(), f, "it"), f, "it") for f in files]
    with torch.no_grad():
        new: list[int] = []
        for _ in range(8):
            inputs = {"input_ids": torch.tensor([ids + new])}
            logits = model(**inputs, pixel_values=torch.from_numpy(np.stack(pixels))).logits[0, -1]
            new.append(int(logits[:256].argmax()))
    return prompt + tokenizer.decode(new)


def test_text_from_pictures_is_that_of_transformers(
    model_and_folder: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = model_and_folder
    found = []
    for files in (["0.png", "1.png"], ["1.png", "0.png"]):
        prompt = "a<image>bc<image>d"
        assert run(folder, "--prompt", prompt, *(f"--image={folder / name}" for name in files)) == 0
        found.append(capsys.readouterr().out.removesuffix("\n"))
        assert found[-1] == expected_text(model, folder, prompt, files)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a<image>b"], "--image: 0 file(s), but the prompts have 1 times <image>"),
        (["--prompt", "ab", "--image", "{folder}/0.png"], "--image: 1 file(s), but the prompts have 0 times <image>"),
        (["--prompt", "<image>", "--image", "{folder}/none.png"], "none.png: No such file or directory"),
        (["--prompt", "<image>", "--image", "{folder}/tokenizer.json"], "no format of pictures that Pillow reads"),
    ],
)
def test_mistakes_are_named(
    model_and_folder: tuple[Any, Path], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_and_folder[1]
    assert run(folder, *(option.replace("{folder}", str(folder)) for option in options)) == 2
    assert message in capsys.readouterr().err


def test_the_processor_of_an_imported_model_is_used(
    model_and_folder: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = model_and_folder
    values = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "crop_size": 8, "size": {"shortest_edge": 8}}
    (folder / "hf" / "preprocessor_config.json").write_text(json.dumps(values))
    convert_from_hf(storage_path(folder / "hf"), storage_path(tmp_path / "checkpoint"))
    capsys.readouterr()
    options = ["--tokenizer", str(folder / "tokenizer.json"), "--greedy", "--max-new-tokens", "8"]
    main(
        ["generate", "--ckpt", str(tmp_path / "checkpoint"), *options, "--prompt", "<image>", f"--image={folder}/0.png"]
    )
    assert "preprocessor_config.json says" in capsys.readouterr().err
