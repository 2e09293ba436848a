"""Folders of data of every type, and copies of them in an object store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from helpers.s3 import Bucket
from internlm.data.documents.document_file import FileFormat
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.token_arrays.writer import ArrayWriter
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.writer import TokenizedWriter

EOS = 999
FORMATS: dict[str, FileFormat] = {
    "tokenized": TOKENIZED,
    "megatron": MEGATRON,
    "arrays": ArrayFormat("uint16", EOS),
    "npy": ArrayFormat(None, EOS),
    "ds": ArrayFormat("uint16"),
}
NAMES = ("cn/a", "en/b", "en/c", "en/d")


def documents(seed: int, count: int = 60) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[*random.integers(1, 900, random.integers(2, 40)).tolist(), EOS] for _ in range(count)]


def write_file(path: Path, format: str, content: list[list[int]]) -> None:
    """Write documents in a format of `FORMATS` to `path`, without its suffix, in place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{path.name}.*"):
        old.unlink()
    if format == "tokenized":
        with TokenizedWriter(path.with_suffix(".bin")) as tokenized:
            for document in content:
                tokenized.write(document)
    elif format == "megatron":
        with MegatronWriter(path.with_suffix(".bin"), np.dtype(np.uint16)) as megatron:
            for document in content:
                megatron.write(np.array(document))
    elif format == "ds":
        with ArrayWriter(path.with_suffix(".ds"), np.dtype(np.uint16)) as arrays:
            for document in content:
                arrays.write(np.array(document))
    else:
        flat = np.array([token for document in content for token in document], dtype=np.uint16)
        if format == "npy":
            np.save(path.with_suffix(".npy"), flat)
        else:
            flat.tofile(path.with_suffix(".bin"))


def write_folder(root: Path, format: str) -> Path:
    """A train folder with two types."""
    for seed, name in enumerate(NAMES):
        write_file(root / name, format, documents(seed))
    return root


def write_rows(root: Path) -> list[dict[str, Any]]:
    """A folder of rows, which it returns, in one file of each format."""
    rows = [{"text": f"text {number} " + "x" * (number % 50), "number": number} for number in range(200)]
    root.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, root / "rows.parquet", row_group_size=40)
    with pyarrow.OSFile(str(root / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=40)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rows.json").write_text(json.dumps(rows))
    return rows


def upload(folder: Path, bucket: Bucket, prefix: str) -> str:
    """Copy a folder to a bucket; returns its URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".index_cache" not in path.parts:
            bucket.client.put_object(
                Bucket=bucket.name, Key=f"{prefix}/{path.relative_to(folder).as_posix()}", Body=path.read_bytes()
            )
    return f"{bucket.url}/{prefix}"
