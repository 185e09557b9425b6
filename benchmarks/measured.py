"""A command with its wall time and the peak memory of its whole process tree."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_EVERY = 0.1  # seconds between two looks at the memory


@dataclass(frozen=True)
class Measured:
    """``peak_bytes`` is proportional set size: a page that processes share counts once. Where the system does not tell it, resident size."""

    seconds: float
    peak_bytes: int


def run(command: Sequence[str], folder: Path) -> Measured:
    """Run ``command`` in ``folder``; ends this program with the command's own words when it fails."""
    log = folder / "log.txt"
    start, peak = time.monotonic(), 0
    with log.open("w") as output:
        process = psutil.Popen(command, cwd=folder, stdout=output, stderr=output)
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
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
    return Measured(seconds, peak)


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
