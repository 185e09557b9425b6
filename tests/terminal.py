"""A program on a pseudo terminal, typed at and read as a person would."""

import os
import pty
import re
import select
import signal
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.commands import environment

ENTER, ALT_ENTER, UP, LEFT, CTRL_C, CTRL_D, TAB = "\r", "\x1b\r", "\x1b[A", "\x1b[D", "\x03", "\x04", "\t"
_WHERE = b"\x1b[6n"  # a program asks where the cursor is, and a terminal answers
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>78]|\x1b\][^\x07]*\x07|\r")


def pasted(text: str) -> str:
    """What a terminal sends for text from the clipboard (bracketed paste); line breaks are sent as carriage returns."""
    return "\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~"


class Terminal:
    """Runs ``words`` on a terminal of its own, 100 columns wide; Ctrl-C reaches the program as from a keyboard."""

    def __init__(self, words: Sequence[str | Path], cwd: Path, **extra: str) -> None:
        self._end, terminal = pty.openpty()
        import fcntl
        import termios

        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))

        def own_terminal() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started with
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.program = subprocess.Popen(
            [str(word) for word in words],
            cwd=cwd,
            env=environment(**{"TERM": "xterm-256color", **extra}),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            preexec_fn=own_terminal,  # noqa: PLW1509 - this process has no threads that hold locks
        )
        os.close(terminal)
        self._raw = b""
        self._read = 0  # bytes of it that were waited for already
        # an editor of lines asks the terminal to mark what is pasted, each time that it begins to read
        self._prompt = "you> " if extra.get("TERM") == "dumb" else "\x1b[?2004h"

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Read until ``text`` appears after what was waited for before; returns what came before it, without codes."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self._raw[self._read :]:
            ready, _, _ = select.select([self._end], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no {text!r} in: {self._raw[-2000:]!r}"
            try:
                new = os.read(self._end, 4096)
            except OSError:  # the program has ended
                new = b""
            assert new, f"the program ended without {text!r}: {self._raw[-2000:]!r}"
            if _WHERE in new:
                os.write(self._end, b"\x1b[40;1R" * new.count(_WHERE))
            self._raw += new
        before, _, _ = self._raw[self._read :].partition(text.encode())
        self._read += len(before) + len(text.encode())
        return _CONTROL.sub("", before.decode(errors="replace"))

    def wait_for_prompt(self, seconds: float = 120) -> str:
        """Read until the program reads a line; returns what it has shown until then."""
        return self.wait_for(self._prompt, seconds)

    def ask(self, text: str, seconds: float = 120) -> str:
        """Type a message at the prompt and return all that is shown until the next prompt."""
        self.type(text + ENTER)
        return self.wait_for_prompt(seconds)

    def ended(self, seconds: float = 60) -> int:
        """Read to the end, and give the exit code."""
        deadline = time.monotonic() + seconds
        while self.program.poll() is None and time.monotonic() < deadline:
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    self._raw += os.read(self._end, 4096)
                except OSError:
                    break
        return self.program.wait(max(deadline - time.monotonic(), 1))

    def hang_up(self) -> None:
        """Close the terminal, as its window does: the system sends SIGHUP, and all that is written from then on fails."""
        os.close(self._end)
        self._end = -1

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.program.poll() is None:
            self.program.send_signal(signal.SIGKILL)
        self.program.wait()
        if self._end >= 0:
            os.close(self._end)
