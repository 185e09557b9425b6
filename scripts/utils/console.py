"""What a person sees: one line an event, tables at the end, progress with a rate, colour only on a terminal.

Progress, notes and errors go to stderr; results go to stdout, so that they can be piped.
"""

import contextlib
import errno
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}


def prepare_streams() -> None:
    """Let every word be written, whatever this process was started with. Call before anything is opened.

    Where a stream was closed (``>&-``, some services), it leads nowhere: else the next file that is opened would get its
    number, and what libraries print would land in that file. Letters that an encoding lacks are spelled out.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def use_colour(stream: TextIO) -> bool:
    """Colour only on a terminal, never with NO_COLOR (see no-color.org) or TERM=dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if use_colour(stream) else text


_outlasts = False  # whether the work goes on where nobody is left to read


def outlast_readers() -> None:
    """From now on, words for a reader who has gone are dropped: a `| tee` that the same Ctrl-C ended, a closed terminal.

    For work that must not be lost for want of one. Elsewhere a closed pipe ends the step, as `| head` wants it.
    """
    global _outlasts
    _outlasts = True


def _say(text: str, stream: TextIO, end: str = "\n", *, last: bool = False) -> None:
    """``last`` words of a step never fail: its exit code says the same."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as problem:
        if not (_outlasts or last) or problem.errno not in (errno.EPIPE, errno.EIO):
            raise
        # what libraries would write there must not fail either
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def note(step: str, text: str) -> None:
    """One event of a step, on stderr: ``train: step 40/200  loss 1.83``."""
    _say(f"{paint(step + ':', 'cyan', sys.stderr)} {text}", sys.stderr)


def note_in_handler(step: str, text: str) -> None:
    """``note`` for a signal's handler, which may run in the middle of another message: past Python's buffers."""
    with contextlib.suppress(OSError):
        os.write(2, f"{paint(step + ':', 'cyan', sys.stderr)} {text}\n".encode())


def warn(text: str) -> None:
    _say(f"{paint('warning:', 'yellow', sys.stderr)} {text}", sys.stderr)


def error(message: str, hint: str = "") -> None:
    _say(f"{paint('error:', 'red', sys.stderr)} {message}", sys.stderr, last=True)
    if hint:
        _say(f"{paint('hint:', 'yellow', sys.stderr)} {hint}", sys.stderr, last=True)


def exit_code(name: str, code: int) -> None:
    """The last line of a step that failed: make turns any code into its own 2, so the real one is said here."""
    _say(f"{name}: exit code {code}", sys.stderr, last=True)


def result(text: str = "") -> None:
    _say(text, sys.stdout)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> None:
    """Print a table to stdout; the first ``left`` columns are set left, the others right."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    lines = box.SIMPLE_HEAD if (sys.stdout.encoding or "utf-8").lower().startswith("utf") else box.ASCII2
    output = Table(title=escape(title), title_justify="left", title_style="bold", box=lines, pad_edge=False)
    for number, name in enumerate(header):
        output.add_column(escape(name), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        output.add_row(*(escape(str(cell)) for cell in row))
    # off a terminal rich assumes 80 columns and would fold long paths
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 140
    drawn = io.StringIO()  # rich's own writing would fail where nobody is left to read
    coloured = use_colour(sys.stdout)
    Console(file=drawn, width=width, force_terminal=coloured, no_color=not coloured, highlight=False).print(output)
    _say(drawn.getvalue(), sys.stdout, end="")


def facts(title: str, pairs: Sequence[tuple[str, object]]) -> None:
    """Print a title and aligned ``name  value`` lines to stdout."""
    result(paint(title, "bold", sys.stdout))
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        result(f"  {name.ljust(width)}  {value}")


def duration(seconds: float) -> str:
    """Seconds as people say them: ``42s``, ``3m 05s``, ``2h 10m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Bytes with a binary unit: ``5.1 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class Progress:
    """Counts finished units and reports them with a rate and the time left.

    On a terminal one line is rewritten; elsewhere a line appears every ``interval`` seconds. Where ``total`` is not
    known, ``share`` may say what part of the work is done, in [0, 1].
    """

    def __init__(
        self,
        step: str,
        unit: str,
        total: int | None = None,
        interval: float = 10.0,
        share: Callable[[], float] | None = None,
    ) -> None:
        self.step, self.unit, self.total = step, unit, total
        self.done = 0
        self._share = share or (lambda: self.done / total if total else 0.0)
        self._live = sys.stderr.isatty()
        self._interval = 0.1 if self._live else interval
        self._start = self._shown = time.monotonic()

    def advance(self, count: int = 1, detail: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            self._show(detail)

    def _show(self, detail: str) -> None:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = self.done / elapsed
        text = f"{self.done:,}" + (f"/{self.total:,}" if self.total else "") + f" {self.unit}  {rate:,.1f}/s"
        if 0 < (share := self._share()) <= 1:
            text += f"  {duration(elapsed * (1 - share) / share)} left"
        if detail:
            text += f"  {detail}"
        if self._live:
            _say(f"\r\x1b[K{paint(self.step + ':', 'cyan', sys.stderr)} {text}", sys.stderr, end="")
        else:
            note(self.step, text)

    def close(self) -> None:
        """End the live line, so that the next message starts on a line of its own."""
        if self._live:
            _say("\r\x1b[K", sys.stderr, end="")
