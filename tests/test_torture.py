"""A small share of `make torture`: kills at random moments and at crash points, a full disk, signals."""

import sys
from pathlib import Path

import pytest

from tests import commands

pytestmark = pytest.mark.slow


def test_no_kill_no_full_disk_and_no_signal_loses_a_step_or_changes_the_result(tmp_path: Path) -> None:
    # in a process of its own: it forks, and its hooks stay for good
    words = [sys.executable, "-m", "tests.torture", "--kills", "10", "--points", "24", "--full", "12", "--stops", "20"]
    done = commands.run(words, commands.ROOT, TMPDIR=str(tmp_path), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "compared, 0 failures" in done.stdout


def test_torture_finds_a_save_that_is_not_atomic(tmp_path: Path) -> None:
    """The harness itself: were checkpoints written in place and unsealed, it would say so."""
    code = (
        "import contextlib, sys\n"
        "from scripts.utils import checkpoints\n"
        "@contextlib.contextmanager\n"
        "def landing(run_folder, step, identity=None, need_bytes=0):\n"
        "    yield run_folder\n"
        "checkpoints.landing = landing\n"
        "checkpoints.damage = lambda folder: None\n"
        "checkpoints.identity_in = lambda folder: {}\n"
        "from tests import torture\n"
        "sys.argv = ['torture', '--kills', '0', '--points', '20', '--full', '0', '--stops', '0']\n"
        "raise SystemExit(torture.main())\n"
    )
    done = commands.run([sys.executable, "-c", code], commands.ROOT, TMPDIR=str(tmp_path), timeout=900)
    assert done.returncode == 1 and "compared, 0 failures" not in done.stdout, done.stdout + done.stderr[-2000:]
