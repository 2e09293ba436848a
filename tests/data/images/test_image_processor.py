"""Pixels are those of transformers' image processors on Pillow, to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from internlm.data.images.processor import ImageProcessor, read_processor
from internlm.utils.errors import ConfigError, DataError

SIZES = [(40, 60), (61, 33), (28, 28), (300, 31), (9, 12)]


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def process(processor: ImageProcessor, image: Image.Image) -> np.ndarray:
    return processor.process(image, "a.png", "row 1")


def theirs(processor: Any, image: Image.Image) -> np.ndarray:
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
def test_clip(size: tuple[int, int]) -> None:
    image = noise(size)
    peer = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    ours = process(ImageProcessor(28), image)
    assert ours.dtype == np.float32 and ours.shape == (3, 28, 28)
    assert np.array_equal(ours, theirs(peer, image))


@pytest.mark.parametrize(
    "peer",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 35}, crop_size={"height": 28, "width": 28}, resample=2),
        SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5, 0.4, 0.3]),
    ],
)
def test_a_saved_processor_is_read(tmp_path: Path, peer: Any) -> None:
    peer.save_pretrained(tmp_path)
    ours = read_processor(tmp_path, 28)
    for size in SIZES:
        assert np.array_equal(process(ours, noise(size)), theirs(peer, noise(size)))


def test_padding_keeps_the_whole_picture() -> None:
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    processor = ImageProcessor(20, fit="pad", mean=(0.5, 0.25, 0.0), std=(1.0, 1.0, 1.0))
    pixels = process(processor, image)
    assert np.allclose(pixels[:, 10], np.array([0.5, 0.75, 1.0])[:, None])
    assert np.allclose(pixels[:, 0], 0, atol=1 / 255)


def test_a_line_is_not_made_a_huge_picture() -> None:
    with pytest.raises(DataError, match=r"a\.png.*so narrow.*row 1.*'pad'"):
        process(ImageProcessor(336), Image.new("1", (1, 60_000)).convert("RGB"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_normalize": False}, "do_normalize = False is not supported"),
        ({"size": {"shortest_edge": 28}, "crop_size": {"height": 20, "width": 20}}, "data.image_size = 28"),
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 28, "width": 28}}, "no center of 28 pixels"),
        ({"image_mean": [0.5]}, "three numbers"),
    ],
)
def test_a_processor_that_does_not_fit_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28} | values))
    with pytest.raises(ConfigError, match=message):
        read_processor(tmp_path, 28)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be a JSON object"),
        (None, "must be a JSON object"),
        ({"image_mean": 0.5}, "image_mean = 0.5 must be three numbers"),
        ({"image_mean": ["0.5"] * 3}, "image_mean = "),
        ({"image_mean": [math.nan, 0.5, 0.5]}, "image_mean = "),
        ({"image_std": [0.5, 0.0, 0.5]}, "must be three numbers above 0"),
        ({"rescale_factor": "x"}, "rescale_factor = 'x' must be a number above 0"),
        ({"rescale_factor": None}, "rescale_factor = None"),
        ({"rescale_factor": 0}, "rescale_factor = 0"),
        ({"resample": True}, "resample = True must be a number of Pillow's filters"),
        ({"do_center_crop": "yes"}, "do_center_crop = 'yes' must be true or false"),
        ({"size": {"shortest_edge": "28"}}, "size = {'shortest_edge': '28'} must be a number of pixels"),
        ({"crop_size": 28.5}, "crop_size = 28.5"),
        ({"size": 28, "do_center_crop": None, "crop_size": None, "do_resize": False}, "do_resize = False is not"),
    ],
)
def test_values_that_give_no_pixels_are_refused(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        read_processor(tmp_path, 28)
    assert message in str(error.value) and "preprocessor_config.json" in str(error.value)
