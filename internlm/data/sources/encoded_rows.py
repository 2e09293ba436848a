"""Files of rows as tokenized files in the user's cache, made once: validation sets, which are read again and again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from internlm.data.images.image_source import to_json
from internlm.data.rows.row_file import RowFile
from internlm.data.sources.row_encoder import RowEncoder
from internlm.data.tokenized_files.writer import TokenizedWriter, encode_masked_line
from internlm.utils.errors import DataError
from internlm.utils.file_lock import locked_if_possible
from internlm.utils.logging import get_logger
from internlm.utils.user_cache import user_cache

_BATCH_ROWS = 256

logger = get_logger(__name__)


def encoded_sets(
    sets: Mapping[str, Sequence[RowFile]], encoder: RowEncoder, encoding: str, image_folder: Path | None = None
) -> Path:
    """A folder with a subfolder of tokenized files for each set; encoded by one process of a machine.

    Args:
        sets: name -> files.
        encoder: of rows.
        encoding: text that tells all that ids depend on besides the files.
        image_folder: that paths of pictures are relative to.

    Raises:
        DataError: a row cannot be read, or a set has no document.
    """
    versions = [
        (name, [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in file.inputs])
        for name, files in sets.items()
        for file in files
    ]
    folder = user_cache() / "encoded_rows" / hashlib.sha256(repr((versions, encoding)).encode()).hexdigest()[:24]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked_if_possible(folder.with_name(f".{folder.name}.lock"), "tokenizes the validation sets"):
        if not folder.is_dir():
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            for name, files in sets.items():
                _encode(temporary / name / "rows.bin", name, files, encoder, image_folder)
            temporary.rename(folder)
    return folder


def _encode(target: Path, name: str, files: Sequence[RowFile], encoder: RowEncoder, image_folder: Path | None) -> None:
    target.parent.mkdir(parents=True)
    num_documents = num_left_out = 0
    last_left_out = ""
    with TokenizedWriter(target) as writer:
        for file in files:
            for start in range(0, len(file), _BATCH_ROWS):
                rows = [(file, row) for row in range(start, min(start + _BATCH_ROWS, len(file)))]
                for each in encoder.encode(rows):
                    if each.error is not None:
                        raise each.error
                    if each.left_out is not None:
                        num_left_out += 1
                        last_left_out = each.left_out
                        continue
                    images = [to_json(image, image_folder) for image in each.images]
                    line = encode_masked_line(each.ids.tolist(), each.loss_mask.tolist(), images)
                    writer.write_line(line, len(each.ids))
                    num_documents += 1
    if num_documents == 0:
        raise DataError(f"{files[0].path}: no row of the validation set '{name}' has a token to evaluate")
    left_out = f"; {num_left_out:,} rows are left out, at last: {last_left_out}" if num_left_out else ""
    logger.info("validation set '%s': %s documents%s", name, f"{num_documents:,}", left_out)
