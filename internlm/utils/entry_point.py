"""What surrounds every command: its streams, and errors for people instead of tracebacks."""

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
"""Exit code of a command whose reader has gone, as a shell shows it for any program."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def run_command(work: Callable[[], int]) -> int:
    """Do the work of a command line.

    Characters that a stream's encoding lacks are written as escapes. A reader that has had enough, such as `head`, ends
    the command without a word.

    Args:
        work: returns the exit code. A SystemExit of argparse passes through.

    Returns:
        Its code; 2 after a mistake of the user, told in one line; 130 when interrupted; 141 for a reader that has gone.
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
        return _tell("interrupted", 130)
    except BrokenPipeError:
        # A pipe to another process of ours may break, too; that is a defect, or the end of that process.
        if not (_has_no_reader(sys.stdout) or _has_no_reader(sys.stderr)):
            raise
        return BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _NO_SPACE:
            _discard(sys.stdout)
            return _tell(f"error: the output cannot be written: {error.strerror}", 2)
        message = user_message(error)
        if message is None:
            raise
        return _tell(f"error: {message}", 2)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if _has_no_reader(stream):
                _discard(stream)


def _tell(text: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
    return code


def _has_no_reader(stream: Any) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, or none of the operating system
        return False


def _discard(stream: Any) -> None:
    """What is still in the buffer goes nowhere, so that the interpreter does not fail over it at its end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
