"""Prompts from a file: one request a row of JSON lines, or one a line of text. N prompts in, N requests out.

Everything is read and checked before a model is loaded, so that a broken line costs seconds and no answers.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.utils import json_rows
from scripts.utils.errors import UserError

Message = dict[str, Any]
_ROLES = ("system", "user", "assistant", "tool")
_SHAPES = '"messages", "prompt" or "user"'


@dataclass(frozen=True)
class Request:
    """One conversation to answer. ``reference`` is the answer that the row brought along, if it did."""

    id: str | int
    line: int
    messages: list[Message]
    tools: list[Any] | None = None
    reference: str | None = None


def read_one(given: str) -> str:
    """The one prompt, line breaks and all; raises ``UserError`` when it is empty or not UTF-8."""
    text = given
    if given == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt on stdin is not UTF-8 ({error})", "convert it first") from error
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            "the prompt is not valid UTF-8", "check the terminal's encoding, or use --input FILE"
        ) from error
    if not text.strip():
        raise UserError("the prompt is empty", "write something to answer")
    return text


def read(path: Path, *, limit: int | None = None, whole_file: bool = False) -> list[Request]:
    """The requests in ``path`` in their order, at most ``limit``.

    ``whole_file`` takes a text file as one prompt. Raises ``UserError`` naming every broken line (the first five).
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{path}: {what} (looked for {path.absolute()})", "give a .jsonl or .txt file with --input")
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json", ".ndjson") and not whole_file:
        found = _from_json(path)
    elif kind in (".txt", ".text", ".md", "") or whole_file:
        found = _from_text(path, whole_file)
    else:
        raise UserError(
            f"{path}: prompts are read from .jsonl, .json or .txt", "convert it, or take it whole: --whole-file"
        )
    requests: list[Request] = []
    problems: list[str] = []
    for item in found:
        if isinstance(item, str):
            problems.append(item)
        elif limit is None or len(requests) < limit:
            requests.append(item)
    if problems:
        more = f"\n       and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError("\n       ".join(problems[:5]) + more, "mend or delete the lines; nothing was generated")
    if not requests:
        raise UserError(f"{path}: no prompts in it", f"a .jsonl row needs {_SHAPES}, a .txt file one prompt a line")
    return requests


def with_system(messages: list[Message], system: str | None, *, replace: bool = False) -> list[Message]:
    """The conversation with ``system`` in front where it has no system message of its own, or instead of it."""
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": system}, *messages[1:]] if replace else messages
    return [{"role": "system", "content": system}, *messages]


def _from_text(path: Path, whole_file: bool) -> Iterator[Request | str]:
    """One prompt a line, blank lines left out; or the file as one prompt."""
    lines = [(number, text.rstrip("\r\n")) for number, text in json_rows.lines(path)]
    if whole_file:
        lines = [(1, "\n".join(text for _, text in lines).strip("\n"))]
    for number, text in lines:
        if text.strip():
            yield Request(number, number, [{"role": "user", "content": text}])


def _from_json(path: Path) -> Iterator[Request | str]:
    """A request a row, or the text of what is wrong with it."""
    for number, row in enumerate(map(json_rows.parse, json_rows.read_json(path)), 1):
        where = f"{path}:{row.line}"
        if row.reason:
            yield f"{where}: {row.reason}" + (f" ({row.detail})" if row.detail else "")
            continue
        try:
            yield _request(row.value, row.line, number)
        except ValueError as problem:
            yield f"{where}: {problem}"


def _request(row: Any, line: int, number: int) -> Request:
    """Raises ``ValueError`` with the reason."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with {_SHAPES}, this is {type(row).__name__}")
    identifier = row.get("id", number)
    if not isinstance(identifier, (str, int)):
        raise ValueError(f'"id" must be text or a whole number, it is {type(identifier).__name__}')
    tools = row.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise ValueError('"tools" must be a list')
    if row.get("messages") is not None:
        messages = _checked(row["messages"])
    else:
        key = next((name for name in ("prompt", "user") if row.get(name) is not None), None)
        if key is None:
            raise ValueError(f"no {_SHAPES} in it; its keys: {', '.join(map(str, row)) or 'none'}")
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f'"{key}" is empty or no text')
        messages = [{"role": "user", "content": row[key]}]
        if row.get("system"):
            messages = with_system(messages, str(row["system"]))
    reference = None
    if messages[-1]["role"] == "assistant":  # a training row: its last answer is what the model is asked for
        reference = str(messages[-1].get("content") or "")
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError('"messages" must end with a user or tool message to be answered')
    return Request(identifier, line, messages, tools, reference)


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is empty or no list')
    for position, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f'message {position} has no "role" of {", ".join(_ROLES)}')
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f'message {position} has no text in "content"')
    return list(messages)
