"""The runs of a sweep at work: each step in a process of its own, one run at a time on each card, whatever becomes of the others."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.utils import console, files, growing, lifetime, stamp, stop_signals, sweep_places, sweep_state
from scripts.utils.config import to_yaml
from scripts.utils.errors import MachineError, SFTError
from scripts.utils.sweep_plan import DATA_STEPS, Run
from scripts.utils.sweep_state import Entry, Sweep

if TYPE_CHECKING:
    from scripts.utils.sweep_prune import Watch
    from scripts.utils.sweep_schema import Budget

_LOOK = 0.1  # seconds between two looks at the children
_BEAT = 30.0  # seconds between two signs of life


@dataclass
class Job:
    """A run at work: ``step`` is its current one, ``left`` are those after it."""

    run: Run
    entry: Entry
    device: str | None
    left: list[str]
    step: str = ""
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    log_size: int = 0
    watched: bool = False  # it is training, and may be given up

    def spend(self) -> None:
        """Book the time since the last booking."""
        now = time.monotonic()
        self.entry.seconds += now - self.began
        self.began = now

    def exit_code(self) -> int | None:
        """As a shell gives it: 128 + signal for a killed process; None while it runs."""
        code = self.process.poll() if self.process else None
        return 128 - code if code is not None and code < 0 else code

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the process to save and end, or to end at once."""
        if self.process and self.process.poll() is None:
            if at_once:  # no Ctrl-C is taken for an echo of the first signal
                self.process.send_signal(signal.SIGINT)
            self.process.send_signal(signal.SIGTERM)


class Crew:
    """Takes up the open runs of a sweep, each when a place is free, until none is left or a signal says stop."""

    def __init__(
        self,
        sweep: Sweep,
        runs: Sequence[Run],
        places: Sequence[str | None],
        lock: int,
        budget: "Budget | None" = None,
        watch: "Watch | None" = None,
    ) -> None:
        self.sweep, self.lock, self.budget, self.watch = sweep, lock, budget, watch
        self.places = len(places)
        self.numbers = {run.name: f"{number}/{len(runs)}" for number, run in enumerate(runs, 1)}
        self.free = list(places)
        opened = [run for run in runs if sweep.entries[run.name].state in sweep_state.OPEN]
        self.waiting = sorted(opened, key=lambda run: sweep_state.OPEN.index(sweep.entries[run.name].state))
        self.jobs: list[Job] = []
        self.prepared: set[str] = set()  # data sets that this start of the sweep has found or made ready
        self.stopped = 0
        self.last_beat = time.monotonic()

    def work(self) -> int:
        """Returns the number of the signal that stopped it, or 0."""
        console.outlast_readers()
        arrived: list[int] = []
        stop_signals.handle(lambda caught, frame: arrived.append(caught))
        try:
            while True:
                while arrived:
                    self.stop(arrived.pop(0))
                for job in [*self.jobs]:
                    self.look_at(job)
                while not self.stopped and self.free and (run := self.next_run()):
                    self.begin(run)
                if not self.jobs:
                    return self.stopped
                self.beat()
                time.sleep(_LOOK)
        finally:  # with an error of our own: no child goes on unwatched
            for job in self.jobs:
                job.stop()
            for job in self.jobs:
                if job.process:
                    job.process.wait()

    def stop(self, number: int) -> None:
        if stop_signals.is_echo(number):
            return
        if not self.stopped and self.jobs:
            console.note("sweep", "stopping: the runs at work save their state; press Ctrl-C again to stop at once")
        for job in self.jobs:
            if self.stopped or job.entry.state != "pruned":  # that one is saving already, and must not be told twice
                job.stop(at_once=bool(self.stopped))
        self.stopped = number

    def next_run(self) -> Run | None:
        """The next run that may begin, taken off the list; its data are not being made by another just now."""
        preparing = {job.run.data_name for job in self.jobs if job.step in DATA_STEPS}
        for run in [*self.waiting]:
            entry = self.sweep.entries[run.name]
            if not self.may_begin(entry):
                self.waiting.remove(run)
                entry.state = "not started" if entry.state == "waiting" else entry.state
                self.sweep.save()
            elif run.data_name not in preparing:
                self.waiting.remove(run)
                return run
        return None

    def may_begin(self, entry: Entry) -> bool:
        """Whether the budget has room: what was stopped goes on in any case."""
        if self.budget is None or entry.state == "stopped":
            return True
        for job in self.jobs:
            job.spend()
        if self.budget.hours is not None and self.sweep.hours() >= self.budget.hours:
            return False
        return bool(entry.attempts) or self.budget.runs is None or self.sweep.begun() < self.budget.runs

    def begin(self, run: Run) -> None:
        entry = self.sweep.entries[run.name]
        steps = [step for step in run.steps if step not in DATA_STEPS or run.data_name not in self.prepared]
        job = Job(run, entry, self.free.pop(0), steps, began=time.monotonic())
        # noted before the first process is there: a sweep that is killed now knows that it had begun
        entry.state, entry.step, entry.exit_code, entry.last_lines, entry.error = "running", "", None, [], ""
        entry.attempts += 1
        self.sweep.save()
        self.jobs.append(job)
        try:
            files.write_text(config_of(self.sweep, run.name), to_yaml(run.resolved))
            with files.disk_errors(run.log):
                run.log.parent.mkdir(parents=True, exist_ok=True)
                with run.log.open("ab") as log:
                    log.write(f"--- start {entry.attempts} of {run.name}, {stamp.now()}\n".encode())
        except (SFTError, OSError) as problem:
            job.step = run.steps[0]
            code = problem.exit_code if isinstance(problem, SFTError) else MachineError.exit_code
            self.end(job, "failed", code, [f"error: {line}" for line in str(problem).splitlines()[:1]])
            return
        if steps:
            self.start_step(job)
        else:
            self.end(job, "done", 0, [])  # data steps alone, and another run has done them

    def start_step(self, job: Job) -> None:
        job.step = job.left.pop(0)
        console.note("sweep", f"[{self.numbers[job.run.name]}] {job.run.name}: {job.step}")
        job.log_size = job.run.log.stat().st_size
        # one that had finished training has nothing left to be given up
        job.watched = job.step == "train" and (stamp.read(job.run.name) or {}).get("status") != "finished"
        script = files.REPO_ROOT / "scripts" / f"{job.step}.py"
        with job.run.log.open("ab") as log:
            # no stdin: a step that asked would wait for ever. A session of its own: a Ctrl-C reaches it once, through us
            job.process = subprocess.Popen(
                [sys.executable, str(script), "--config", str(config_of(self.sweep, job.run.name))],
                env=sweep_places.environment(job.device, self.places),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(self.lock,),
                preexec_fn=functools.partial(lifetime.end_with_parent, parent=os.getpid()),  # noqa: PLW1509
            )

    def look_at(self, job: Job) -> None:
        """Go on with the next step, or close the run, when the process has ended."""
        code = job.exit_code()
        if code is None:
            if self.watch and job.watched and job.entry.state == "running" and self.watch.is_hopeless(job.run):
                self.give_up(job)
            return
        if code:
            given_up = job.entry.state == "pruned"
            asked = code in [128 + number for number in stop_signals.ALL]
            state = "pruned" if given_up else "stopped" if asked else "failed"
            self.end(job, state, code, growing.tail(job.run.log, 40, since=job.log_size))
            return
        if job.entry.state == "pruned":  # it ended well before it could be stopped
            job.entry.state = "running"
            self.sweep.save()
        if job.step == "train" and self.watch:
            self.watch.finished(job.run)
        if job.step in DATA_STEPS and not set(job.left) & set(DATA_STEPS):
            self.prepared.add(job.run.data_name)
        if job.left and self.stopped:
            job.step = job.left[0]
            self.end(job, "stopped", 128 + self.stopped, [])
        elif job.left:
            self.start_step(job)
        else:
            job.step = ""
            self.end(job, "done", 0, [])

    def give_up(self, job: Job) -> None:
        console.note("sweep", f"{job.run.name}: given up, its validation loss is among the worst at this step; saving")
        job.entry.state = "pruned"  # before the signal, so that a kill in between does not bring it back
        self.sweep.save()
        job.stop()

    def end(self, job: Job, state: str, code: int, lines: Sequence[str]) -> None:
        job.spend()
        entry = job.entry
        entry.state, entry.step, entry.exit_code, entry.last_lines = state, job.step, code, list(lines)[-5:]
        if state == "failed":
            entry.error = sweep_state.error_in(lines)
            if code == 128 + signal.SIGKILL:
                entry.error = f"killed (SIGKILL), as the system does where memory runs out; before it: {entry.error}"
            console.warn(f"{job.run.name}: {job.step} ended with exit code {code}: {entry.error}")
        self.jobs.remove(job)
        self.free.append(job.device)
        self.sweep.save()

    def beat(self) -> None:
        """A sign of life now and then: where each run stands, and the time that it took, on disk."""
        if time.monotonic() - self.last_beat < _BEAT:
            return
        self.last_beat = time.monotonic()
        for job in self.jobs:
            job.spend()
            last = growing.tail(job.run.log, 1, since=job.log_size)
            console.note("sweep", f"{job.run.name}: {last[0] if last else job.step}")
        self.sweep.save()


def config_of(sweep: Sweep, run: str) -> Path:
    """The file that holds the whole config of a run: what every step of it is given."""
    return sweep.folder / "runs" / f"{run}.yaml"
