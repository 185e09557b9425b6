"""What programs that listen on a port have in common: is the port free, and the end of a child."""

import contextlib
import os
import signal
import socket
import subprocess

from scripts.utils.errors import UserError

LOOPBACK = "127.0.0.1"


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
