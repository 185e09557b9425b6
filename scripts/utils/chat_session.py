"""A conversation on the terminal: streamed answers, history, and a few slash commands."""

import contextlib
import sys
from typing import TYPE_CHECKING

from scripts.utils import console
from scripts.utils.chat import render_prompt
from scripts.utils.encoding import encode_prompt
from scripts.utils.errors import SFTError
from scripts.utils.prompts import Message, with_system
from scripts.utils.trained import Trained

if TYPE_CHECKING:
    from scripts.utils.schema import InferSection

HELP = """  /system TEXT  set the system message (without TEXT: show it)
  /reset        forget the conversation, keep the system message
  /help         this list
  /exit         leave (Ctrl-D does too)
  //TEXT        send a message that begins with a slash
Ctrl-C stops an answer."""


def chat(trained: Trained, settings: "InferSection", system: str | None) -> None:
    """Read messages until /exit, end of input, or Ctrl-C twice at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()

    console.note("infer", "type a message; /help lists the commands, /exit or Ctrl-D leaves")
    history: list[Message] = []
    interrupted = False
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            console.result()
            return
        except KeyboardInterrupt:
            console.result()
            if interrupted:
                return
            interrupted = True
            console.note("infer", "/exit, Ctrl-D or Ctrl-C once more leaves")
            continue
        interrupted = False
        name, _, text = line.partition(" ")
        if not line:
            continue
        if name in ("/exit", "/quit"):
            return
        if name == "/help":
            console.result(HELP)
        elif name == "/reset":
            history = []
            console.result("(conversation forgotten)")
        elif name == "/system":
            system = text.strip() or system
            console.result(f"(system message: {system})" if system else "(no system message)")
        elif line.startswith("/") and not line.startswith("//"):
            console.result(f"unknown command {name}; /help lists the commands")
        else:
            message = {"role": "user", "content": line.removeprefix("/") if line.startswith("//") else line}
            history = _take_turn(trained, settings, system, [*history, message])


def _take_turn(trained: Trained, settings: "InferSection", system: str | None, history: list[Message]) -> list[Message]:
    """Answer the last message; gives the history with the answer, or without the message where none came."""
    # a seed of its own for each turn, or the same question would sample the same answer for ever
    seed = settings.seed + len(history) // 2
    sys.stdout.write("model> ")
    sys.stdout.flush()
    try:
        text = answer(trained, with_system(history, system), settings, seed=seed, interruptible=True)
    except SFTError as problem:
        console.result()
        console.error(problem.message, problem.hint)
        console.note("infer", "the message was left out; /reset forgets the conversation so far")
        return history[:-1]
    return [*history, {"role": "assistant", "content": text}] if text else history[:-1]


def answer(
    trained: Trained, messages: list[Message], settings: "InferSection", *, seed: int, interruptible: bool = False
) -> str:
    """Stream one answer to stdout, end it with a line break, and return it.

    With ``interruptible``, Ctrl-C ends the answer and what there is of it is returned.
    """
    from scripts.utils.generation import stream

    prompt = encode_prompt(trained.tokenizer, render_prompt(trained.template, trained.tokenizer, messages))
    parts: list[str] = []
    ends: list[bool] = []
    pieces = stream(
        trained.model,
        trained.tokenizer,
        prompt,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        stop_ids=trained.stop_ids,
        on_end=ends.append,
    )
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                parts.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not interruptible:
            raise
        console.result()
        console.note("infer", "stopped")
        return "".join(parts)
    console.result()
    if ends == [False]:
        console.note("infer", f"cut at {settings.max_new_tokens} tokens (--max-new-tokens)")
    return "".join(parts)
