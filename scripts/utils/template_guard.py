"""Chat templates that come from outside, rendered in a child with limits on time, memory and output.

The child (``template_child``) lives on for the next rows, as its start costs about 0.4 s. It ends with this process,
however that ends: its standard input closes.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from scripts.utils import template_child
from scripts.utils.errors import MachineError, RefusedError

SECONDS = 10.0  # for one conversation
OUTPUT = 16 << 20  # bytes of one reply
_START_SECONDS = 60.0
_KEPT_ENVIRONMENT = "LD_LIBRARY_PATH DYLD_LIBRARY_PATH PYTHONHOME PYTHONHASHSEED PYTHONDONTWRITEBYTECODE TZ".split()
_MOST_CHILDREN = 4

_children: dict[tuple[int, str], "_Child"] = {}  # by process id too: a fork must not talk to its parent's child
_lock = threading.Lock()


def render_outside(
    template: str, source: str, call: dict[str, Any], seconds: float = SECONDS
) -> tuple[str, list[tuple[int, int]]]:
    """As ``template_child.render``, in the child. Raises ``ValueError`` with the template's own error, ``RefusedError`` at a limit."""
    with _lock:
        key = (os.getpid(), template)
        if key not in _children:
            while len(_children) >= _MOST_CHILDREN:
                _children.pop(next(iter(_children))).end()
            _children[key] = _Child(template)
        try:
            reply = json.loads(_children[key].ask([seconds, call], seconds))
            if "limit" in reply:
                raise _Stopped(reply["limit"])
        except BaseException as problem:  # an interrupted exchange leaves half a reply in the pipe
            how = _children.pop(key).end()
            if not isinstance(problem, _Stopped | OSError):
                raise
            why = str(problem) if isinstance(problem, _Stopped) else f"its process ended ({how})"
            raise RefusedError(
                f"the chat template ({source}) was stopped: {why}", "use another render.template"
            ) from None
    if "error" in reply:
        raise ValueError(reply["error"])
    return str(reply["text"]), [(int(start), int(end)) for start, end in reply["spans"]]


class _Stopped(Exception):
    """The child came to a limit; the message says which."""


class _Child:
    def __init__(self, template: str) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", template_child.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=os.path.abspath(os.sep),
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        if hasattr(select, "poll"):
            os.set_blocking(self.stdin, False)
        try:
            self.ask(template, _START_SECONDS)
        except (_Stopped, OSError):
            raise MachineError(
                f"cannot start the process that renders chat templates ({self.end()})", "see the lines above"
            ) from None
        except BaseException:
            self.end()
            raise

    def ask(self, question: Any, seconds: float) -> bytes:
        """One line there, one line back; raises ``_Stopped`` at the limits and ``OSError`` when the child ends."""
        line = json.dumps(question).encode() + b"\n"  # before anything is sent: it may not be JSON at all
        if not hasattr(select, "poll"):  # Windows
            return self._ask_in_thread(line, seconds)
        deadline = time.monotonic() + seconds
        unsent, got, poll = memoryview(line), bytearray(), select.poll()
        poll.register(self.stdin, select.POLLOUT)
        poll.register(self.stdout, select.POLLIN)
        while not got.endswith(b"\n"):
            left = deadline - time.monotonic()
            events = poll.poll(max(left, 0) * 1000)
            if not events or left < 0:
                raise _Stopped(f"it took longer than {seconds:g} s for one conversation")
            for descriptor, _ in events:
                if descriptor == self.stdin:
                    unsent = unsent[os.write(self.stdin, unsent) :]
                    if not unsent:
                        poll.unregister(self.stdin)
                    continue
                chunk = os.read(self.stdout, 1 << 18)
                if not chunk:
                    raise BrokenPipeError
                got += chunk
                if len(got) > OUTPUT:
                    raise _Stopped(f"it wrote more than {OUTPUT >> 20} MiB for one conversation")
        return bytes(got)

    def _ask_in_thread(self, line: bytes, seconds: float) -> bytes:
        """As ``ask``, where pipes cannot be polled: a thread of its own waits, and ends when the child is killed."""
        got, problems = bytearray(), list[OSError]()

        def exchange() -> None:
            unsent = memoryview(line)
            try:
                while unsent:
                    unsent = unsent[os.write(self.stdin, unsent) :]
                while not got.endswith(b"\n") and len(got) <= OUTPUT:
                    chunk = os.read(self.stdout, 1 << 18)
                    if not chunk:
                        raise BrokenPipeError
                    got.extend(chunk)
            except OSError as problem:
                problems.append(problem)

        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise _Stopped(f"it took longer than {seconds:g} s for one conversation")
        if problems:
            raise problems[0]
        if len(got) > OUTPUT:
            raise _Stopped(f"it wrote more than {OUTPUT >> 20} MiB for one conversation")
        return bytes(got)

    def end(self) -> str:
        """Kill the child, if it has not ended by itself, and say how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.05)  # its pipe closes a moment before it can be waited for
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@atexit.register
def _end_all() -> None:
    for (process_id, _), child in list(_children.items()):
        if process_id == os.getpid():
            child.process.kill()
    _children.clear()
