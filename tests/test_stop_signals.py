"""Ctrl-C and SIGTERM end a step with their own exit code, wherever in the work they arrive. In a process of its own."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.commands import ROOT, environment

ALL = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 143, "terminated")]


def step(work: str, number: signal.Signals) -> "subprocess.CompletedProcess[str]":
    """A step whose work is this text; ``stop()`` in it sends itself the signal."""
    program = f"""
import os, sys, time, weakref
from scripts.utils import command, stop_signals

def stop():
    os.kill(os.getpid(), {int(number)})

class Thing:
    pass

def start():
{textwrap.indent(textwrap.dedent(work), "    ")}

sys.exit(command.guard("sft-test", start))
"""
    words = [sys.executable, "-c", program]
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("number", "code", "word"), ALL)
@pytest.mark.parametrize(
    "work",
    [
        "stop(); time.sleep(30)",
        # what a callback raises is printed and forgotten by Python: seen at the end of an import
        """
        thing = Thing()
        seen = weakref.ref(thing, lambda _: stop())
        del thing
        time.sleep(30)
        """,
        """
        class Last:
            def __del__(self):
                stop()
        Last()
        time.sleep(30)
        """,
        # lost twice, the second time while Python is in another callback
        """
        class Slow:
            def __del__(self):
                stop()
                time.sleep(1)
        class Slower:
            def __del__(self):
                time.sleep(0.1)
        Slow()
        for _ in range(100):
            Slower()
            time.sleep(0.05)
        """,
        # a library that makes it an error of its own: pydantic does, while it builds a model
        """
        try:
            stop()
            time.sleep(30)
        except BaseException as error:
            raise ValueError(repr(error))
        """,
        """
        from scripts.utils.errors import UserError
        try:
            stop()
            time.sleep(30)
        except BaseException as error:
            raise UserError(repr(error), "mend it")
        """,
    ],
    ids=["plain", "weak reference", "finalizer", "finalizers", "another error", "an error of ours"],
)
def test_it_gets_through(work: str, number: signal.Signals, code: int, word: str) -> None:
    done = step(work, number)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines() == [
        f"error: {word}",
        "hint: run the same command again to go on",
        f"sft-test: exit code {code}",
    ]


TWICE = """
try:
    stop()
    time.sleep(30)
finally:
    stop()
    time.sleep(0.2)
    stop()
    print("cleaned up", flush=True)
"""


def test_what_make_hands_on_once_more_does_not_cut_the_cleaning_up_short() -> None:
    done = step(TWICE, signal.SIGTERM)
    assert done.returncode == 143 and done.stdout == "cleaned up\n", done.stderr
    assert done.stderr.splitlines()[0] == "error: terminated" and "Traceback" not in done.stderr


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    done = step(TWICE, signal.SIGINT)
    assert done.returncode == 130 and done.stdout == "", done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_all_is_said_a_signal_ends_it_without_a_traceback(number: signal.Signals) -> None:
    work = """
    import atexit
    def late():
        time.sleep(5.1)  # longer than a second SIGTERM counts as an echo
        stop()
        time.sleep(30)
    atexit.register(late)
    stop()
    time.sleep(30)
    """
    done = step(work, number)
    assert done.returncode == -number and "Traceback" not in done.stderr


def test_while_its_modules_load_a_ctrl_c_ends_a_step_without_a_traceback(tmp_path: Path) -> None:
    slow = tmp_path / "yaml.py"
    slow.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    words = [sys.executable, ROOT / "scripts" / "render.py"]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (130, -signal.SIGINT) and "Traceback" not in done.stderr, done.stderr


def test_a_finalizers_own_error_is_still_shown() -> None:
    done = step("class Last:\n    def __del__(self):\n        raise ValueError('mine')\nLast()", signal.SIGINT)
    assert done.returncode == 0 and "ValueError: mine" in done.stderr


def test_an_error_after_one_that_was_answered_is_an_error() -> None:
    work = """
    try:
        stop()
        time.sleep(30)
    except KeyboardInterrupt:
        stop_signals.answered()
    raise ValueError("of its own")
    """
    done = step(work, signal.SIGINT)
    assert done.returncode == 1 and "ValueError: of its own" in done.stderr


def test_one_that_is_ignored_stays_ignored() -> None:
    words = ["sh", "-c", f"trap '' INT; exec {sys.executable} -c \"$0\""]
    program = "import os, signal; from scripts.utils import command; command.guard('x', lambda: os.kill(os.getpid(), signal.SIGINT)); print('went on')"
    done = subprocess.run([*words, program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "went on\n", done.stderr
