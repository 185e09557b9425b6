"""What process needs to know of each row, worked out wherever the row is read; and its columns, one number a row.

A worker turns a record into a ``Read`` or a ``Refused``, finished, and sends many as a ``Chunk``; the process that writes
keeps only numbers.
"""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.utils import files, near, splits, suspicious
from scripts.utils.records import Record

_SHORT = 4  # characters
_MARKS = ("empty", "short", *suspicious.REASONS)  # of the last answer, and of the row; one bit each of Read.marks


@dataclass(frozen=True, slots=True)
class Read:
    """A row that can be used: its place, its id, its finished line, and what decides about it and is reported of it."""

    line: int
    digest: bytes
    json: bytes
    signature: bytes  # MinHash; empty where near duplicates do not count
    question: int
    group: int  # of the conversation id; 0: it has none
    characters: int
    turns: int  # of the assistant
    answer: int  # hash of the last one
    marks: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot be used, and its finished line for the rejected rows."""

    line: int
    reason: str
    detail: str
    json: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows on their way from a worker: the usable ones as columns, in order, and the refused ones."""

    refused: list[Refused]
    digests: list[bytes]
    json: bytes  # the finished lines, one after another
    signatures: bytes
    columns: dict[str, "array[int]"]  # those of Rows that are of the row alone

    def only(self, kept: list[int]) -> "Chunk":
        """The usable rows with these numbers."""
        starts = list(itertools.accumulate(self.columns["lengths"], initial=0))
        width = len(self.signatures) // max(len(self.digests), 1)
        return Chunk(
            self.refused,
            [self.digests[at] for at in kept],
            b"".join(self.json[starts[at] : starts[at + 1]] for at in kept),
            b"".join(self.signatures[at * width : (at + 1) * width] for at in kept),
            {name: array(column.typecode, [column[at] for at in kept]) for name, column in self.columns.items()},
        )


def reader(seed: int, near_duplicates: bool) -> Callable[[list[Record]], Chunk]:
    """Return what reads some records; ``seed`` is that of the split by hash."""

    def read(record: Record) -> Read | Refused:
        raw, content = record.raw, record.content
        if content is None:
            value = raw.text or raw.value
            return refused(raw.file, raw.line, record.reason, record.detail, value)
        messages, digest = near.messages_of(content), record.digest
        answer = messages[-1]["content"]
        length = len(answer.strip())
        found = [*(["empty"] if not length else ["short"] if length < _SHORT else []), *suspicious.find(messages)]
        place = files.json_line({"file": raw.file, "line": raw.line})[:-1]
        return Read(
            line=raw.line,
            digest=digest,
            # the content is encoded already: its braces make room for the id before it and the source behind it
            json=b'{"id": "%s", %s, "source": %s}\n' % (digest.hex().encode(), record.encoded[1:-1], place),
            signature=near.signature(messages) if near_duplicates else b"",
            question=_number(splits.question_hash(content, seed)),
            group=_number(splits.group_hash(record.group, seed)),
            characters=sum(len(message["content"]) for message in messages),
            turns=sum(message["role"] == "assistant" for message in messages),
            answer=_number(hashlib.sha256(answer.encode()).digest()),
            marks=sum(map(mark_of, found)),
        )

    return lambda part: gather([read(record) for record in part])


def gather(rows: Sequence[Read | Refused]) -> Chunk:
    """Rows as one chunk: a few long values cross to another process several times faster than many small ones."""
    usable = [row for row in rows if isinstance(row, Read)]
    return Chunk(
        refused=[row for row in rows if isinstance(row, Refused)],
        digests=[row.digest for row in usable],
        json=b"".join(row.json for row in usable),
        signatures=b"".join(row.signature for row in usable),
        columns={
            "questions": array("Q", [row.question for row in usable]),
            "groups": array("Q", [row.group for row in usable]),
            "lengths": array("Q", [len(row.json) for row in usable]),
            "lines": array("Q", [row.line for row in usable]),
            "characters": array("Q", [row.characters for row in usable]),
            "turns": array("I", [row.turns for row in usable]),
            "answers": array("Q", [row.answer for row in usable]),
            "marks": array("H", [row.marks for row in usable]),
        },
    )


def refused(file: str, line: int, reason: str, detail: str, value: Any) -> Refused:
    """The rejected row ``value`` with its place and reason."""
    row = {"file": file, "line": line, "reason": f"{reason} ({detail})" if detail else reason}
    try:
        text = files.json_line(row | {"row": value})
    except RecursionError:
        text = files.json_line(row | {"row": None})
    return Refused(line, reason, detail, text)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8])


def _column(kind: str) -> Callable[[], "array[int]"]:
    return lambda: array(kind)


@dataclass
class Rows:
    """What is remembered of each row that was read, about 65 bytes: one column for each thing, in reading order."""

    questions: "array[int]" = field(default_factory=_column("Q"))
    groups: "array[int]" = field(default_factory=_column("Q"))
    lengths: "array[int]" = field(default_factory=_column("Q"))  # bytes
    lines: "array[int]" = field(default_factory=_column("Q"))
    files: "array[int]" = field(default_factory=_column("I"))  # numbers into names
    given: "array[int]" = field(default_factory=_column("b"))  # the split that its file says; -1: none
    characters: "array[int]" = field(default_factory=_column("Q"))
    turns: "array[int]" = field(default_factory=_column("I"))
    answers: "array[int]" = field(default_factory=_column("Q"))
    marks: "array[int]" = field(default_factory=_column("H"))
    names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions)

    def add(self, chunk: Chunk, given: int) -> None:
        """Append the usable rows of a chunk of the file named last."""
        for name, column in chunk.columns.items():
            getattr(self, name).extend(column)
        count = len(chunk.digests)
        self.files.extend([len(self.names) - 1] * count)
        self.given.extend([given] * count)

    def place(self, row: int) -> str:
        return f"{self.names[self.files[row]]}:{self.lines[row]}"


def mark_of(reason: str) -> int:
    """The bit of ``marks`` for an answer that is "empty" or "short", or for one of suspicious.REASONS."""
    return 1 << _MARKS.index(reason)
