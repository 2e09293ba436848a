"""The frame around every command: its streams, and messages instead of tracebacks for user errors."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

from internlm.utils.errors import user_message

BROKEN_PIPE = 128 + signal.SIGPIPE
"""Exit code of a command whose output pipe was closed, as a shell reports it for any program."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def run_command(work: Callable[[], int]) -> int:
    """Run a command.

    Escapes characters that the encoding of a stream lacks. A closed output pipe, as with `head`, ends the command
    silently.

    Args:
        work: returns the exit code. A SystemExit of argparse propagates.

    Returns:
        The exit code: that of `work`; 2 after a user error, which is printed in one line; 130 after an interrupt; 141
        after a closed output pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return work()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return _print_error("interrupted", 130)
    except BrokenPipeError:
        # A pipe to one of our own processes may break, too: a defect, or the end of that process.
        if not (_has_no_reader(sys.stdout) or _has_no_reader(sys.stderr)):
            raise
        return BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _NO_SPACE:
            _discard(sys.stdout)
            return _print_error(f"error: the output cannot be written: {error.strerror}", 2)
        message = user_message(error)
        if message is None:
            raise
        return _print_error(f"error: {message}", 2)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if _has_no_reader(stream):
                _discard(stream)


def _print_error(text: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
    return code


def _has_no_reader(stream: Any) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, or one without a file descriptor
        return False


def _discard(stream: Any) -> None:
    """Drop the buffered output, so that the interpreter does not fail to flush it at exit."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
