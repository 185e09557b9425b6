"""What process needs to know of each row, worked out wherever the row is read; and its columns, one number a row.

A worker turns a record into a ``Read`` or a ``Refused``, small and finished; the process that writes keeps only numbers.
"""

import hashlib
from array import array
from collections.abc import Callable
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


def reader(seed: int, near_duplicates: bool) -> Callable[[Record], Read | Refused]:
    """Return what reads one record; ``seed`` is that of the split by hash."""

    def read(record: Record) -> Read | Refused:
        raw, content = record.raw, record.content
        if content is None:
            value = raw.text or raw.value
            return refused(raw.file, raw.line, record.reason, record.detail, value)
        messages, digest = near.messages_of(content), record.digest
        row = {"id": digest.hex(), **content, "source": {"file": raw.file, "line": raw.line}}
        answer = messages[-1]["content"]
        length = len(answer.strip())
        found = [*(["empty"] if not length else ["short"] if length < _SHORT else []), *suspicious.find(messages)]
        return Read(
            line=raw.line,
            digest=digest,
            json=files.json_line(row),
            signature=near.signature(messages) if near_duplicates else b"",
            question=_number(splits.question_hash(content, seed)),
            group=_number(splits.group_hash(record.group, seed)),
            characters=sum(len(message["content"]) for message in messages),
            turns=sum(message["role"] == "assistant" for message in messages),
            answer=_number(hashlib.sha256(answer.encode()).digest()),
            marks=sum(map(mark_of, found)),
        )

    return read


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

    def add(self, row: Read, given: int) -> None:
        """Append a row of the file named last."""
        self.questions.append(row.question)
        self.groups.append(row.group)
        self.lengths.append(len(row.json))
        self.lines.append(row.line)
        self.files.append(len(self.names) - 1)
        self.given.append(given)
        self.characters.append(row.characters)
        self.turns.append(row.turns)
        self.answers.append(row.answer)
        self.marks.append(row.marks)

    def place(self, row: int) -> str:
        return f"{self.names[self.files[row]]}:{self.lines[row]}"


def mark_of(reason: str) -> int:
    """The bit of ``marks`` for an answer that is "empty" or "short", or for one of suspicious.REASONS."""
    return 1 << _MARKS.index(reason)
