"""One answer, streamed to stdout as it is written."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.utils import console
from scripts.utils.chat import render_prompt
from scripts.utils.encoding import encode_prompt
from scripts.utils.prompts import Message
from scripts.utils.trained import Trained

if TYPE_CHECKING:
    from scripts.utils.json_schema import Schema
    from scripts.utils.schema import InferSection


@dataclass(frozen=True)
class Said:
    """An answer; ``whole`` is False where it was stopped, or cut at a limit."""

    text: str
    whole: bool


def ids_of(trained: Trained, messages: list[Message]) -> list[int]:
    """Token ids of a conversation that is to be answered, as in training."""
    return encode_prompt(trained.tokenizer, render_prompt(trained.template, trained.tokenizer, messages))


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Within this block Ctrl-C sets the event and raises nothing, so that it ends no more than it is meant to."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def answer(
    trained: Trained,
    prompt: list[int],
    settings: "InferSection",
    *,
    seed: int,
    schema: "Schema | None" = None,
    stopped: threading.Event | None = None,
) -> Said:
    """Stream one answer to stdout, end it with a line break, and return it; ``stopped`` ends it after the current token."""
    from scripts.utils import streaming

    parts: list[str] = []
    ends: list[bool] = []
    pieces = streaming.stream(
        trained.model,
        trained.tokenizer,
        prompt,
        stop_ids=trained.stop_ids,
        on_end=ends.append,
        schema=schema,
        stopped=stopped,
        **settings.model_dump(include={"max_new_tokens", "temperature", "top_p", "stop"}),
        seed=seed,
    )
    with contextlib.closing(pieces):
        for piece in pieces:
            parts.append(piece)
            # a terminal that cannot show a character must not end the chat
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()
    console.result()
    if stopped is not None and stopped.is_set():
        console.note("infer", "stopped")
    elif ends == [False]:
        room = trained.max_length - len(prompt)
        if room < settings.max_new_tokens:
            console.note("infer", f"cut at {room} tokens: the model's {trained.max_length:,} tokens are full")
        else:
            console.note("infer", f"cut at {settings.max_new_tokens} tokens (--max-new-tokens)")
    return Said("".join(parts), ends == [True])
