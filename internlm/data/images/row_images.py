"""The pictures of a row: paths relative to the image folder, or bytes, in a column of the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.data.images.image_source import ImageCell, ImageFile, bytes_of, image_file, images_of_cell
from internlm.data.images.settings import IMAGE_COLUMNS, IMAGE_MARKER, ImageSettings
from internlm.utils.errors import DataError


def images_of_row(
    values: Mapping[str, Any],
    ids: Sequence[int] | NDArray[np.int64],
    settings: ImageSettings,
    file: Path,
    row: int,
    document: str,
) -> list[ImageFile | ImageCell]:
    """The pictures of a row; a row may have none.

    A column has a picture or a list of pictures, each a path, bytes, or the struct {bytes, path} of `datasets`.

    Args:
        values: of the row, by column.
        ids: of the row.
        settings: of the pictures.
        file, row: the file and the number of the row.
        document: file and position, for messages.

    Raises:
        DataError: both default columns have pictures, a picture is neither a path nor bytes, or there are more or fewer
            pictures than places for them.
    """
    column, folder = settings.column, settings.folder
    names = IMAGE_COLUMNS if column is None else (column,)
    found = {name: images for name in names if (images := images_of_cell(values.get(name)))}
    if len(found) > 1:
        raise DataError(f"{document} has pictures in {' and '.join(found)}: name one column with data.image_column")
    sources = [
        _image(image, name, index, folder, file, row, document)
        for name, images in found.items()
        for index, image in enumerate(images)
    ]
    num_places = int(np.count_nonzero(np.asarray(ids) == settings.token_id)) // settings.tokens_per_image
    if num_places and not sources:
        raise DataError(
            f"{document} has {num_places} '{IMAGE_MARKER}', and no picture in {' or '.join(map(repr, names))}; its "
            f"columns are {sorted(values)}. Name the one with pictures with data.image_column, or remove the document"
        )
    settings.check_count(np.asarray(ids), len(sources), document, f"'{IMAGE_MARKER}'")
    return sources


def _image(
    image: Any, column: str, index: int, folder: Path | None, file: Path, row: int, document: str
) -> ImageFile | ImageCell:
    data = bytes_of(image)
    if data is not None:
        return ImageCell(file, row, column, index, document, data)
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str):
        raise DataError(
            f"{document}: '{column}', picture {index} is {type(image).__name__}, neither a path, bytes nor "
            "{bytes, path}; name the column with the pictures with data.image_column"
        )
    return image_file(path, folder, document)
