"""What programs that listen on a port have in common: is the port free, and a child that never outlives its parent."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys

from scripts.utils.errors import UserError

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def parse_port(text: str | None, default: int) -> int:
    """The port asked for, or ``default``; anything but 1-65535 is a ``UserError``."""
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise UserError(f"PORT={text}: not a port", "give a number from 1 to 65535, or leave PORT out")
    return int(text)


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex((LOOPBACK, port)) == 0:
            return False
    with socket.socket(family) as probe:
        # as servers do: a connection that has just ended does not keep the port
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def die_with_parent() -> None:
    """In a new child on Linux: get SIGTERM when the parent dies, even by SIGKILL (prctl(2)). Elsewhere: nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


# for Popen's preexec_fn, which other systems may not have at all
in_child = die_with_parent if sys.platform == "linux" else None


def end(process: "subprocess.Popen[bytes]", first: int = signal.SIGTERM, seconds: float = 5) -> None:
    """Ask a child to end, and make it after ``seconds``."""
    process.send_signal(first)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(seconds)


def kill_session(process: "subprocess.Popen[bytes]") -> None:
    """Kill a child that leads a session of its own, and whatever it started; one that has ended is no error."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
    else:  # Windows has no groups
        process.kill()
