"""A trial: something that may crash or hang, run in a child process with a limit on its time; whatever happens is told.

The child (``trial_child``, or Unsloth's ``unsloth_child``) says one JSON object a line; libraries print their own lines to
the same place.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scripts.utils import servers
from scripts.utils.files import REPO_ROOT

MARK = "sft-trial "  # begins the child's own lines
SECONDS = 90.0  # importing torch from a slow disk, and the first start of CUDA, take half a minute each


@dataclass(frozen=True)
class Trial:
    """A child at work."""

    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    began: float


@dataclass(frozen=True)
class Ended:
    """What the child said, its exit ``code`` (None: its time was up), and the last line that was not its own.

    ``reason`` says how it ended where it did not end well, else it is empty.
    """

    said: list[dict[str, Any]]
    code: int | None
    last: str
    reason: str

    @property
    def hung(self) -> bool:
        return self.code is None

    def get(self, key: str) -> Any:
        """What was said last under ``key``, or None."""
        return next((line[key] for line in reversed(self.said) if key in line), None)


def start(*words: str, question: dict[str, Any], folder: Path | None = None) -> Trial:
    """Start a module of scripts.utils with its arguments, in ``folder``; ``question`` reaches it through its standard input."""
    path = os.pathsep.join(filter(None, (str(REPO_ROOT), os.environ.get("PYTHONPATH"))))
    output = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed by ``finish``
    with tempfile.TemporaryFile("w+b") as asked:
        asked.write(json.dumps(question).encode())
        asked.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-P", "-X", "faulthandler", "-m", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdin=asked,
            stdout=output,  # a file: a library may leave workers behind that would hold a pipe open
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Trial(process, output, time.monotonic())


def finish(trial: Trial, seconds: float = SECONDS) -> Ended:
    """Wait for the trial's end, at most until ``seconds`` after its start; its children end with it."""
    try:
        code: int | None = trial.process.wait(max(trial.began + seconds - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        stop(trial)
    trial.output.seek(0)
    lines = trial.output.read().decode(errors="replace").splitlines()
    trial.output.close()
    said = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    last = next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith(MARK)), "no message")
    return Ended(said, code, last[:300], _reason(code, seconds, said, last[:300]))


def stop(trial: Trial) -> None:
    """Kill the child and what it started, if it still runs."""
    servers.kill_session(trial.process)
    trial.process.wait()


def _reason(code: int | None, seconds: float, said: list[dict[str, Any]], last: str) -> str:
    if code == 0:
        return ""
    stage = next((line["stage"] for line in reversed(said) if "stage" in line), "starting")
    if code is None:
        return f"it did not end within {seconds:g} seconds, while {stage}"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name} while {stage}"
    return f"it ended with code {code} while {stage}: {last}"
