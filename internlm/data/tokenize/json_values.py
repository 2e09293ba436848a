"""Streams the values of JSON arrays and JSON lines in bounded memory.

Owns UTF-8 decoding and the boundaries of JSON values. Content after the end of an array is an error, never ignored.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internlm.data.tokenize.input_files import open_input
from internlm.utils.errors import DataError

_BLOCK = 1 << 20
_SPACE = " \t\r\n"
_LONGEST_LITERAL = 16
_GZIP = b"\x1f\x8b"


def decode_utf8(data: bytes, path: Path, offset: int) -> str:
    """Decode bytes at an offset of a file, without a byte order mark at its start.

    Raises:
        DataError: not UTF-8; names the byte.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start, error.reason) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def parse_line(line: bytes, path: Path, offset: int) -> Any:
    """Parse a line of a JSON lines file.

    Raises:
        DataError: not UTF-8, or not JSON; names the file and the byte.
    """
    try:
        return json.loads(decode_utf8(line, path, offset))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the line at byte {offset} is not JSON: {error}") from error


def iterate_json_lines(path: Path) -> Iterator[Any]:
    """Iterate over the values of a JSON lines file; blank lines are skipped.

    Raises:
        DataError: not UTF-8, or not JSON; names the file and the byte.
    """
    offset = 0
    with open_input(path) as file:
        for line in file:
            if not line.isspace():
                yield parse_line(line, path, offset)
            offset += len(line)


def iterate_json_array(path: Path) -> Iterator[Any]:
    """Iterate over the elements of a JSON array, or over values separated by white space in a file without an array.

    Raises:
        DataError: not UTF-8, not JSON, or content after the end of the array; names the file and the character.
    """
    with open_input(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield from _ValueReader(path, text)


class _ValueReader:
    """Parses values from a text that is read in blocks.

    `_state` is one of "start", "first" (a value or the end of the array), "next" (a comma or the end of the array),
    "value" (a value), "outside" (values without an array), "end" (after the array).
    """

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self._path, self._text = path, text
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._buffer_start = 0
        self._at_end = False
        self._state = "start"

    def __iter__(self) -> Iterator[Any]:
        while (character := self._next_character()) is not None:
            if self._state == "start" and character == "[":
                self._consume("first")
            elif self._state in ("first", "next") and character == "]":
                self._consume("end")
            elif self._state == "next":
                if character != ",":
                    raise self._error(f"',' or ']' is missing before {character!r}")
                self._consume("value")
            elif self._state == "end":
                raise self._error(
                    f"{character!r} after the ']' that ends the array. A .json file has one array: split "
                    "the file, or write one record a line and name it .jsonl"
                )
            elif self._state == "value" and character == "]":
                raise self._error("a value is missing between ',' and ']'; remove the comma")
            else:
                yield self._parse_value()
                self._state = "outside" if self._state in ("start", "outside") else "next"
        if self._state in ("first", "value", "next"):
            end = self._buffer_start + len(self._buffer)
            raise DataError(f"{self._path}: truncated: the array ends without ']' at character {end}")

    def _consume(self, state: str) -> None:
        self._position += 1
        self._state = state

    def _next_character(self) -> str | None:
        """Skip white space and return the character at the position, without consuming it; None at the end."""
        while True:
            while self._position < len(self._buffer):
                if self._buffer[self._position] not in _SPACE:
                    return self._buffer[self._position]
                self._position += 1
            if self._at_end:
                return None
            self._read_block()

    def _parse_value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except RecursionError as error:
                raise self._error("nested too deeply") from error
            except ValueError as error:
                at, message = getattr(error, "pos", self._position), getattr(error, "msg", str(error))
                # The value may continue in the next block.
                unfinished = at > len(self._buffer) - _LONGEST_LITERAL or message.startswith("Unterminated string")
                if not unfinished or self._at_end:
                    self._position = at
                    raise self._error(message) from error
            else:
                # A number at the end of the block may continue too: of 1. or 1e+ the decoder takes the 1.
                is_complete = end + _LONGEST_LITERAL <= len(self._buffer) or isinstance(value, str | list | dict)
                if self._at_end or is_complete:
                    self._position = end
                    return value
            self._read_block()

    def _read_block(self) -> None:
        self._buffer = self._buffer[self._position :]
        self._buffer_start += self._position
        self._position = 0
        try:
            # A value longer than a block is parsed again after each read; doubling the buffer bounds the work.
            block = self._text.read(max(_BLOCK, len(self._buffer)))
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, _first_bad_byte(self._path), error.reason) from error
        self._buffer += block
        self._at_end = not block

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self._path}: not JSON at character {self._buffer_start + self._position}: {problem}")


def _not_utf8(path: Path, offset: int, reason: str) -> DataError:
    with open_input(path) as file:
        beginning = file.read(2)
    if beginning == _GZIP:
        return DataError(f"{path}: compressed by gzip; rename it to end in .gz")
    encoding = "utf-16" if beginning in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
    return DataError(
        f"{path}: byte {offset} is not UTF-8 ({reason}). Convert the file first, for example: "
        f"iconv -f {encoding} -t utf-8"
    )


def _first_bad_byte(path: Path) -> int:
    """Find the offset of the first byte that is not UTF-8, in a file that has one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_input(path) as file:
        while block := file.read(_BLOCK):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return offset - pending + error.start
            offset += len(block)
    return offset - len(decoder.getstate()[0])
