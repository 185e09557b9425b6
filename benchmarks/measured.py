"""A command with its wall time, the peak memory of its whole process tree, and when it said what."""

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_EVERY = 0.1  # seconds between two looks at the memory


@dataclass(frozen=True)
class Measured:
    """``peak_bytes`` is proportional set size: a page that processes share counts once. Where the system does not tell it, resident size.

    ``lines`` are what the command printed, each with the seconds since its start.
    """

    seconds: float
    peak_bytes: int
    lines: tuple[tuple[float, str], ...] = ()


def run(command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> Measured:
    """Run ``command`` in ``folder``; ends this program with the command's own words when it fails."""
    lines: list[tuple[float, str]] = []
    start, peak = time.monotonic(), 0
    process = psutil.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )

    def listen() -> None:
        lines.extend((time.monotonic() - start, line.rstrip("\n")) for line in process.stdout)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        while process.poll() is None:
            peak = max(peak, _memory(process))
            try:
                process.wait(_EVERY)
            except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
                continue
    finally:
        if process.poll() is None:
            process.kill()
    seconds = time.monotonic() - start
    listener.join(5)
    text = "".join(f"{line}\n" for _, line in lines)
    (folder / "log.txt").write_text(text)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{text[-3000:]}")
    return Measured(seconds, peak, tuple(lines))


def status(name: str) -> int | None:
    """A line of /proc/self/status, as VmHWM, in bytes; None where the system has none (it is Linux's)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _memory(process: psutil.Process) -> int:
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for member in family:
        try:
            total += getattr(member.memory_full_info(), "pss", 0) or member.memory_info().rss
        except psutil.Error:
            continue
    return total
