"""Rows of a JSON file: an array, an object that holds one array, or JSON lines, told apart by what stands in them.

Also the row itself as it comes from any file, and the reader of UTF-8 lines that CSV shares.
"""

import json
import re
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.utils import unpacked
from scripts.utils.errors import UserError

BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_MEND = "mend the file; nothing was changed"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file. ``reason`` is empty when it could be read; else ``text`` is what stands in the file.

    ``unread``: ``text`` is still to be parsed, by ``parse``, wherever that is done.
    """

    file: str
    line: int
    value: Any = None
    text: str = ""
    reason: str = ""
    detail: str = ""
    unread: bool = False


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, line ends kept; bytes that are not UTF-8 are a ``UserError`` naming the place."""
    offset = 0
    with unpacked.open_bytes(path) as file:
        for number, line in enumerate(file, 1):  # splits at \n alone, so U+2028 in a text is no line end
            skipped = len(BOM) if number == 1 and line.startswith(BOM) else 0
            try:
                text = line[skipped:].decode("utf-8")
            except UnicodeDecodeError as error:
                place = skipped + error.start
                raise UserError(
                    f"{path}:{number}: not UTF-8: byte 0x{line[place]:02x} at offset {offset + place} of the file",
                    "save the file as UTF-8 (for example: iconv -f latin1 -t utf-8)",
                ) from error
            offset += len(line)
            yield number, text


class _Decoder(json.JSONDecoder):
    """Notes what Python's reader lets pass and a training row must not hold, so that the row can be rejected."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            self.problems.append(("a key stands twice in one object", f'"{twice}"'))
        return value

    def _constant(self, name: str) -> None:
        self.problems.append(("NaN and Infinity are not JSON", name))

    def _float(self, digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            self.problems.append(("a number is too large", digits[:40]))
        return value

    def row(self, file: str, line: int, value: Any, text: str) -> RawRow:
        """The value just decoded from ``text`` as a row, rejected if it held something that was noted."""
        if not self.problems:
            return RawRow(file, line, value)
        reason, detail = self.problems[0]
        self.problems.clear()
        return RawRow(file, line, None, text, reason, detail)


def read_json(path: Path) -> Iterator[RawRow]:
    """The rows of a JSON file in order, unread, each with its line; a file that is broken as a whole is a ``UserError``."""
    filled = ((number, line) for number, line in lines(path) if line.strip())
    first = next(filled, None)
    if first is None:
        return
    start = first[1].lstrip()[0]
    if start == "[" or (unpacked.suffix(path) == ".json" and not (_is_object(first[1]) and next(filled, None))):
        text = "".join(line for _, line in lines(path))
        yield from _read_whole(path, text)
    else:
        yield from _read_json_lines(path)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    for number, line in lines(path):
        if text := line.strip(" \t\r\n"):
            yield RawRow(str(path), number, None, text, unread=True)


def parse(row: RawRow) -> RawRow:
    """The row itself, or, of a line of JSON that is still unread, what it says."""
    if not row.unread:
        return row
    decoder = _LINES
    try:
        return decoder.row(row.file, row.line, decoder.decode(row.text), row.text)
    except RecursionError:
        decoder.problems.clear()
        return RawRow(row.file, row.line, None, row.text, "nested too deeply to be a training row")
    except ValueError as error:  # JSONDecodeError, or an integer of more than 4,300 digits
        decoder.problems.clear()
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        if "\0" in row.text:
            why += "; the line holds NUL bytes: is the file UTF-16, or damaged?"
        return RawRow(row.file, row.line, None, row.text, "not valid JSON", why)


_LINES = _Decoder()


def _read_whole(path: Path, text: str) -> Iterator[RawRow]:
    """Rows of a file that is one JSON value: read one by one, so that each has its line."""
    decoder = json.JSONDecoder()
    start = _skip(text, 0)
    try:
        if text[start] != "[":
            value, end = decoder.raw_decode(text, start)
            _expect_end(text, end)
            arrays = _arrays(value)
            if len(arrays) > 1:
                raise UserError(f"{path}: holds several arrays: {', '.join(arrays)}", "put each into a file of its own")
            if not arrays:
                yield RawRow(str(path), 1 + text.count("\n", 0, start), None, text, unread=True)
                return
            start = _start_of(text, start, arrays[0], decoder)
            yield from _read_array(path, text, start, decoder)
        else:
            end = yield from _read_array(path, text, start, decoder)
            _expect_end(text, end)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise UserError(f"{where}: not valid JSON: {error.msg}", _MEND) from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be training rows", _MEND) from error
    except ValueError as error:
        raise UserError(f"{path}: not readable JSON: {error}", _MEND) from error


def _read_array(path: Path, text: str, start: int, decoder: json.JSONDecoder) -> Generator[RawRow, None, int]:
    """The items, unread, of the array that begins at ``start``; returns where it ends."""
    position, line, counted = start + 1, 1, 0
    while text[(position := _skip(text, position)) : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        _, end = decoder.raw_decode(text, position)
        yield RawRow(str(path), line, None, text[position:end], unread=True)
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position += 1
            if text[(after := _skip(text, position)) : after + 1] == "]":
                raise json.JSONDecodeError("a comma before the closing bracket", text, position - 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    return position + 1


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _expect_end(text: str, position: int) -> None:
    if (position := _skip(text, position)) != len(text):
        raise json.JSONDecodeError("text after the end of the value", text, position)


def _arrays(value: Any) -> list[str]:
    """Names of the arrays of rows in a file's one object; none when the object is a row itself."""
    if not isinstance(value, dict):
        return []
    lists = [name for name, item in value.items() if isinstance(item, list)]
    if len(lists) == len(value) == 1 and not value[lists[0]]:
        return lists

    def holds_rows(items: list[Any]) -> bool:  # turns of a conversation are no rows
        return bool(items) and all(isinstance(item, dict) and not {"role", "from"} & item.keys() for item in items)

    return [name for name in lists if holds_rows(value[name])]


def _start_of(text: str, start: int, name: str, decoder: json.JSONDecoder) -> int:
    """Where the value of ``name`` begins in the object that begins at ``start``."""
    position = start
    while True:
        key, position = decoder.raw_decode(text, _skip(text, position + 1))  # +1: over "{" or ","
        position = _skip(text, _skip(text, position) + 1)  # over ":"
        if key == name:
            return position
        position = _skip(text, decoder.raw_decode(text, position)[1])
