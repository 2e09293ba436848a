"""Renders words and digits as pictures, with conversations that transcribe them: data for a vision model, from nothing.

Rows are LLaVA's: {id, image, conversations}. Some are text alone. Everything is a pure function of the settings, the
seed and the version of Pillow, whose own font is used.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm.data.images.decoding import check_pillow
from internlm.data.tokenize.train_bpe import MIN_VOCAB, train_bpe
from internlm.utils.errors import DataError

_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
"""Without I, O, 0 and 1, which look alike."""
_TEXT_EVERY = 8
"""Of so many rows, one is text alone."""
_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '\\n' }}
    {%- endif %}
{%- endfor %}"""


@dataclass(frozen=True)
class WordSettings:
    """What is rendered.

    Attributes:
        num_train, num_valid: rows for training and evaluation; no picture is in both.
        max_length: characters of the longest word, which has at least one.
        image_size: side of a picture in pixels.
        alphabet: characters of the words.
        seed: of words, positions and colors.
    """

    num_train: int = 2000
    num_valid: int = 100
    max_length: int = 3
    image_size: int = 56
    alphabet: str = _ALPHABET
    seed: int = 1024


def render_words(folder: Path, settings: WordSettings) -> None:
    """Write train.json, valid.json, a folder `images` of PNG files and a folder `tokenizer` with a chat template.

    Raises:
        DataError: the folder exists.
        ConfigError: Pillow is missing.
    """
    check_pillow()
    if folder.exists():
        raise DataError(f"{folder} exists: choose another folder, or remove it")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "images").mkdir(parents=True)
    random = np.random.default_rng(settings.seed)
    num_rows = settings.num_train + settings.num_valid
    rows = [_row(number, _word(settings, random), temporary, settings, random) for number in range(num_rows)]
    for name, chosen in (("train", rows[: settings.num_train]), ("valid", rows[settings.num_train :])):
        (temporary / f"{name}.json").write_text(json.dumps(chosen, indent=1), encoding="utf-8")
    tokenizer = temporary / "tokenizer"
    tokenizer.mkdir()
    train_bpe([turn["value"] for row in rows for turn in row["conversations"]], MIN_VOCAB, tokenizer / "tokenizer.json")
    (tokenizer / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    temporary.rename(folder)


def _word(settings: WordSettings, random: np.random.Generator) -> str:
    length = int(random.integers(1, settings.max_length + 1))
    return "".join(random.choice(list(settings.alphabet), length))


def _row(number: int, word: str, folder: Path, settings: WordSettings, random: np.random.Generator) -> dict[str, Any]:
    if number % _TEXT_EVERY == _TEXT_EVERY - 1:
        return {"id": f"{number:06d}", "conversations": _turns(f"Say {word}.", word)}
    name = f"{number:06d}.png"
    _draw(word, settings, random).save(folder / "images" / name)
    return {"id": f"{number:06d}", "image": name, "conversations": _turns("<image>\nRead it.", word)}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _draw(word: str, settings: WordSettings, random: np.random.Generator) -> Any:
    """The word in dark on a light background, at a random place in a random size."""
    from PIL import Image, ImageDraw, ImageFont

    side = settings.image_size
    background, ink = random.integers(200, 256, 3), random.integers(0, 90, 3)
    image = Image.new("RGB", (side, side), tuple(background.tolist()))
    draw = ImageDraw.Draw(image)
    largest = side / (0.8 * max(len(word), 2))
    font = ImageFont.load_default(size=float(random.uniform(0.7, 1.0)) * largest)
    left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
    x, y = (int(random.integers(0, max(1, side - int(length)))) for length in (right - left, bottom - top))
    draw.text((x - left, y - top), word, fill=tuple(ink.tolist()), font=font)
    return image
