"""Checks of folders before a run: what they find, and how much they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from internlm.data.documents import folder_checks
from internlm.data.documents.document_file import FileFormat
from internlm.data.documents.folder_checks import check_train_folder, check_valid_sets
from internlm.data.documents.folders import find_train_files, find_valid_sets, unread_files
from internlm.data.documents.valid_sets import folder_sets
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import DataError


def write(path: Path, documents: Sequence[Sequence[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with TokenizedWriter(path) as writer:
        for document in documents:
            writer.write(list(document))


def check_valid_folder(folder: Path, format: FileFormat, vocab_size: int) -> list[folder_checks.FolderCheck]:
    return check_valid_sets(folder_sets(folder, format), vocab_size)


def test_small_sets_are_read_whole(tmp_path: Path) -> None:
    write(tmp_path / "en" / "a.bin", [[1, 2, 3]] * 30 + [[-4, -5]])
    write(tmp_path / "en" / "b.bin", [[], [7], [8, 9]])
    write(tmp_path / "cn" / "c.bin", [[1, 2]])
    assert [str(checked) for checked in check_valid_folder(tmp_path, TOKENIZED, 10)] == [
        "validation set 'cn': 1 documents, 2 tokens, all read",
        "validation set 'en': 34 documents, 95 tokens, all read",
    ]
    assert check_train_folder(tmp_path, TOKENIZED, 10).num_read == 97
    for read in (check_valid_folder, check_train_folder):
        with pytest.raises(DataError, match=r"b\.bin: document 2 .* token 9 at position 1 is outside the vocabulary"):
            read(tmp_path, TOKENIZED, 9)


@pytest.mark.parametrize("documents", [[[-1, -2], [-3] * 40], [[5], [6]], [[5, -6], [], [7, -8, -9]]])
def test_a_set_without_labels_is_refused(tmp_path: Path, documents: list[list[int]]) -> None:
    write(tmp_path / "good" / "a.bin", [[1, 2]])
    write(tmp_path / "masked" / "a.bin", documents)
    with pytest.raises(DataError, match=r"validation set 'masked' .*: no token contributes loss"):
        check_valid_folder(tmp_path, TOKENIZED, 100)
    check_train_folder(tmp_path, TOKENIZED, 100)


def test_a_train_folder_without_labels_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "en" / "a.bin", [[-1, -2], [-3] * 40, [5]])
    with pytest.raises(DataError, match="no token contributes loss"):
        check_train_folder(tmp_path, TOKENIZED, 100)
    write(tmp_path / "cn" / "a.bin", [[-1, 2]])
    assert check_train_folder(tmp_path, TOKENIZED, 100).num_documents == 4


def test_of_large_sets_documents_of_all_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_checks, "MAX_TOKENS", 100)
    for name in "abc":
        write(tmp_path / f"{name}.bin", [[1] * 10] * 34)
    (checked,) = check_valid_folder(tmp_path, TOKENIZED, 10)
    # 1,020 tokens: every eleventh document.
    assert (checked.num_tokens, checked.num_read) == (1020, 100)
    assert str(checked).endswith("of which 100 were read, spread evenly over the documents")
    write(tmp_path / "c.bin", [[1] * 10] * 33 + [[1] * 9 + [99]])
    check_valid_folder(tmp_path, TOKENIZED, 10)
    # The 99th document of all, 31st of the last file, is one of those that are read.
    write(tmp_path / "c.bin", [[1] * 10] * 31 + [[99] * 10] + [[1] * 10] * 2)
    with pytest.raises(DataError, match=r"c\.bin: document 31 "):
        check_valid_folder(tmp_path, TOKENIZED, 10)


def test_of_large_sets_long_documents_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_checks, "MAX_TOKENS", 1000)
    monkeypatch.setattr(folder_checks, "MAX_TOKENS_PER_DOCUMENT", 50)
    write(tmp_path / "a.bin", [[1, 2] * 1000] * 4)
    (checked,) = check_valid_folder(tmp_path, TOKENIZED, 10)
    assert (checked.num_tokens, checked.num_read) == (8000, 50)


def test_a_label_anywhere_in_a_large_set_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_checks, "MAX_TOKENS", 20)
    write(tmp_path / "a.bin", [[-1] * 10] * 98 + [[-1, 2]])
    (checked,) = check_valid_folder(tmp_path, TOKENIZED, 10)
    assert checked.num_read < checked.num_tokens
    write(tmp_path / "a.bin", [[-1] * 10] * 99)
    with pytest.raises(DataError, match="no token contributes loss"):
        check_valid_folder(tmp_path, TOKENIZED, 10)


def test_a_link_to_a_folder_above_it_repeats_no_document(tmp_path: Path) -> None:
    write(tmp_path / "data" / "en" / "a.bin", [[1, 2, 3], [4, 5]])
    write(tmp_path / "elsewhere" / "b.bin", [[6, 7]])
    (tmp_path / "data" / "en" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "en" / "other").symlink_to(tmp_path / "elsewhere")
    files, _ = find_train_files(tmp_path / "data", TOKENIZED)
    names = [file.path.relative_to(tmp_path).as_posix() for file in files]
    assert names == ["data/en/a.bin", "data/en/other/b.bin"]
    assert [len(paths) for paths in find_valid_sets(tmp_path / "data", TOKENIZED).values()] == [1, 1]
    assert unread_files(tmp_path / "data", TOKENIZED) == []
