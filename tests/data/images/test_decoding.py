"""What each kind of picture becomes, and what broken ones say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internlm.data.images import decoding
from internlm.data.images.decoding import decode_image
from internlm.data.images.image_source import ImageFile, from_json, image_file, to_json
from internlm.utils.errors import DataError

RED = (200, 30, 40)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, "a.png", "rows.jsonl: row 3")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_every_mode_becomes_rgb() -> None:
    red = Image.new("RGB", (3, 2), RED)
    assert (decode(encoded(red)) == RED).all()
    assert (decode(encoded(red.convert("P"))) == red.convert("P").convert("RGB")).all()
    assert (decode(encoded(red.convert("L"))) == np.asarray(red.convert("L"))[..., None]).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decode(encoded(cmyk, "JPEG")).astype(int) - (255, 0, 0)).max() <= 3
    wide = Image.fromarray(np.array([[0, 255], [256, 65535]], dtype=np.uint16))
    assert decode(encoded(wide))[..., 0].tolist() == [[0, 0], [1, 255]]


def test_what_is_transparent_becomes_white() -> None:
    half = Image.new("RGBA", (1, 2), (*RED, 255))
    half.putpixel((0, 1), (0, 0, 0, 0))
    assert decode(encoded(half)).tolist() == [[list(RED)], [[255, 255, 255]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    assert decode(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255]]]


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("P", (2, 2), color) for color in (0, 1)]
    for frame in frames:
        frame.putpalette([250, 0, 0, 0, 0, 250])
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data) == (250, 0, 0)).all()


def test_the_orientation_of_a_camera_is_applied() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is at the right
    assert decode(encoded(image, exif=exif)).tolist() == [[list(RED)], [[0, 0, 0]]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"no picture at all", "no format of pictures that Pillow reads"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], "the picture is damaged"),
        (encoded(Image.new("F", (1, 1)), "TIFF"), "floating-point"),
    ],
)
def test_a_broken_picture_names_file_document_and_fix(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        decode(data)
    for part in ("a.png", "rows.jsonl: row 3"):
        assert part in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("height", [4, 12])
def test_a_picture_that_would_fill_memory_is_refused(monkeypatch: pytest.MonkeyPatch, height: int) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 15)
    # Pillow warns above its own bound, and refuses twice as much.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with pytest.raises(DataError, match=r"at most 15 are decoded.*store a smaller copy"):
        decode(encoded(Image.new("1", (4, height))))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", "is absolute"),
        ("C:\\a.png", "is absolute"),
        ("a/../../b.png", "leaves the image folder"),
        ("", "with the path ''"),
    ],
)
def test_a_path_stays_in_the_image_folder(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        image_file(path, tmp_path, "row 1")


def test_a_path_needs_a_folder_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 has the picture 'a\.png': set data\.image_folder"):
        image_file("a.png", None, "row 1")
    with pytest.raises(DataError, match=r"a\.png: No such file.*a picture of row 1.*data\.image_folder"):
        image_file("a.png", tmp_path, "row 1").read()


def test_sources_survive_a_line(tmp_path: Path) -> None:
    source = ImageFile(tmp_path / "a" / "b.png", "row 1")
    assert to_json(source, tmp_path) == "a/b.png"
    assert from_json("a/b.png", tmp_path, "row 1") == source
    cell = {"file": "c.parquet", "row": 3, "column": "image", "index": 0}
    assert to_json(from_json(cell, tmp_path, "row 1"), tmp_path) == cell
    for wrong in (3, {"file": "c.parquet"}, cell | {"row": -1}, cell | {"file": "../c.parquet"}):
        with pytest.raises(DataError, match="row 1"):
            from_json(wrong, tmp_path, "row 1")
