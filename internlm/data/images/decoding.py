"""Decodes pictures to 8-bit RGB.

What each kind of picture becomes is decided here: doc/multimodal.md lists it. The first frame of an animation; EXIF
orientation applied; alpha composited over white; 16 bits reduced to 8 by their high byte; everything else by Pillow.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from internlm.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_478_485
"""Pixels of the largest picture: a quarter of a gibibyte in RGB, the bound above which Pillow warns."""

_WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def check_pillow() -> None:
    """Check that Pillow is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"data.is_multimodal = True needs Pillow, which decodes pictures ({error}): pip install pillow"
        ) from error


def decode_image(data: bytes, name: str, document: str) -> Image:
    """Decode a picture to mode RGB.

    Args:
        data: the encoded picture, in any format that Pillow reads.
        name: of the picture, for messages.
        document: that has it, for messages.

    Raises:
        DataError: the picture is empty, damaged, too large, or of no known format.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    of = f"it is a picture of {document}"
    fix = "copy it again, or remove the document"
    if not data:
        raise DataError(f"{name}: the file is empty; {of}; {fix}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(f"{image.width:,} x {image.height:,} pixels", name, of)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), name, of)
    except Image.DecompressionBombError as error:
        raise _too_large(f"too many pixels ({error})", name, of) from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: no format of pictures that Pillow reads; {of}; {fix}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        # Pillow raises any of these for damaged files.
        raise DataError(f"{name}: the picture is damaged ({error}); {of}; {fix}") from error


def _too_large(size: str, name: str, of: str) -> DataError:
    return DataError(f"{name} has {size}, and at most {MAX_PIXELS:,} are decoded; {of}; store a smaller copy")


def _to_rgb(image: Any, name: str, of: str) -> Image:
    from PIL import Image

    if image.mode in _WIDE_MODES:
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise DataError(
                f"{name}: gray values in [{values.min()}, {values.max()}], not of 16 bits; {of}; convert it"
            )
        image = Image.fromarray((values // 256).astype(np.uint8))
    elif image.mode == "F":
        raise DataError(f"{name}: gray values are floating-point numbers, whose white is not known; {of}; convert it")
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors)
    rgb: Image.Image = image.convert("RGB")
    return rgb
