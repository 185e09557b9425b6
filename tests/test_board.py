"""TensorBoard beside a run: on this machine only, the next port when one is taken, and no process left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.commands import ROOT, environment, script

BOARD = [sys.executable, str(ROOT / "scripts" / "board.py")]
# notes that it runs and each signal that it gets, and ends itself at the first
RUN = """
import os, signal, sys, time
def stop(number, frame):
    open("signals", "a").write(f"{number}\\n")
    time.sleep(0.5)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)
open("running", "w").write(str(os.getpid()))
time.sleep(60)
"""


def boards() -> dict[int, psutil.Process]:
    """The TensorBoard processes on this machine."""
    found = {}
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if "tensorboard.main" in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found[process.pid] = process
    return found


def mine(folder: Path) -> list[psutil.Process]:
    """Those that were started in ``folder``."""
    here = []
    for process in boards().values():
        with contextlib.suppress(psutil.NoSuchProcess):
            if Path(process.cwd()) == folder:
                here.append(process)
    return here


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on already."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run with TensorBoard beside it."""
    process = subprocess.Popen(
        [*BOARD, "with", "--", sys.executable, "-c", RUN],
        cwd=tmp_path,
        env=environment(SFT_PORT="16006"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for((tmp_path / "running").exists)
        wait_for(lambda: mine(tmp_path))
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for stray in mine(tmp_path):
            stray.kill()


def test_start_says_where_it_listens_only_on_this_machine_and_stop_ends_just_that_one(tmp_path, taken):
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "tensorboard.main"], cwd=tmp_path
    )
    try:
        done = script("board", "start", "--port", str(taken), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"port {taken} is taken" in done.stderr
        address = done.stdout.split()[1]
        assert address.startswith("http://127.0.0.1:")
        assert urllib.request.urlopen(address, timeout=30).status == 200
        (board,) = [process for process in mine(tmp_path) if process.pid != bystander.pid]
        listening = [c.laddr.ip for c in board.net_connections() if c.status == psutil.CONN_LISTEN]
        assert listening == ["127.0.0.1"]
        assert "already running" in script("board", "start", cwd=tmp_path).stdout
        assert script("board", "stop", cwd=tmp_path).returncode == 0
        assert not board.is_running()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_stop_leaves_a_process_alone_that_got_the_old_process_id(tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "outputs").mkdir()
        note = f'{{"pid": {bystander.pid}, "started": 1000000.0, "port": 6006}}'
        (tmp_path / "outputs" / ".tensorboard.json").write_text(note)
        assert script("board", "stop", cwd=tmp_path).returncode == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_exit_code_of_the_run_is_kept_and_nothing_stays_behind(tmp_path):
    words = [sys.executable, "-c", "import time, sys; time.sleep(1); sys.exit(5)"]
    done = script("board", "with", "--", *words, cwd=tmp_path)
    assert done.returncode == 5
    assert "http://127.0.0.1:" in done.stderr
    assert mine(tmp_path) == []
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_once_and_nothing_stays_behind(beside, tmp_path, number):
    beside.send_signal(number)
    assert beside.wait(30) == 128 + number
    assert (tmp_path / "signals").read_text() == f"{int(number)}\n"
    assert mine(tmp_path) == []


def test_ctrl_c_on_the_terminal_reaches_the_run_once(beside, tmp_path):
    os.killpg(beside.pid, signal.SIGINT)  # a terminal signals the whole foreground group
    assert beside.wait(30) == 130
    assert (tmp_path / "signals").read_text() == "2\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_nothing_stays_behind_even_when_the_wrapper_is_killed(beside, tmp_path):
    beside.kill()
    wait_for(lambda: not mine(tmp_path), 20)
    wait_for((tmp_path / "signals").exists, 20)
    assert (tmp_path / "signals").read_text() == "15\n"


def test_keep_tb_leaves_it_running_until_tb_stop(tmp_path):
    try:
        done = script("board", "with", "--", sys.executable, "-c", "0", cwd=tmp_path, SFT_KEEP_TB="1", SFT_PORT="16106")
        assert done.returncode == 0
        assert len(mine(tmp_path)) == 1
        assert script("board", "stop", cwd=tmp_path).returncode == 0
        assert mine(tmp_path) == []
    finally:
        for stray in mine(tmp_path):
            stray.kill()


@pytest.mark.parametrize("port", ["abc", "0", "70000", "-1", "6006.5", "６００６"])
def test_a_port_that_is_none_is_the_users_error_and_starts_nothing(tmp_path, port):
    done = script("board", "with", "--", "touch", "ran", cwd=tmp_path, SFT_PORT=port)
    assert done.returncode == 2
    assert f"PORT={port}: not a port" in done.stderr
    assert list(tmp_path.iterdir()) == []
