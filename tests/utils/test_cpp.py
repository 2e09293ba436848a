"""Compiling C++: once, whole or not at all, and with a reason where it fails."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from internlm.utils import cpp_extension as cpp
from internlm.utils.cpp_extension import CompileError, compile_library, cpp_compiler


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _source(folder: Path, text: str = 'extern "C" int answer() { return NUMBER + 0 * ZERO; }') -> Path:
    path = folder / "answer"
    path.mkdir(exist_ok=True)
    (path / "answer.cpp").write_text('#include "zero.h"\n' + text, encoding="utf-8")
    (path / "zero.h").write_text("#define ZERO 0", encoding="utf-8")
    return path


def test_compiled_once_for_source_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)
    library = compile_library(source, ("-DNUMBER=41",))
    assert ctypes.CDLL(str(library)).answer() == 41
    other = compile_library(source, ("-DNUMBER=42",))
    assert ctypes.CDLL(str(other)).answer() == 42
    monkeypatch.setattr(cpp, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_library(source, ("-DNUMBER=41",)) == library
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".lock", ".lock", ".so", ".so"]


def test_a_wrong_source_is_told_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CompileError, match=r"ended with code 1: .*answer.cpp:2:\d+: error: .*answr"):
        compile_library(_source(tmp_path, "int x = answr;"), ())
    assert [path.suffix for path in (cache / "internlm" / "native").iterdir()] == [".lock"]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpp_compiler() is None
    with pytest.raises(CompileError, match=r"no C\+\+ compiler was found \(no-such-compiler\)"):
        compile_library(_source(tmp_path), ())
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match=r"\(g\+\+ or clang\+\+\)"):
        compile_library(_source(tmp_path), ())


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file", encoding="utf-8")
    with pytest.raises(
        CompileError, match=r"cache/internlm/native/answer.*Not a directory; XDG_CACHE_HOME names another"
    ):
        compile_library(_source(tmp_path), ("-DNUMBER=1",))


def test_a_library_that_is_there_needs_no_writable_cache(tmp_path: Path) -> None:
    source = _source(tmp_path)
    library = compile_library(source, ("-DNUMBER=1",))
    # As good as read-only, also for root: the lock cannot be opened for writing.
    library.with_suffix(".lock").unlink()
    library.with_suffix(".lock").mkdir()
    assert compile_library(source, ("-DNUMBER=1",)) == library


def _hold(lock: Path, held: multiprocessing.synchronize.Event) -> None:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held.set()
        signal.pause()


def test_a_killed_process_keeps_nobody_waiting(tmp_path: Path) -> None:
    source = _source(tmp_path)
    library = compile_library(source, ("-DNUMBER=7",))
    library.unlink()
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(library.with_suffix(".lock"), held))
    process.start()
    assert held.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert compile_library(source, ("-DNUMBER=7",)) == library
