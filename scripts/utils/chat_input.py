"""Messages typed by a person: with line editing and history on a terminal, else plainly, a line at a time."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

Read = Callable[[str], str]
FENCE = '"""'
CONTINUED = "...> "


def reader(words: Sequence[str]) -> Read:
    """What shows a prompt and reads what is typed; ``words`` are completed with Tab.

    Raises EOFError at the end of the input, and KeyboardInterrupt at Ctrl-C.
    """
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        with contextlib.suppress(ImportError):
            return _edited(words)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and history, where the system has it
    return input


def _edited(words: Sequence[str]) -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    # the history is kept in memory only: what is said to a model is nobody else's business
    session: PromptSession[str] = PromptSession(
        key_bindings=keys,
        multiline=True,
        prompt_continuation=CONTINUED,
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
    )
    return session.prompt


def message(read: Read, prompt: str) -> tuple[str, bool]:
    """One message, and whether it was fenced: between three double quotes lines belong together, and a slash is a slash."""
    text = read(prompt).strip()
    if not text.startswith(FENCE):
        return text, False
    text = text.removeprefix(FENCE)
    while not text.rstrip().endswith(FENCE):
        text += "\n" + read(CONTINUED)
    return text.rstrip().removesuffix(FENCE).strip("\n"), True
