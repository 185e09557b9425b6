"""What an evaluation has computed, line by line on the disk, so that one that was stopped goes on where it was.

A line's key is made of all that decides its value: weights, precision, settings, and the whole batch that the row was
computed in. A batch is a unit: one that is not whole is computed again, in the company that it had.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.utils import files

Entry = dict[str, Any]


class AnswerCache:
    """The entries of ``path`` by key; new ones are appended and on the disk when ``add`` returns."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.known: dict[str, Entry] = {}
        with files.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if fresh:
                path.unlink(missing_ok=True)
            self._file = path.open("ab")
            self._read()

    def _read(self) -> None:
        """Take what is whole; a line that was being written when the power went is cut off, others' lines are passed over."""
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    entry = json.loads(line)
                    self.known[entry["key"]] = entry
                except (ValueError, TypeError, KeyError):
                    continue
        os.truncate(self.path, whole)

    def unit(self, keys: Sequence[str]) -> list[Entry] | None:
        """The entries of a batch, if all are there."""
        found = [self.known.get(key) for key in keys]
        return [entry for entry in found if entry] if all(found) else None

    def add(self, keys: Sequence[str], entries: Sequence[Entry]) -> None:
        """Write a batch; raises ``MachineError`` where the disk is full."""
        lines = [{"key": key, **entry} for key, entry in zip(keys, entries, strict=True)]
        with files.disk_errors(self.path):
            self._file.write(b"".join(map(files.json_line, lines)))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.known |= {line["key"]: line for line in lines}

    def close(self) -> None:
        with files.disk_errors(self.path):
            self._file.close()

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unit_keys(identity: str, what: str, content: Sequence[Any]) -> list[str]:
    """A key for each member of a batch; ``identity`` stands for the model and the settings."""
    batch = files.sha256_json([identity, what, content])
    return [f"{batch}:{number}" for number in range(len(content))]
