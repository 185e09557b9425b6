"""What is said reaches its reader, whatever encoding and streams a step was started with; and where it cannot, nothing else suffers."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, environment

# a step that speaks on both streams, and a library that prints past Python into what it takes for the output
PROGRAM = """
import os, sys
from pathlib import Path
from scripts.utils import command, console

def start():
    with open("precious", "w") as file:
        for number in (1, 2):
            os.write(number, b"noise of a library\\n")
        console.note("test", "a → b")
        console.result("c → d")
        console.table("t", ["e"], [["→"]])
        file.write("data")
    sys.stdin.read()

sys.exit(command.guard("sft-test", start))
"""


def started(folder: Path, redirection: str = "", **extra: str) -> "subprocess.CompletedProcess[bytes]":
    words = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PROGRAM]
    return subprocess.run(
        words,
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), **extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_closed_leads_nowhere_and_never_into_a_file(tmp_path: Path, redirection: str) -> None:
    done = started(tmp_path, redirection)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize("redirection", ["| head -c 1", "2>&1 >/dev/null | head -c 1"])
def test_a_reader_who_leaves_ends_a_step_quietly(tmp_path: Path, redirection: str) -> None:
    """``make eval | head``: no words of Python's own, and the exit code that a broken pipe has."""
    program = """
import sys
from scripts.utils import command, console

def start():
    for _ in range(200_000):
        console.result("result")
        console.note("test", "note")

code = command.guard("sft-test", start)
open("code", "w").write(str(code))
sys.exit(code)
"""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, program],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (tmp_path / "code").read_text() == "141"
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_letters_that_an_encoding_lacks_are_spelled_out(tmp_path: Path, encoding: str) -> None:
    done = started(tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode()
    arrow = "→" if encoding == "utf-8" else "\\u2192"
    assert encoding == "utf-8" or "\\u2500" not in done.stdout.decode(encoding), "a table's lines are drawn in ASCII"
    assert f"test: a {arrow} b" in done.stderr.decode(encoding) and f"c {arrow} d" in done.stdout.decode(encoding)
