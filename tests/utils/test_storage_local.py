"""Files on local disks, and in memory, by the same calls as in a store."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.forked import run_forked

from internlm.utils.errors import MissingFileError, StorageError, UserError
from internlm.utils.storage import StoragePath, storage_path


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """An empty folder on disk, and one in memory."""
    return storage_path(tmp_path / "folder" if request.param == "local" else f"memory://{uuid4()}")


def test_what_is_written_is_read_back(folder: StoragePath) -> None:
    folder.make_folder()
    data = os.urandom(3_000_000)
    (folder / "file").write_bytes(data)
    assert (folder / "file").read_bytes() == data
    assert (folder / "file").size() == len(data)
    (folder / "file").write_text("größer")
    assert (folder / "file").read_text() == "größer"


def test_a_file_is_read_from_any_place(folder: StoragePath) -> None:
    folder.make_folder()
    data = os.urandom(10_000)
    (folder / "file").write_bytes(data)
    with (folder / "file").open_read() as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
        assert file.read(1) == b""
        file.seek(5000)
        assert file.read(10) == data[5000:5010]
        file.seek(10, os.SEEK_CUR)
        assert (file.tell(), file.read(5)) == (5020, data[5020:5025])
        with pytest.raises((OSError, ValueError)):
            file.seek(-1)


def test_files_and_folders_are_told_apart(folder: StoragePath) -> None:
    (folder / "a/b").make_folder()
    (folder / "a/b/file").write_text("x")
    (folder / "a/c").write_text("x")
    assert (folder / "a").names() == ["b", "c"]
    assert (folder / "absent").names() == []
    assert (folder / "a/b").is_folder() and not (folder / "a/b").is_file()
    assert (folder / "a/c").is_file() and not (folder / "a/c").is_folder()
    assert not (folder / "a/absent").exists()
    (folder / "a").remove()
    assert not (folder / "a").exists()
    (folder / "a").remove()


def test_an_exception_or_abort_leaves_nothing(folder: StoragePath) -> None:
    folder.make_folder()
    with pytest.raises(ZeroDivisionError), (folder / "file").open_write() as file:
        file.write(b"half")
        raise ZeroDivisionError
    file = (folder / "other").open_write()
    file.write(b"x" * 3_000_000)
    file.abort()
    forgotten = (folder / "forgotten").open_write()
    forgotten.write(b"half")
    del forgotten
    assert folder.names() == []


def test_abort_after_close_does_nothing(folder: StoragePath) -> None:
    folder.make_folder()
    file = (folder / "file").open_write()
    file.write(b"all")
    file.close()
    file.abort()
    assert (folder / "file").read_text() == "all"


def test_a_missing_file_is_named(folder: StoragePath) -> None:
    folder.make_folder()
    with pytest.raises(MissingFileError, match=f"cannot read '{folder}/absent'.*check the spelling"):
        (folder / "absent").read_bytes()
    # So that code that knows files alone understands it.
    assert issubclass(MissingFileError, FileNotFoundError) and issubclass(StorageError, (UserError, OSError))


def test_an_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(StorageError("cannot write 'x': full; free space")))
    assert str(error) == "cannot write 'x': full; free space"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to("/dev/full")
    for size in (10, 10_000_000):
        with pytest.raises(StorageError, match=f"cannot write '{tmp_path}/file': no space left on device; free space"):
            storage_path(tmp_path / "file").write_bytes(b"x" * size)
        if not (tmp_path / "file").is_symlink():
            (tmp_path / "file").symlink_to("/dev/full")


def test_a_disk_that_fails_at_the_last_moment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=f"cannot write '{tmp_path}/file': input/output error; the disk is failing"):
        storage_path(tmp_path / "file").write_bytes(b"x")
    assert not (tmp_path / "file").exists()


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / "folder").mkdir(mode=0o500)
        if os.geteuid() == 0:
            # To root all is permitted.
            os.setuid(65534)
        folder = storage_path(tmp_path / "folder")
        for use in (lambda: (folder / "file").write_text("x"), (folder / "sub").make_folder):
            with pytest.raises(StorageError, match=f"'{folder}/.*': permission denied; ask for permission"):
                use()

    run_forked(tmp_path, write)


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = storage_path(tmp_path / "file")
    with pytest.raises(StorageError, match=f"cannot make '{path}': file exists; there is a file where a folder"):
        path.make_folder()
    with pytest.raises(StorageError, match=f"cannot make '{path}/sub': not a directory; a part of this path is a file"):
        (path / "sub").make_folder()
    with pytest.raises(StorageError, match=f"cannot write '{path}/sub': not a directory"):
        (path / "sub").write_text("x")
    with pytest.raises(StorageError, match=f"cannot list '{path}'"):
        path.names()
    with pytest.raises(
        StorageError, match=f"cannot write '{tmp_path}': is a directory; there is a folder where a file"
    ):
        storage_path(tmp_path).write_text("x")


def test_a_rename_replaces_a_file_and_takes_a_folder_with_it(tmp_path: Path) -> None:
    root = storage_path(tmp_path)
    (root / "new/sub").make_folder()
    (root / "new/sub/file").write_text("x")
    (root / "new").rename_to(root / "1")
    assert root.names() == ["1"] and (root / "1/sub/file").read_text() == "x"
    (root / "a").write_text("a")
    (root / "b").write_text("b")
    (root / "a").rename_to(root / "b")
    assert (root / "b").read_text() == "a" and not (root / "a").exists()
    with pytest.raises(StorageError, match=f"cannot rename to '{root}/1' '{root}/b'"):
        (root / "b").rename_to(root / "1")


def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    (tmp_path / "link").symlink_to("folder")
    storage_path(tmp_path / "link").remove()
    assert sorted(os.listdir(tmp_path)) == ["folder"] and (tmp_path / "folder/file").exists()


def test_a_local_file_is_a_plain_file(tmp_path: Path) -> None:
    path = storage_path(tmp_path / "file")
    with path.open_write() as file:
        assert os.fstat(file.fileno()).st_ino == path.local.stat().st_ino
        file.write(b"abc")
    with path.open_read() as file:
        assert os.pread(file.fileno(), 3, 0) == b"abc"


def test_a_path_is_used_in_another_process(tmp_path: Path) -> None:
    path = storage_path(tmp_path / "file")
    process = multiprocessing.get_context("spawn").Process(target=path.write_text, args=("from there",))
    process.start()
    process.join(60)
    assert path.read_text() == "from there"


def test_local_files_need_no_library_of_a_store(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from internlm.utils.storage import storage_path\n"
        f"storage_path({str(tmp_path)!r} + '/file').write_text('x')\n"
        "print(sorted({'boto3', 'botocore', 'fsspec', 'urllib3', 'torch'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
