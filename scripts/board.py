"""TensorBoard on outputs/: start it, stop it, or keep it beside a training run for as long as that lasts.

It listens on this machine only, shows one folder a run, and is stopped by process id and start time, never by name.
(The file is not called tensorboard.py: no file here bears the name of an installed package.)
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, files, lifetime, servers, stop_signals
from scripts.utils.errors import MachineError, UserError

HOST = servers.LOOPBACK
FOLDER = Path("outputs")
NOTE = FOLDER / ".tensorboard.json"  # process id, start time and port of the one this project started
LOG = FOLDER / ".tensorboard.log"
DEFAULT_PORT = 6006
PORTS_TRIED = 100


def free_port(wanted: int) -> int:
    """The first port from ``wanted`` on that nothing listens on; says so when it is another one."""
    last = min(wanted + PORTS_TRIED, 65536)
    for port in range(wanted, last):
        if servers.is_free(port):
            if port != wanted:
                console.note("tensorboard", f"port {wanted} is taken, using {port}")
            return port
    raise UserError(f"no free port from {wanted} to {last - 1}", "name another with PORT=")


def launch(port: int, *, keep: bool) -> subprocess.Popen[bytes]:
    """Start TensorBoard on ``port``; with ``keep`` it outlives this process and is noted for ``stop``."""
    import psutil

    FOLDER.mkdir(exist_ok=True)
    arguments = ["--logdir", str(FOLDER), "--host", HOST, "--port", str(port), "--load_fast", "false"]
    with LOG.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the training run
            preexec_fn=None if keep else lifetime.in_child,  # noqa: PLW1509 - this process has no threads
        )
    if keep:
        started = psutil.Process(process.pid).create_time()
        files.write_json(NOTE, {"pid": process.pid, "started": started, "port": port})
    return process


def running() -> dict[str, Any] | None:
    """The note of the TensorBoard that this project started, if that very process still lives."""
    if not NOTE.is_file():
        return None
    import psutil

    note: dict[str, Any] = files.read_json(NOTE)
    try:
        process = psutil.Process(note["pid"])
        # a process id is given out again; together with the start time it is this process and no other
        same = abs(process.create_time() - note["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        same = False
    return note if same else None


def address(port: int) -> str:
    return f"http://{HOST}:{port}/"


def wait_until_up(process: subprocess.Popen[bytes], port: int, seconds: float = 60) -> None:
    """Wait until it answers; raises ``MachineError`` when it ends or does not come up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = LOG.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise MachineError(
                f"TensorBoard ended with code {process.returncode}: {lines[-1]}", f"see {LOG.absolute()}"
            )
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.1)
    raise MachineError(f"TensorBoard did not answer within {seconds:.0f} s", f"see {LOG.absolute()}")


def start(port_text: str | None) -> None:
    wanted = servers.parse_port(port_text, DEFAULT_PORT)
    if note := running():
        console.result(f"TensorBoard is already running: {address(note['port'])}  (make tb-stop ends it)")
        return
    port = free_port(wanted)
    process = launch(port, keep=True)
    try:
        wait_until_up(process, port)
    except BaseException:
        stop()
        raise
    console.result(f"TensorBoard: {address(port)}  (make tb-stop ends it)")


def stop() -> None:
    note = running()
    if note is None:
        console.note("tensorboard", "none that this project started is running")
    else:
        import psutil

        end(psutil.Process(note["pid"]))
        console.note("tensorboard", f"stopped (process {note['pid']}, port {note['port']})")
    for path in (NOTE, LOG):
        path.unlink(missing_ok=True)


def end(process: Any) -> None:
    """Ask a process (psutil's or subprocess's) to end, and make it after 5 seconds."""
    process.terminate()
    try:
        process.wait(5)
    except Exception:  # psutil and subprocess have a TimeoutExpired each
        process.kill()
        process.wait(5)


def beside(words: Sequence[str], port_text: str | None, *, keep: bool) -> int:
    """Run ``words`` with TensorBoard beside it and return its exit code; signals are handed on to it, once each."""
    wanted = servers.parse_port(port_text, DEFAULT_PORT)
    board: subprocess.Popen[bytes] | None = None
    if note := running():
        console.note("tensorboard", f"already running: {address(note['port'])}")
    else:
        port = free_port(wanted)
        board = launch(port, keep=keep)
        console.note(
            "tensorboard", f"{address(port)}" + ("  (make tb-stop ends it)" if keep else "  (while this run lasts)")
        )
    try:
        return _run(words, board)
    finally:
        if board is not None and not keep:
            if board.poll() is None:
                end(board)
            LOG.unlink(missing_ok=True)


def _run(words: Sequence[str], board: subprocess.Popen[bytes] | None) -> int:
    console.outlast_readers()
    arrived: list[int] = []
    stop_signals.handle(lambda caught, frame: arrived.append(caught))
    try:
        # a session of its own: a Ctrl-C on the terminal reaches it through this process only, so never twice
        child = subprocess.Popen(words, start_new_session=True, preexec_fn=lifetime.in_child)  # noqa: PLW1509
    except OSError as error:
        raise UserError(f"{words[0]}: cannot be run ({error.strerror})", "check the command after --") from error
    while True:
        while arrived:
            child.send_signal(arrived.pop(0))
        try:
            code = child.wait(0.2)
            break
        except subprocess.TimeoutExpired:
            pass
        if board is not None and board.poll() is not None:
            console.warn(f"TensorBoard ended with code {board.returncode} (see {LOG.absolute()}); the run goes on")
            board = None
    if code < 0:
        # it could not say its last line itself
        console.error(f"the run was ended by signal {-code} ({signal.Signals(-code).name})")
        code = 128 - code
        console.exit_code("sft-board", code)
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-board",
        description=__doc__,
        epilog="examples:\n  sft-board start --port 7000\n  sft-board stop\n  sft-board with -- python scripts/train.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["start", "stop", "with"], help="with: beside the command after --")
    parser.add_argument("--port", default=command.from_make("PORT"), help=f"first port to try (default {DEFAULT_PORT})")
    keep = command.truthy(command.from_make("KEEP_TB"))
    parser.add_argument(
        "--keep", action="store_true", default=keep, help="leave it running after the command (KEEP_TB=1)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    own, words = given[:split], given[split + 1 :]
    parser = build_parser()
    arguments = parser.parse_args(own)
    if (arguments.action == "with") != bool(words):
        parser.error("'with' needs a command after --, and only 'with' takes one")
    outcome = [0]

    def work() -> None:
        if arguments.action == "start":
            start(arguments.port)
        elif arguments.action == "stop":
            stop()
        else:
            outcome[0] = beside(words, arguments.port, keep=arguments.keep)

    # the command has said its own exit code; ours is said only when the fault is ours
    return command.guard("sft-board", work) or outcome[0]


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    raise SystemExit(main())
