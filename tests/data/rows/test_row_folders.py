"""The files of a folder, against those that `datasets.load_dataset` reads from the same folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.data_files import get_data_patterns

from internlm.data.rows.dataset_layout import default_splits, match
from internlm.data.rows.open_rows import open_row_files
from internlm.data.rows.row_folders import find_row_files
from internlm.utils.errors import DataError


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


def folder_of(root: Path, names: list[str], card: str | None = None) -> Path:
    """A folder of files whose rows tell their file and number."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{name} {number}"} for number in range(3)]
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        elif name.endswith(".arrow"):
            table = pyarrow.Table.from_pylist(rows)
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        elif name.endswith((".jsonl", ".txt")):
            path.write_text("".join((json.dumps(row) if "jsonl" in name else row["text"]) + "\n" for row in rows))
        else:
            path.write_text("no rows")
    if card is not None:
        (root / "README.md").write_text(f"---\nlicense: mit\n{card}---\n# A dataset\n")
    return root


def texts(found: Any) -> list[str]:
    files = open_row_files([file.path for file in found.files], ["text"], "line")
    return [file.read(row)["text"] for file in files for row in range(len(file))]


def load(tmp_path: Path, root: Path, subset: str | None, split: str) -> list[str]:
    loaded = datasets.load_dataset(str(root), subset, split=split, cache_dir=str(tmp_path / "hf_cache"))
    return list(loaded["text"])


CARD_OF_SPLITS = """configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: ["data/valid-0*", "more/*.parquet"]
"""
CARD_OF_SUBSETS = """configs:
- config_name: zh
  data_files: zh/*.jsonl
- config_name: en
  default: true
  data_files: [en/**, "other/[ab]?.jsonl"]
- config_name: dir
  data_dir: dir
"""
SUBSETS = [
    "zh/1.jsonl",
    "zh/0.jsonl",
    "en/x/0.jsonl",
    "en/1.jsonl",
    "other/a1.jsonl",
    "other/c1.jsonl",
    "dir/train/3.jsonl",
]

CASES: dict[str, tuple[list[str], str | None, str | None, str]] = {
    "shards": (
        [f"data/train-0000{n}-of-00002-ab12.parquet" for n in (1, 0)]
        + ["data/test-00000-of-00001.parquet", "Tiny-train.txt", "Tiny-valid.txt", "all.tar.gz"],
        None, None, "train",
    ),
    "other split": (["data/random-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"], None, None, "random"),
    "words in names": (["train.jsonl", "wiki_train_2.jsonl", "sub/training-1.jsonl", "val.jsonl"], None, None, "train"),
    "validation words": (["train.jsonl", "val.jsonl", "my-dev.jsonl", "x.valid.jsonl"], None, None, "validation"),
    "words in folders": (["train/b.parquet", "train/a.parquet", "test/c.parquet", "readme.txt"], None, None, "train"),
    "no words": (["b.txt", "a.txt", "a-b/z.txt", "a/z.txt"], None, None, "train"),
    "most files of a format": (["1.jsonl", "2.json", "3.jsonl", "a.parquet", "b.txt", "c.txt"], None, None, "train"),
    "parquet preferred": (["1.jsonl", "2.parquet"], None, None, "train"),
    "arrow": (["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"], None, None, "train"),
    "hidden": ([".hidden/a.jsonl", "__pycache__/a.jsonl", "a.jsonl", ".b.jsonl"], None, None, "train"),
    "card": (
        [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
        + ["data/valid-0.parquet", "more/1.parquet", "data/extra.parquet"],
        CARD_OF_SPLITS, None, "validation",
    ),
    "card train": (
        [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)] + ["data/valid-0.parquet", "more/1.parquet"],
        CARD_OF_SPLITS, None, "train",
    ),
    "default subset": (SUBSETS, CARD_OF_SUBSETS, None, "train"),
    "subset": (SUBSETS, CARD_OF_SUBSETS, "zh", "train"),
    "subset with data_dir": (SUBSETS, CARD_OF_SUBSETS, "dir", "train"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_rows_as_load_dataset(tmp_path: Path, name: str) -> None:
    names, card, subset, split = CASES[name]
    root = folder_of(tmp_path / "set", names, card)
    found = texts(find_row_files(root, subset, split))
    assert found
    assert found == load(tmp_path, root, subset, split)


def test_default_patterns_are_those_of_datasets(tmp_path: Path) -> None:
    names = ["train", "training", "pretrain", "my train", "trainset", "a.train.b", "TRAIN", "xvalx", "eval", "dev"]
    for word in names:
        for layout in (f"{word}/a.txt", f"{word}_x/y/a.txt", f"{word}.txt", f"q/w-{word}-e.txt", f"{word}0.txt"):
            root = folder_of(tmp_path / layout.replace("/", "+"), [layout, "zzz/other.txt"])
            expected = get_data_patterns(str(root))
            assert default_splits([layout, "zzz/other.txt"]).keys() == expected.keys(), layout


def test_glob_patterns() -> None:
    names = ["a.txt", "d/a.txt", "d/e/b.txt", "d/e/x1.txt", "d.e"]
    assert match("*.txt", names) == ["a.txt"]
    assert match("**/*.txt", names) == names[:4]
    assert match("d/**", names) == names[1:4]
    assert match("**/x[0-9].txt", names) == ["d/e/x1.txt"]
    assert match("**/x[!0-9].txt", names) == []
    assert match("d/?.txt", names) == ["d/a.txt"]
    assert match("d.e", [*names, "dxe"]) == ["d.e"]


def test_saved_folders(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(100)]})
    shuffled = rows.shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(find_row_files(tmp_path / "one")) == list(datasets.load_from_disk(tmp_path / "one")["text"])
    both = datasets.DatasetDict({"train": shuffled, "test": rows.select(range(7))})
    both.save_to_disk(tmp_path / "both")
    for split in both:
        assert texts(find_row_files(tmp_path / "both", split=split)) == list(both[split]["text"])
    with pytest.raises(
        DataError, match=r"no split 'validation'; the folder has 'train' \(1 files\), 'test' \(1 files\)"
    ):
        find_row_files(tmp_path / "both", split="validation")
    (tmp_path / "one/data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"names data-00001-of-00003.arrow, which is missing"):
        find_row_files(tmp_path / "one")
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(DataError, match=r"state.json: not written by save_to_disk"):
        find_row_files(tmp_path / "one")


def test_type_folders(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ["en/b.jsonl", "en/x/a.jsonl", "code/a.jsonl", "zh/notes.md"])
    found = find_row_files(root)
    assert found.types == ["code", "en", "zh"]
    assert [(file.path.relative_to(root).as_posix(), file.type_id) for file in found.files] == [
        ("code/a.jsonl", 0),
        ("en/b.jsonl", 1),
        ("en/x/a.jsonl", 1),
    ]
    assert find_row_files(root, "en").types == ["en"]
    with pytest.raises(DataError, match=r"no subset 'eng'.*\['code', 'en', 'zh'\].*Did you mean 'en'"):
        find_row_files(root, "eng")
    assert find_row_files(folder_of(tmp_path / "hub", ["data/train-00000-of-00001.parquet"])).types == ["hub"]
    assert find_row_files(folder_of(tmp_path / "splits", ["train/a.jsonl", "test/a.jsonl"])).types == ["splits"]


def test_formats_are_chosen_by_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of(tmp_path / "set", ["en/a.jsonl", "en/b.json", "code/a.parquet", "code/b.parquet", "code/a.txt"])
    with caplog.at_level(logging.INFO, "internlm"):
        found = find_row_files(root)
    assert [(file.path.relative_to(root).as_posix(), file.type_id) for file in found.files] == [
        ("code/a.parquet", 0),
        ("code/b.parquet", 0),
        ("en/a.jsonl", 1),
        ("en/b.json", 1),
    ]
    assert "split 'train' is 4 json and parquet files" in caplog.text
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "also has files of other formats, which are not read: code/a.txt" in warning


def test_linked_files_are_read(tmp_path: Path) -> None:
    folder_of(tmp_path / "blobs", ["0.parquet"])
    data = tmp_path / "snapshot/data"
    data.mkdir(parents=True)
    (data / "train-00000-of-00001.parquet").symlink_to(tmp_path / "blobs/0.parquet")
    (data / "loop").symlink_to(tmp_path / "snapshot")
    found = find_row_files(tmp_path / "snapshot")
    assert [file.path.name for file in found.files] == ["train-00000-of-00001.parquet"]
    assert len(texts(found)) == 3


def test_what_is_taken_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of(tmp_path / "set", ["train.jsonl", "test.jsonl", "a.csv", "dataset_info.json"], "license2: x\n")
    with caplog.at_level(logging.INFO, "internlm"):
        found = find_row_files(root)
    assert [record.message for record in caplog.records] == [
        f"{root}: split 'train' is 1 json file: train.jsonl; ignoring 2 other files: a.csv, test.jsonl"
    ]
    assert [path.name for path in found.ignored] == ["a.csv", "test.jsonl"]


def test_incomplete_downloads_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of(tmp_path / "set", ["data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"])
    find_row_files(root)
    assert "incomplete, and what is missing is not read: data/train has 2 of 3 shards" in caplog.text
    caplog.clear()
    names = ["data/train-00000-of-00001.parquet", "data/valid-0.parquet"]
    find_row_files(folder_of(tmp_path / "other", names, CARD_OF_SPLITS), split="validation")
    assert "no file matches 'more/*.parquet' of README.md" in caplog.text


def test_errors_tell_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_row_files(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file of rows .*; it is empty"):
        find_row_files(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no file of rows .*; it has a.csv"):
        find_row_files(folder_of(tmp_path / "csv", ["a.csv"]))
    root = folder_of(tmp_path / "set", SUBSETS, CARD_OF_SUBSETS.replace("  default: true\n", ""))
    with pytest.raises(
        DataError, match=r"3 subsets and no single default: set data.subset_name to one of 'zh', 'en', 'dir'"
    ):
        find_row_files(root)
    with pytest.raises(DataError, match=r"no subset 'fr' in the configs of README.md; data.subset_name is one of 'zh'"):
        find_row_files(root, "fr")
    (root / "zh").rename(root / "moved")
    with pytest.raises(DataError, match=r"no file matches 'zh/\*.jsonl', which README.md names for this subset"):
        find_row_files(root, "zh")
    (root / "moved").rename(root / "zh")
    with pytest.raises(DataError, match=r"no split 'test'; the folder has 'train' \(2 files\)"):
        find_row_files(root, "zh", "test")
    for card, problem in {
        "configs: [\n": "is not YAML",
        "configs: 3\n": "'configs' is not a list",
        "configs:\n- config_name: a\n  data_files: [{path: 1}]\n": "data_files has",
    }.items():
        with pytest.raises(DataError, match=problem):
            find_row_files(folder_of(tmp_path / "card", ["a.jsonl"], card))


def test_a_single_file(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ["a.jsonl", "b.jsonl"])
    found = find_row_files(root / "a.jsonl")
    assert [file.path.name for file in found.files] == ["a.jsonl"]
    assert found.types == ["a.jsonl"]
