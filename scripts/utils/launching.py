"""``NPROC``: a run as several processes, started and watched by torchrun's own launcher.

Here the processes are counted and checked before any starts, and what they leave behind becomes one message and one exit
code. torchrun hands Ctrl-C and SIGTERM on to the ranks, and ends the others when one of them is gone.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, ranks, stop_signals, workers
from scripts.utils.errors import MachineError, SFTError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

PATIENCE = 600  # seconds that ranks have to finish their step and save when they are asked to stop
_PORT = 29500


@dataclass(frozen=True)
class Layout:
    """``processes`` on each of ``machines``; ``main``: host and port of the machine with the number 0."""

    processes: int = 1
    machines: int = 1
    machine: int = 0
    main: str = ""

    @property
    def world(self) -> int:
        return self.processes * self.machines


def layout() -> Layout:
    """What NPROC, MACHINES, MACHINE and MAIN ask for; raises ``UserError`` where that is no number, or not enough."""
    found = Layout(
        processes=_number("NPROC", 1, least=1),
        machines=_number("MACHINES", 1, least=1),
        machine=_number("MACHINE", 0, least=0),
        main=os.environ.get("SFT_MAIN") or "",
    )
    if found.machines > 1 and not found.main:
        raise UserError(
            f"MACHINES={found.machines} needs the address of the first one", "for example: MAIN=10.0.0.1:29500"
        )
    if found.machine >= found.machines:
        raise UserError(
            f"MACHINE={found.machine} with MACHINES={found.machines}", "the machines are numbered from 0 on"
        )
    return found


def _number(name: str, default: int, *, least: int) -> int:
    words = os.environ.get(f"SFT_{name}") or str(default)
    if not words.isascii() or not words.isdigit() or int(words) < least:
        raise UserError(f"{name} is {words!r}, expected a whole number from {least} on", f"for example: {name}=2")
    return int(words)


def facts(engine: str) -> dict[str, Any] | None:
    """For the stamp: how many processes run and how they work together; None for one."""
    if ranks.world_size() < 2:
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.world_size())
    return {"processes": ranks.world_size(), "machines": max(1, ranks.world_size() // here), "engine": engine}


def check(wanted: Layout, config: "Config") -> None:
    """Refuse what cannot run as several processes, before any of them starts."""
    asked = f"NPROC={wanted.processes}" + (f" MACHINES={wanted.machines}" if wanted.machines > 1 else "")
    if config.tuning.backend == "unsloth":
        raise UserError(
            f"{asked}: Unsloth trains as one process here", "use bitsandbytes: make train-bnb, with the same NPROC"
        )
    if sys.platform != "linux":
        raise MachineError(
            f"{asked}: several processes need Linux: torch has none that work together on a Mac's GPU, nor NCCL on Windows",
            "leave NPROC out",
        )
    import torch

    cards = torch.cuda.device_count()
    if wanted.processes > (cards or workers.cores()):
        there = f"{cards} GPU{'s' * (cards > 1)}" if cards else f"no GPU and {workers.cores()} processors"
        raise MachineError(
            f"{asked}: this machine has {there}", f"at most NPROC={cards or workers.cores()} here, a process on each"
        )


def run(wanted: Layout, script: Path, words: Sequence[str]) -> int:
    """Start ``script`` with its arguments as ranks, and wait until all have ended well.

    Raises the error of the rank that failed first: its message, its exit code.
    """
    folder = Path(tempfile.mkdtemp(prefix="sft-ranks-"))
    try:
        with _variables(wanted, folder):
            failures, stopped = _run(_torchrun_words(wanted, folder), [str(script), *words])
        if failures is None and stopped is None:
            return 0
        raise _verdict(wanted, folder, failures or {}, stopped)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _torchrun_words(wanted: Layout, folder: Path) -> list[str]:
    """torchrun's own arguments. Only the first rank of all speaks; what others print lies in ``folder``."""
    quiet = range(0 if wanted.machine else 1, wanted.processes)
    flags = [f"--nproc-per-node={wanted.processes}", f"--nnodes={wanted.machines}", "--max-restarts=0"]
    flags += [
        f"--log-dir={folder}",
        f"--redirects={','.join(f'{r}:3' for r in quiet) or '0'}",
        "--monitor-interval=0.2",
    ]
    if wanted.machines == 1:
        flags += [
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            f"--rdzv-id={uuid.uuid4()}",
            "--local-addr=127.0.0.1",
        ]
    else:
        host, _, port = wanted.main.rpartition(":") if ":" in wanted.main else (wanted.main, "", _PORT)
        flags += [f"--node-rank={wanted.machine}", f"--master-addr={host}", f"--master-port={port}"]
    return flags


@contextlib.contextmanager
def _variables(wanted: Layout, folder: Path) -> Iterator[None]:
    """What the ranks find in their environment."""
    before = dict(os.environ)
    os.environ[ranks.WANTED] = str(wanted.world)
    os.environ[ranks.REPORTS] = str(folder)
    # else each of them would take all the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, workers.cores() // wanted.processes)))
    if wanted.machines == 1:  # a host name that does not resolve, or a firewall, has no say in it
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(flags: list[str], words: list[str]) -> tuple[dict[int, Any] | None, int | None]:
    """torchrun in this process: the ranks that failed (None: none did), and the signal that ended it."""
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # what they would say is said below
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # the script's own arguments are not for its parser, which takes --run for the start of a flag that it knows
    config, command, arguments = config_from_args(parse_args([*flags, words[0]]))
    config.shutdown_timeout = PATIENCE
    before = {number: signal.getsignal(number) for number in stop_signals.ALL}
    try:
        elastic_launch(config, command)(*arguments, *words[1:])
    except ChildFailedError as error:
        return dict(error.failures), None
    except SignalException as error:
        return None, stop_signals.meant_by(error.sigval)
    finally:
        stop_signals.put_back(before)
    return None, None


def _verdict(wanted: Layout, folder: Path, failures: dict[int, Any], stopped: int | None) -> SFTError:
    """One error for the user out of what the ranks left."""
    reports = [(json.loads(path.read_text()), int(path.stem)) for path in folder.glob("*.json") if path.stem.isdigit()]
    own = sorted((said["at"], number, said) for said, number in reports if not said["lost"])
    killed = {number: -failure.exitcode for number, failure in failures.items() if failure.exitcode < 0}
    # torchrun ends the others by SIGTERM, and may find them dead at the same look: that is no cause
    number, by = min(killed.items(), key=lambda item: (item[1] == signal.SIGTERM, item), default=(0, 0))
    again = "the same command goes on from the last checkpoint"
    if by and stopped is None and (by != signal.SIGTERM or not own):
        memory = "; if memory ran out, make plan says what to change" if by == signal.SIGKILL else ""
        return MachineError(
            f"process {number} of {wanted.world} was ended from outside ({_signal_name(by)}), so the others were too",
            again + memory,
        )
    if own:
        _, _, said = own[0]
        return _error(said["message"], said["hint"], said["code"])
    if stopped is not None:
        return _error(f"ended by {_signal_name(stopped)}", again, 128 + stopped)
    if reports:
        return _error(*((said := reports[0][0])["message"], said["hint"], said["code"]))
    number, failure = min(failures.items())
    for line in _last_lines(folder, number - wanted.machine * wanted.processes):
        console.note(f"process {number}", line)
    return _error(
        f"process {number} of {wanted.world} failed (exit code {failure.exitcode}); see above", "this is a bug", 1
    )


def _error(message: str, hint: str, code: int) -> SFTError:
    error = SFTError(message, hint)
    error.exit_code = code
    return error


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _last_lines(folder: Path, local: int) -> list[str]:
    """The end of what a silent rank wrote to stderr."""
    logs = sorted(folder.glob(f"*/attempt_0/{local}/stderr.log"))
    return logs[0].read_text(encoding="utf-8", errors="replace").splitlines()[-30:] if logs else []
