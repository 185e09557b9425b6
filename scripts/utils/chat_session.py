"""A conversation on the terminal: streamed answers, history, and slash commands."""

import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.utils import chat_input, console, conversation, speaking, stop_signals
from scripts.utils.conversation import Exchange
from scripts.utils.errors import SFTError
from scripts.utils.trained import Trained, adapter_off

if TYPE_CHECKING:
    from scripts.utils.json_schema import Schema
    from scripts.utils.schema import InferSection

HELP = """  /system TEXT      set the system message (without TEXT: show it)
  /reset            forget the conversation, keep the system message
  /undo             take back the last message and its answer
  /retry            answer the last message again
  /compare [TEXT]   the last message (or TEXT) answered by base and tuned model; nothing of it is kept
  /save FILE.jsonl  add the conversation to a file, as a training row
  /help             this list
  /exit             leave (Ctrl-D does too)
  //TEXT            send a message that begins with a slash
Several lines: Alt-Enter begins a new one; or put them between \"\"\" and \"\"\". Ctrl-C stops an answer."""


def chat(trained: Trained, settings: "InferSection", system: str | None, schema: "Schema | None" = None) -> None:
    """Read messages until /exit, end of input, or Ctrl-C twice at the prompt."""
    session = Session(trained, settings, system, schema)
    commands: dict[str, Callable[[str], None]] = {
        "/help": lambda text: console.result(HELP),
        "/system": session.set_system,
        "/reset": session.reset,
        "/undo": session.undo,
        "/retry": session.retry,
        "/compare": session.compare,
        "/save": session.save,
    }
    read = chat_input.reader([*commands, "/exit"])
    console.note("infer", "type a message; /help lists the commands, /exit or Ctrl-D leaves")
    interrupted = False
    while True:
        try:
            line, fenced = chat_input.message(read, "you> ")
        except EOFError:
            console.result()
            return
        except KeyboardInterrupt:
            stop_signals.answered()
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
        if fenced or not line.startswith("/"):
            session.ask(line)
        elif line.startswith("//"):
            session.ask(line[1:])
        elif name in ("/exit", "/quit"):
            return
        elif name in commands:
            commands[name](text.strip())
        else:
            console.result(f"unknown command {name}; /help lists the commands")


class Session:
    """The state of a chat: what was said, and under which system message."""

    def __init__(self, trained: Trained, settings: "InferSection", system: str | None, schema: "Schema | None") -> None:
        self.trained, self.settings, self.system, self.schema = trained, settings, system, schema
        self.exchanges: list[Exchange] = []
        self._tries = 0
        self._stopped = False  # whether Ctrl-C ended the newest answer
        self._id = uuid.uuid4().hex

    def ask(self, question: str) -> None:
        """Answer a message and keep both; where no answer came, neither is kept."""
        self._tries = 0
        if said := self._answer(self.exchanges, question):
            self.exchanges.append(Exchange(question, said.text, said.whole))
        else:
            console.note("infer", "the message was left out of the conversation")

    def retry(self, _: str = "") -> None:
        if not self.exchanges:
            console.result("(nothing to answer again)")
            return
        if self.settings.temperature == 0:
            console.note("infer", "at temperature 0 the answer is the same each time (--temperature 0.7)")
        self._tries += 1
        question = self.exchanges[-1].question
        if said := self._answer(self.exchanges[:-1], question):
            self.exchanges[-1] = Exchange(question, said.text, said.whole)
        else:
            console.note("infer", "the earlier answer stays")

    def undo(self, _: str = "") -> None:
        if not self.exchanges:
            console.result("(nothing to take back)")
            return
        gone = self.exchanges.pop()
        console.result(f"(taken back: {_short(gone.question)}; {_count(len(self.exchanges))} left)")

    def reset(self, _: str = "") -> None:
        self.exchanges, self._tries, self._id = [], 0, uuid.uuid4().hex
        console.result("(conversation forgotten)")

    def set_system(self, text: str) -> None:
        self.system = text or self.system
        console.result(f"(system message: {self.system})" if self.system else "(no system message)")

    def compare(self, text: str) -> None:
        """Base and tuned model on the same words, from the same weights, the adapter off and on."""
        if self.trained.kind != "adapter":
            console.result("(there is no adapter to switch off: /compare needs a run with one, and WHICH=tuned)")
            return
        if not text and not self.exchanges:
            console.result("(nothing to compare on yet: /compare TEXT)")
            return
        before = self.exchanges if text else self.exchanges[:-1]
        question = text or self.exchanges[-1].question
        with adapter_off(self.trained.model):
            base = self._answer(before, question, "base> ")
        if base and not self._stopped:
            self._answer(before, question, "tuned> ")

    def save(self, name: str) -> None:
        if not name or not self.exchanges:
            console.result("(nothing to save yet)" if name else "(where to? /save FILE.jsonl)")
            return
        try:
            path = Path(name).expanduser()
            count = conversation.save(path, conversation.row(self.system, self.exchanges, self._id))
        except SFTError as problem:
            console.error(problem.message, problem.hint)
            return
        cut = sum(not exchange.whole for exchange in self.exchanges)
        more = f"; {cut} of its answers not whole and marked to carry no loss" if cut else ""
        console.result(f"(saved as row {count:,} of {path}: {_count(len(self.exchanges))}{more})")

    def _answer(self, before: list[Exchange], question: str, label: str = "model> ") -> speaking.Said | None:
        """Stream the answer; None where there is none: an error, which is said, or Ctrl-C before the first word."""
        with speaking.ctrl_c() as stopped:
            try:
                new = self.settings.max_new_tokens
                window = conversation.window(self.trained, self.system, before, question, new)
                if window.left_out:
                    console.note("infer", _left_out(before, window.left_out, self.trained.max_length))
                sys.stdout.write(label)
                sys.stdout.flush()
                # a seed of its own for each turn, or the same question would sample the same answer for ever
                seed = self.settings.seed + 1000 * len(before) + self._tries
                said = speaking.answer(
                    self.trained, window.ids, self.settings, seed=seed, schema=self.schema, stopped=stopped
                )
            except SFTError as problem:
                console.result()
                console.error(problem.message, problem.hint)
                return None
        self._stopped = stopped.is_set()
        return said if said.text else None


def _left_out(before: list[Exchange], count: int, limit: int) -> str:
    what = "all that was said before" if count == len(before) else f"the first {_count(count)}"
    return (
        f"too long for the model's {limit:,} tokens: {what} (from {_short(before[0].question)} on) cannot be shown to it "
        "for this answer; /reset begins anew"
    )


def _count(exchanges: int) -> str:
    return f"{exchanges} exchange" + ("s" if exchanges != 1 else "")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"“{line[:40]}…”" if len(line) > 41 else f"“{line}”"
