"""What has been said in a chat, the part of it that the model still sees, and its way into a file of training rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.utils import files, prompts, speaking
from scripts.utils.errors import UserError
from scripts.utils.trained import Trained


@dataclass(frozen=True)
class Exchange:
    """A message and its answer; ``whole`` is False where the answer was stopped or cut."""

    question: str
    answer: str
    whole: bool = True


@dataclass(frozen=True)
class Window:
    """A prompt that fits: its token ids, and how many of the oldest exchanges are left out of it."""

    ids: list[int]
    left_out: int


def messages(system: str | None, exchanges: Sequence[Exchange], question: str) -> list[prompts.Message]:
    """The conversation as messages, ``question`` last."""
    said: list[prompts.Message] = []
    for exchange in exchanges:
        said.append({"role": "user", "content": exchange.question})
        said.append({"role": "assistant", "content": exchange.answer})
    return prompts.with_system([*said, {"role": "user", "content": question}], system)


def window(
    trained: Trained, system: str | None, exchanges: Sequence[Exchange], question: str, max_new_tokens: int
) -> Window:
    """The newest part of the conversation that leaves room for an answer, whole exchanges at a time.

    Room means ``max_new_tokens``, but no more than a quarter of the model's limit. The question itself is never cut:
    where it is too long on its own, ``check_lengths`` says so.
    """
    room = min(max_new_tokens, trained.max_length // 4)
    for left_out in range(len(exchanges) + 1):
        ids = speaking.ids_of(trained, messages(system, exchanges[left_out:], question))
        if len(ids) + room <= trained.max_length:
            break
    return Window(ids, left_out)


def row(system: str | None, exchanges: Sequence[Exchange], identifier: str) -> dict[str, Any]:
    """The conversation as a training row. An answer that is not whole carries no loss: nobody should learn to break off.

    Rows of one conversation, saved at two moments, share ``conversation_id``, so that no split comes between them.
    """
    said: list[prompts.Message] = []
    for exchange in exchanges:
        said.append({"role": "user", "content": exchange.question})
        said.append({"role": "assistant", "content": exchange.answer} | ({} if exchange.whole else {"train": False}))
    return {"messages": prompts.with_system(said, system), "conversation_id": identifier}


def save(path: Path, saved: dict[str, Any]) -> int:
    """Add a row to a file of JSON lines, all of it or nothing; returns how many rows are in the file now.

    Raises ``UserError`` for a file that is no JSON lines, which stays as it is.
    """
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{path}: conversations are saved as JSON lines", "name a file that ends in .jsonl")
    if path.is_dir():
        raise UserError(f"{path.absolute()} is a folder", "name a file in it")
    path = path.resolve()  # a link is followed, not replaced
    try:
        before = path.read_bytes() if path.exists() else b""
        known = [files.parse_line(path, number, line) for number, line in _filled_lines(before)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "name another file") from error
    with files.atomic_writer(path) as file:
        file.write(before if not before or before.endswith(b"\n") else before + b"\n")
        file.write(files.json_line(saved))
    return len(known) + 1


def _filled_lines(content: bytes) -> list[tuple[int, bytes]]:
    return [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
