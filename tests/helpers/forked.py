"""Run a function in a fork of this process, so that what it registers, patches or changes ends with it."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120.0


def run_forked(folder: Path, function: Callable[..., None], *args: Any) -> str:
    """What `function(*args)` prints, called in a forked process whose working directory is `folder`.

    Raises:
        AssertionError: the function raised; the message has its traceback and what it printed before.
    """
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_serve, args=(folder, function, args, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(TIMEOUT_SECONDS), f"no answer in {TIMEOUT_SECONDS} s"
        failure, printed = ours.recv()
    except EOFError:
        failure, printed = "the process ended", ""
    finally:
        process.kill()
        process.join()
    assert failure is None, f"{printed}\n{failure}"
    return printed


def _serve(folder: Path, function: Callable[..., None], args: tuple[Any, ...], connection: Connection) -> None:
    os.chdir(folder)
    # The accelerator of the parent cannot be used after a fork.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    failure = None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            function(*args)
        except BaseException:
            failure = traceback.format_exc()
    connection.send((failure, printed.getvalue()))
