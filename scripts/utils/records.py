"""From a raw row in any of the common shapes to messages: who speaks, what is said, which tools there are.

The shape is found once a file, from its first rows, and every later row must fit it. What a row holds is kept letter
by letter; a row that cannot be used is an ``Unusable`` with the reason. Nothing is repaired by guessing.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from scripts.utils import raw_files, workers
from scripts.utils.errors import UserError
from scripts.utils.json_rows import RawRow, parse
from scripts.utils.turns import Unusable, as_text, check_order, filled_text, is_blank, kind_of, read_tools, read_turn

T = TypeVar("T")

# names of columns, lower case, the first that a file has is taken
_TURNS = ("messages", "conversations", "conversation")
_QUESTIONS = ("prompt", "question", "user", "query", "input", "human", "problem", "instruction")
_ANSWERS = ("completion", "answer", "assistant", "response", "output", "solution", "target", "reply")
_CONTEXTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_GROUPS = ("conversation_id", "conv_id", "dialogue_id", "session_id", "group_id")
DIGEST_BYTES = 12
_CHUNK = 64  # rows that a worker takes at a time
_ENCODE = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False
).encode  # one for all rows: json.dumps makes one each time
_PEEK = 100  # rows looked at to find a file's shape
KNOWN_SHAPES = (
    "messages or conversations (a list of turns), instruction + output, or a question column "
    f"({', '.join(_QUESTIONS[:-1])}) with an answer column ({', '.join(_ANSWERS)}), or text"
)


@dataclass(frozen=True)
class Shape:
    """How a file's rows are read: the kind, its columns in lower case, and why it was taken for this."""

    kind: str
    why: str
    turns: str = ""
    question: str = ""
    answer: str = ""
    systems: tuple[str, ...] = _SYSTEMS
    tools: str = "tools"
    groups: tuple[str, ...] = _GROUPS


@dataclass(frozen=True, slots=True)
class Record:
    """A row after reading: ``content`` ({"messages", "tools"?}), or None with the reason it was rejected for.

    ``encoded`` is the content as JSON in UTF-8: what its id is the hash of. ``group`` names the conversation that the
    row is a part of, or is empty; it is no part of the content.
    """

    raw: RawRow
    content: dict[str, Any] | None = None
    encoded: bytes = b""
    reason: str = ""
    detail: str = ""
    group: str = ""

    @property
    def digest(self) -> bytes:
        """Hash of the content: the row's id."""
        return hashlib.sha256(self.encoded).digest()[:DIGEST_BYTES]


@dataclass
class FileRecords:
    """One file's rows, to be read once, its shape, and the columns that were left out, counted while reading."""

    path: Path
    shape: Shape | None
    rows: Iterator[RawRow]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def records(self) -> Iterator[Record]:
        """The records in order, read in this process."""
        return (_record(row, self.shape, self.left_out) for row in self.rows)

    def mapped(self, work: Callable[[list[Record]], T]) -> Iterator[T]:
        """``work`` of some records at a time, in order; reading and work are done on all cores."""

        def read(chunk: tuple[int, list[RawRow]]) -> tuple[T, Counter[str]]:
            left_out: Counter[str] = Counter()
            return work([_record(row, self.shape, left_out) for row in chunk[1]]), left_out

        try:
            for done, left_out in workers.in_order(read, workers.numbered(self.rows, _CHUNK)):
                self.left_out += left_out
                yield done
        except RecursionError as error:  # a cell of an Arrow file, on its way to a worker
            raise UserError(f"{self.path}: nested too deeply to be training rows", "") from error


def open_file(path: Path, wanted: str = "auto", columns: Mapping[Any, str] | None = None) -> FileRecords:
    """Find the shape of a file (or check ``wanted``) and return its records.

    ``columns`` gives a file's own names: user, assistant, system, messages, tools or group → column. Raises ``UserError``
    naming the columns found when one of these is missing, or when rows can be read but none has a known shape.
    """
    own = {meaning: name.strip().lower() for meaning, name in (columns or {}).items()}
    rows = raw_files.unread_rows(path)
    first = [parse(row) for row in itertools.islice(rows, _PEEK)]
    objects = [row for row in first if isinstance(row.value, dict)]
    shape = next((found for row in objects if (found := detect(row.value, wanted, own))), None)
    there = {name for row in objects for name in _columns(row.value)}
    missing = [f"{(columns or {})[meaning]!r} ({meaning})" for meaning, name in own.items() if name not in there]
    if objects and (missing or shape is None):
        names = ", ".join(repr(str(name)[:40]) for name in list(objects[0].value)[:20]) or "none"
        if missing:
            message = f"{path}:{objects[0].line}: no column {' and no '.join(missing)}; found: {names}"
            raise UserError(message, "data.columns must name columns as they stand in the file")
        asked = "" if wanted == "auto" else f" for data.format {wanted}"
        raise UserError(
            f"{path}:{objects[0].line}: no usable columns{asked}; found: {names}",
            f"known are {KNOWN_SHAPES}; a CSV names its columns in the first line. Other names: "
            'SET="data.columns={user: your_question, assistant: your_answer}"',
        )
    return FileRecords(path, shape, itertools.chain(first, rows))


def _record(row: RawRow, shape: Shape | None, left_out: dict[str, int]) -> Record:
    row = parse(row)
    try:
        if row.reason:
            raise Unusable(row.reason, row.detail)
        if not isinstance(row.value, dict) or shape is None:
            raise Unusable("the row is not an object with columns", f"it is {kind_of(row.value)}")
        content = to_content(row.value, shape, left_out)
        encoded = _ENCODE(content).encode("utf-8")
        return Record(row, content, encoded, group=_group(row.value, shape))
    except Unusable as problem:
        return Record(row, reason=problem.reason, detail=problem.detail)
    except UnicodeEncodeError as problem:
        half = f"\\u{ord(problem.object[problem.start]):04x}"
        return Record(row, reason="half a character (a lone surrogate), which no tokenizer can read", detail=half)
    except RecursionError:
        return Record(row, reason="nested too deeply to be a training row")
    except ValueError as problem:
        return Record(row, reason="a number that JSON cannot hold", detail=str(problem))


def _group(row: dict[str, Any], shape: Shape) -> str:
    """The id of the row's conversation, from the first of these columns that says one."""
    columns = _columns(row)
    value = next((columns[name] for name in shape.groups if not is_blank(columns.get(name))), "")
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """The row with lower-case names; of two that differ in case only, the first counts."""
    return {name.strip().lower(): value for name, value in reversed(row.items())}


def detect(row: dict[str, Any], wanted: str = "auto", own: Mapping[str, str] | None = None) -> Shape | None:
    """The shape of one row, or None when it has none of the known ones; ``own`` as ``columns`` in ``open_file``."""
    columns, own = _columns(row), own or {}
    if "text" in own:
        return _text_shape(own["text"]) if own["text"] in columns and wanted in ("auto", "text") else None
    extra: dict[str, Any] = {"systems": (own["system"],)} if "system" in own else {}
    extra |= {"tools": own["tools"]} if "tools" in own else {}
    extra |= {"groups": (own["group"],)} if "group" in own else {}
    if wanted in ("auto", "messages", "sharegpt") and not {"user", "assistant"} & own.keys():
        for name in (own["messages"],) if "messages" in own else _TURNS:
            turn = columns[name][0] if isinstance(columns.get(name), list) and columns[name] else None
            kind = "messages" if isinstance(turn, dict) and "role" in turn else "sharegpt"
            if isinstance(turn, dict) and ("role" in turn or "from" in turn) and wanted in ("auto", kind):
                key = "role" if kind == "messages" else "from"
                return Shape(kind, f'"{name}" holds turns with "{key}"', turns=name, **extra)
    if "messages" in own:
        return None
    answers = [own["assistant"]] if "assistant" in own else [name for name in _ANSWERS if name not in own.values()]
    answer = next((name for name in answers if name in columns), "")
    if answer and "instruction" in columns and wanted in ("auto", "alpaca") and "user" not in own:
        why = f"instruction (+ input) → user, {answer} → assistant"
        return Shape("alpaca", why, question="instruction", answer=answer, **extra)
    free = [name for name in _QUESTIONS if name != answer and name not in own.values()]
    question = next((name for name in ([own["user"]] if "user" in own else free) if name in columns), "")
    if question and answer and wanted in ("auto", "pairs"):
        return Shape("pairs", f"{question} → user, {answer} → assistant", question=question, answer=answer, **extra)
    if "text" in columns and wanted in ("auto", "text"):
        return _text_shape("text")
    return None


def _text_shape(name: str) -> Shape:
    return Shape("text", f'"{name}" is text to continue, with loss on all of it', answer=name)


def to_content(row: dict[str, Any], shape: Shape, left_out: dict[str, int]) -> dict[str, Any]:
    """Return {"messages", "tools"?} of a row, or {"text"}; raises ``Unusable``. Counts columns without a use in ``left_out``."""
    columns = _columns(row)
    used = {shape.turns, shape.question, shape.answer, *shape.systems, *shape.groups, shape.tools, "history"}
    if shape.kind == "text":
        _count_unused(columns, {shape.answer}, left_out)
        return {"text": filled_text(columns.get(shape.answer), f'"{shape.answer}"')}
    messages: list[dict[str, Any]] = []
    system = next((columns[name] for name in shape.systems if not is_blank(columns.get(name))), None)
    if system is not None:
        messages.append({"role": "system", "content": as_text(system, f'"{shape.systems[0]}"')})
    if shape.turns:
        given = columns.get(shape.turns)
        if not isinstance(given, list) or not given:
            raise Unusable(f'"{shape.turns}" is not a list of turns', f"it is {kind_of(given)}")
        messages += [read_turn(turn, left_out) for turn in given]
    else:
        context = ""
        if shape.kind == "alpaca":
            context = next((name for name in _CONTEXTS if name in columns and name not in shape.systems), "")
        used.add(context)
        messages += _history(columns.get("history"))
        asked, answered = columns.get(shape.question), columns.get(shape.answer)
        if _is_turns(asked):  # only the completion is to be learnt
            messages += [_untrained(read_turn(turn, left_out)) for turn in asked]
        else:
            messages.append({"role": "user", "content": _question(columns, shape.question, context)})
        if _is_turns(answered):
            messages += [read_turn(turn, left_out) for turn in answered]
        else:
            messages.append({"role": "assistant", "content": filled_text(answered, f'"{shape.answer}"')})
    check_order(messages)
    _count_unused(columns, used, left_out)
    tools = read_tools(columns.get(shape.tools))
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _count_unused(columns: dict[str, Any], used: set[str], left_out: dict[str, int]) -> None:
    for name, value in columns.items():
        if name not in used and not is_blank(value):
            left_out[name] = left_out.get(name, 0) + 1


def _is_turns(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _untrained(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _question(columns: dict[str, Any], name: str, context: str) -> str:
    """The question; for Alpaca rows the instruction and, after a blank line, the input where there is one."""
    if not context or is_blank(columns[context]):
        return filled_text(columns.get(name), f'"{name}"')
    extra = as_text(columns[context], f'"{context}"')
    return extra if is_blank(columns.get(name)) else f"{as_text(columns[name], name)}\n\n{extra}"


def _history(value: Any) -> list[dict[str, Any]]:
    if is_blank(value):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise Unusable('"history" is not a list of [question, answer] pairs')
    messages = []
    for question, answer in value:
        messages.append({"role": "user", "content": filled_text(question, "a question in history")})
        messages.append({"role": "assistant", "content": filled_text(answer, "an answer in history")})
    return messages
