"""Reading files to which another process may be adding lines just now."""

import json
import re
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 18
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def entries(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in a run's metrics.jsonl that name their ``step``, and how many damaged lines were passed over.

    The last line is not counted: it may be half written.
    """
    found: list[dict[str, Any]] = []
    damaged = 0
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, text in enumerate(lines, 1):
        try:
            entry = json.loads(text)
            entry["step"] = int(entry["step"])
            found.append(entry)
        except (ValueError, KeyError, TypeError, OverflowError):
            damaged += number < len(lines)
    return found, damaged


def tail(path: Path, most: int, *, since: int = 0) -> list[str]:
    """The last ``most`` lines of a text after the byte ``since``, without colours and empty lines; none where there is no file.

    Of a line that was drawn again and again (a progress bar) the last state; of a long file its last 256 KiB.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        begin = path.stat().st_size - _TAIL_BYTES
        file.seek(max(since, begin, 0))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in _COLOUR.sub("", text.replace("\r\n", "\n")).split("\n")]
    whole = lines if begin <= since else lines[1:]  # the first may have lost its beginning
    return [line for line in whole if line][-most:]
