"""A folder or file of another type than the config says is refused with the type that reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.data_folders import FORMATS, documents, write_file

from internlm.data.documents.folders import find_train_files, find_valid_sets
from internlm.data.rows.row_folders import find_row_files
from internlm.utils.errors import DataError


@pytest.mark.parametrize("name", ["a.jsonl", "en/a.parquet", "en/b.txt.gz", "data/train.arrow"])
@pytest.mark.parametrize("type_name", ["tokenized", "megatron", "arrays"])
def test_rows_are_for_streaming(tmp_path: Path, name: str, type_name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    for find in (find_train_files, find_valid_sets):
        with pytest.raises(
            DataError, match=r"data\.type = 'streaming', or tokenize them: internlm data tokenize"
        ) as caught:
            find(tmp_path, FORMATS[type_name])
        assert f"It has {name}, text or rows" in str(caught.value)
        with pytest.raises(DataError, match=r"It is text or rows: train on it with data\.type = 'streaming'"):
            find(tmp_path / name, FORMATS[type_name])


def test_arrays_are_told_from_tokenized_files(tmp_path: Path) -> None:
    write_file(tmp_path / "en" / "a", "npy", documents(0))
    with pytest.raises(DataError, match=r"It has en/a\.npy, an array of token ids: set data.type = 'arrays'"):
        find_train_files(tmp_path, FORMATS["tokenized"])


@pytest.mark.parametrize("type_name", ["tokenized", "megatron", "arrays"])
def test_token_ids_are_no_rows(tmp_path: Path, type_name: str) -> None:
    write_file(tmp_path / "en" / "a", type_name, documents(0))
    file = next((tmp_path / "en").glob("a.bin"))
    file.with_name(file.name + ".tokenizer.json").write_text(json.dumps({"tokenizer": "x"}))
    for place in (tmp_path, tmp_path / "en", file, file.with_name(file.name + ".tokenizer.json")):
        with pytest.raises(DataError, match=rf"no.* file of rows .*(data.type = '{type_name}'|name .*a\.bin)"):
            find_row_files(place)
    # Beside rows, they are ignored.
    (tmp_path / "en" / "b.jsonl").write_text('{"text": "a"}')
    assert [each.path.name for each in find_row_files(tmp_path).files] == ["b.jsonl"]


def test_writers_take_texts(tmp_path: Path) -> None:
    from internlm.data.megatron_files.writer import MegatronWriter
    from internlm.data.token_arrays.writer import ArrayWriter

    with MegatronWriter(str(tmp_path / "a.bin"), np.dtype(np.uint16)) as megatron:
        megatron.write([1])
    with ArrayWriter(str(tmp_path / "a.ds"), np.dtype(np.uint16)) as arrays:
        arrays.write(np.array([1]))
    assert (tmp_path / "a.idx").is_file() and (tmp_path / "a.ds.index").is_file()
