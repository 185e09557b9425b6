"""Answers that are there already, beside the file that they are for, so that a killed batch goes on where it was.

One JSON line a batch, synced as it is written; a line that a kill or a full disk cut off is dropped, so that a batch is
there whole, in the company that it was computed in, or not at all. The key of an answer is a hash of all that decides it, so that an answer is never taken for another question.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.utils import files


class Unfinished:
    """The answers that an earlier start left, and the file that new ones are added to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self.settings: dict[str, Any] | None = None  # those of the newest start
        with files.disk_errors(path), path.open("r+b") as file:
            good = 0
            for line in file:
                if not line.endswith(b"\n") or not self._take(line):
                    break
                good += len(line)
            file.truncate(good)

    def _take(self, line: bytes) -> bool:
        """False where the line is no line of ours: it was cut off, and nothing after it can be trusted."""
        try:
            row = json.loads(line)
            if "settings" in row:
                self.settings = dict(row["settings"])
            else:
                self.answers.update(row["answers"])
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def begin(self, settings: dict[str, Any]) -> None:
        """Note the settings of this start, where they are not those of the newest one."""
        if settings != self.settings:
            self._append(files.json_line({"settings": settings}))
            self.settings = settings

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep the answers of a batch, by key."""
        self._append(files.json_line({"answers": answers}))
        self.answers.update(answers)

    def _append(self, lines: bytes) -> None:
        with files.disk_errors(self.path), self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def beside(output: Path) -> Iterator[Unfinished]:
    """The unfinished answers for ``output``, deleted when the block ends well; one process at a time.

    Raises ``RefusedError`` where another process is writing the same output.
    """
    path = output.with_name(f".{output.name}.unfinished")
    with files.file_lock(path, wait_seconds=0, what=f"{output.absolute()}"):
        found = Unfinished(path)
        try:
            yield found
            path.unlink()
        finally:
            if not found.answers:
                path.unlink(missing_ok=True)
