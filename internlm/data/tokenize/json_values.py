"""JSON arrays and JSON lines, one value at a time and without loading the file.

Owns UTF-8 and where JSON begins and ends: what is behind the end of an array is an error, never left out.
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
    """The text of bytes at an offset of a file; a byte order mark at its start is left out.

    Raises:
        DataError: not UTF-8; names the byte.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start, error.reason) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def parse_line(line: bytes, path: Path, offset: int) -> Any:
    """The value of a line of a JSON lines file.

    Raises:
        DataError: not UTF-8, or not JSON; names the file and the byte.
    """
    try:
        return json.loads(decode_utf8(line, path, offset))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the line at byte {offset} is not JSON: {error}") from error


def iterate_json_lines(path: Path) -> Iterator[Any]:
    """The values of a JSON lines file; blank lines are passed over.

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
    """The elements of a JSON array; of a file without an array, its values, which are parted by white space.

    Raises:
        DataError: not UTF-8, not JSON, or something behind the end of the array; names the file and the place.
    """
    with open_input(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield from _Values(path, text)


class _Values:
    """Reads values from a text in blocks; each is parsed once it is there as a whole.

    Attributes:
        place: "start", "value" (a value must follow), "first" (a value or the end of the array), "next" (a comma or the
            end of the array), "outside" (values without an array), "end" (behind the array).
    """

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self._path, self._text = path, text
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._before = 0
        self._at_end = False
        self._place = "start"

    def __iter__(self) -> Iterator[Any]:
        while (sign := self._next_sign()) is not None:
            if self._place == "start" and sign == "[":
                self._step("first")
            elif self._place in ("first", "next") and sign == "]":
                self._step("end")
            elif self._place == "next":
                if sign != ",":
                    raise self._mistake(f"',' or ']' is missing before {sign!r}")
                self._step("value")
            elif self._place == "end":
                raise self._mistake(
                    f"{sign!r} is behind the ']' that ends the array. A .json file holds one array: make several "
                    "files, or write one record a line and name it .jsonl"
                )
            elif self._place == "value" and sign == "]":
                raise self._mistake("a value is missing between ',' and ']'; remove the comma")
            else:
                yield self._value()
                self._place = "outside" if self._place in ("start", "outside") else "next"
        if self._place in ("first", "value", "next"):
            raise DataError(
                f"{self._path}: truncated: the array ends without ']' at character {self._before + len(self._buffer)}"
            )

    def _step(self, place: str) -> None:
        self._position += 1
        self._place = place

    def _next_sign(self) -> str | None:
        """The next character that is no space, at the position; None at the end of the file."""
        while True:
            while self._position < len(self._buffer):
                if self._buffer[self._position] not in _SPACE:
                    return self._buffer[self._position]
                self._position += 1
            if self._at_end:
                return None
            self._read()

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except RecursionError as error:
                raise self._mistake("nested too deeply") from error
            except ValueError as error:
                at, message = getattr(error, "pos", self._position), getattr(error, "msg", str(error))
                # The value may go on in the next block.
                unfinished = at > len(self._buffer) - _LONGEST_LITERAL or message.startswith("Unterminated string")
                if not unfinished or self._at_end:
                    self._position = at
                    raise self._mistake(message) from error
            else:
                # So may a number at its end, such as 1. or 1e+, of which the decoder takes the 1.
                ends_here = end + _LONGEST_LITERAL <= len(self._buffer) or isinstance(value, str | list | dict)
                if self._at_end or ends_here:
                    self._position = end
                    return value
            self._read()

    def _read(self) -> None:
        self._buffer = self._buffer[self._position :]
        self._before += self._position
        self._position = 0
        try:
            # A value longer than a block is parsed anew each time, so each time as much is added as there is.
            block = self._text.read(max(_BLOCK, len(self._buffer)))
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, _first_bad_byte(self._path), error.reason) from error
        self._buffer += block
        self._at_end = not block

    def _mistake(self, what: str) -> DataError:
        return DataError(f"{self._path}: not JSON at character {self._before + self._position}: {what}")


def _not_utf8(path: Path, offset: int, reason: str) -> DataError:
    with open_input(path) as file:
        beginning = file.read(2)
    if beginning == _GZIP:
        return DataError(f"{path}: is compressed by gzip; give its name the ending .gz")
    encoding = "utf-16" if beginning in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
    return DataError(
        f"{path}: byte {offset} is not UTF-8 ({reason}). Convert the file first, for example: "
        f"iconv -f {encoding} -t utf-8"
    )


def _first_bad_byte(path: Path) -> int:
    """The offset of the first byte that is not UTF-8, of a file that has one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_input(path) as file:
        while block := file.read(_BLOCK):
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return offset - kept + error.start
            offset += len(block)
    return offset - len(decoder.getstate()[0])
