"""The cache of document indices: built once, rebuilt when the file changes, safe for concurrent processes."""

import multiprocessing
import os
import time

import numpy as np
import pytest

from internlm.data.documents import document_index, index_cache
from internlm.data.documents.document_index import DocumentIndex, summarize
from internlm.data.documents.index_cache import CACHE_FOLDER
from internlm.data.permutation import permute
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import DataError


def write(path, lengths):
    path.unlink(missing_ok=True)
    with TokenizedWriter(path) as writer:
        for length in lengths:
            writer.write([1] * length)
    return path


def positions(path, min_length=0, count_documents=False):
    """(document, token) of each position, by `locate` of one position at a time."""
    file = TokenizedFile(path)
    index = DocumentIndex(file, min_length, count_documents)
    summary = summarize(file, min_length)
    total = summary.kept_documents if count_documents else summary.kept_tokens
    found = [index.locate(position, position + 1) for position in range(total)]
    assert all(len(documents) == 1 for documents, _ in found)
    return [(int(documents[0]), position - int(starts[0])) for position, (documents, starts) in enumerate(found)]


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_every_position_is_found(tmp_path, monkeypatch, block):
    monkeypatch.setattr(document_index, "_BLOCK", block)
    lengths = [3, 0, 5, 1, 0, 2, 7]
    path = write(tmp_path / "a.bin", lengths)
    order = permute(np.arange(7), 7, 1024).tolist()
    assert positions(path) == [(document, token) for document in order for token in range(lengths[document])]
    assert positions(path, min_length=3) == [(d, t) for d in order if lengths[d] >= 3 for t in range(lengths[d])]
    assert positions(path, count_documents=True) == [(document, 0) for document in order if lengths[document]]


def test_cache_is_used_and_renewed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.bin", [3, 4])
    before = positions(path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / CACHE_FOLDER).iterdir()}
    assert len(files) == 2

    def fail(*_):
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        patch.setattr(index_cache, "store", fail)
        assert positions(path) == before
    write(path, [4, 3])
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1))
    assert sorted(positions(path)) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]


def test_read_only_data_goes_to_the_users_cache(tmp_path, monkeypatch):
    path = write(tmp_path / "data" / "a.bin", [3, 4])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data" / CACHE_FOLDER).write_text("a file where the folder should be: not writable, even for root")
    assert len(positions(path)) == 7
    assert len(list((tmp_path / "cache").rglob("a-*"))) == 2
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="Set XDG_CACHE_HOME to a writable folder"):
        summarize(TokenizedFile(path), 0)


def _build(path, results):
    results.put(positions(path))


def test_processes_that_build_at_once_agree(tmp_path):
    path = write(tmp_path / "a.bin", list(range(40)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_build, args=(path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert all(each == found[0] for each in found) and len(found[0]) == sum(range(40))
    assert not [file for file in (tmp_path / CACHE_FOLDER).iterdir() if file.name.startswith(".tmp")]
