"""Turns decoded pictures into the input of a vision tower: one size, rescaled and normalized.

The arithmetic is that of transformers' image processors on Pillow, to the bit, so that a model sees the same pixels in
training and in transformers.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from internlm.data.images.decoding import MAX_PIXELS
from internlm.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["crop", "pad", "stretch"]
PREPROCESSOR_CONFIG = "preprocessor_config.json"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on (Radford et al. 2021), per channel, in [0, 1]."""
_BICUBIC = 3
"""Pillow's number of the filter."""
_MAX_FILTER = 5


@dataclass(frozen=True)
class ImageProcessor:
    """How a picture becomes float32 `[3, size, size]`.

    Attributes:
        size: side of the result in pixels.
        fit: "crop": the shorter side is resized to `short_side`, and the center is cut out; "pad": bars in the color of
            `mean` make the picture a square, which is resized (Liu et al. 2023, LLaVA 1.5); "stretch": resized without
            regard to its proportions.
        short_side: of the resized picture with "crop"; at least `size`.
        resample: Pillow's number of the filter, such as 3 for bicubic.
        rescale_factor: of the 8-bit values.
        mean, std: of each channel after that.
    """

    size: int
    fit: Fit = "crop"
    short_side: int | None = None
    resample: int = _BICUBIC
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that pixels depend on, as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def process(self, image: Image, name: str, document: str) -> NDArray[np.float32]:
        """Process a picture of mode RGB: float32 `[3, size, size]`.

        Raises:
            DataError: it is so narrow that it would be too large once resized.
        """
        if self.fit == "crop":
            image = self._resized(image, name, document)
            left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        else:
            square = self._padded(image) if self.fit == "pad" else image
            image = square.resize((self.size, self.size), self.resample)
        pixels = (np.asarray(image).astype(np.float64) * self.rescale_factor).astype(np.float32)
        normalized = (pixels - np.array(self.mean, dtype=np.float32)) / np.array(self.std, dtype=np.float32)
        return np.ascontiguousarray(np.moveaxis(normalized, -1, 0))

    def _resized(self, image: Image, name: str, document: str) -> Image:
        short_side = self.short_side or self.size
        shorter, longer = sorted(image.size)
        new_longer = int(short_side * longer / shorter)
        if short_side * new_longer > MAX_PIXELS:
            raise DataError(
                f"{name}: with {image.width:,} x {image.height:,} pixels it is so narrow that resizing gives "
                f"{short_side:,} x {new_longer:,}; it is a picture of {document}; set data.image_fit = 'pad', or "
                "remove the document"
            )
        size = (short_side, new_longer) if image.width <= image.height else (new_longer, short_side)
        return image.resize(size, self.resample)

    def _padded(self, image: Image) -> Image:
        from PIL import Image

        side = max(image.size)
        if image.width == image.height:
            return image
        color = tuple(int(each * 255) for each in self.mean)
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def read_processor(path: Path, size: int) -> ImageProcessor:
    """Read the preprocessor_config.json of a vision tower.

    Args:
        path: the file, or its folder.
        size: side of the result in pixels, which the file must agree with.

    Raises:
        ConfigError: the file is missing or malformed, asks for what is not done here, or has another size.
    """
    file = path / PREPROCESSOR_CONFIG if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); correct data.image_processor_path") from error
    _check_values(values, str(file))
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if values.get(name, True) is not True:
            raise ConfigError(
                f"{file}: {name} = {values[name]!r} is not supported: every picture gets one size and scale"
            )
    sides = _sides(values.get("size", size))
    crop = _sides(values.get("crop_size", size)) if values.get("do_center_crop", "shortest_edge" in sides) else None
    fit: Fit = "stretch" if crop is None else "crop"
    final = sides if crop is None else crop
    short_side = sides.get("shortest_edge") or (sides.get("height") if crop is None else None)
    if short_side is None or {final.get("height"), final.get("width")} - {None} != {size}:
        raise ConfigError(
            f"{file}: size = {values.get('size')!r} and crop_size = {values.get('crop_size')!r} do not give "
            f"data.image_size = {size}; set data.image_size to the size of the tower"
        )
    if short_side < size:
        raise ConfigError(f"{file}: a picture whose shorter side is {short_side} has no center of {size} pixels")
    resample = values.get("resample", _BICUBIC)
    mean, std = (
        tuple(values.get(name, default)) for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )
    return ImageProcessor(size, fit, short_side, resample, float(values.get("rescale_factor", 1 / 255)), mean, std)


def _check_values(values: Any, file: str) -> None:
    """Refuse values of a preprocessor_config.json of another kind, and those that give no finite pixels."""
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must be a JSON object, with size, image_mean ...")
    rules = {
        "do_center_crop": (lambda value: value is None or isinstance(value, bool), "must be true or false"),
        "resample": (
            lambda value: type(value) is int and 0 <= value <= _MAX_FILTER,
            f"must be a number of Pillow's filters, 0 to {_MAX_FILTER}",
        ),
        "rescale_factor": (lambda value: _is_number(value) and value > 0, "must be a number above 0"),
        "image_mean": (_are_three_numbers, "must be three numbers"),
        "image_std": (
            lambda value: _are_three_numbers(value) and min(value) > 0,
            "must be three numbers above 0, by which channels are divided",
        ),
        "size": (_is_size, "must be a number of pixels, or an object of them"),
        "crop_size": (_is_size, "must be a number of pixels, or an object of them"),
    }
    for name, (holds, what) in rules.items():
        if name in values and not holds(values[name]):
            raise ConfigError(f"{file}: {name} = {values[name]!r} {what}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_three_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_size(value: Any) -> bool:
    if value is None:  # transformers writes what a processor does not use
        return True
    sides = value.values() if isinstance(value, dict) else [value]
    return all(type(side) is int and side > 0 for side in sides)


def _sides(value: Any) -> dict[str, int]:
    """A size of a preprocessor_config.json, which older ones have as a number."""
    if isinstance(value, int):
        return {"shortest_edge": value, "height": value, "width": value}
    return dict(value) if isinstance(value, dict) else {}
