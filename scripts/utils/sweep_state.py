"""What a sweep knows of its runs, in outputs/sweeps/<name>/sweep.json: written whole after each change, read at the next start."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scripts.utils import files, stamp
from scripts.utils.sweep_plan import Run

FOLDER = Path("outputs/sweeps")
# the product of each step that a finished run must still have
_PRODUCTS = {"train": "backend.json", "eval": "eval/metrics.json", "merge": "merged"}
# in the order in which a start of the sweep takes them up
OPEN = ("stopped", "waiting", "failed")


@dataclass
class Entry:
    """A run as sweep.json has it.

    ``state``: waiting, running, done, failed, stopped (its state is saved, it goes on), pruned (given up, never gone on
    with), or not started (the budget was spent). ``step``: the one that failed or was stopped. ``seconds`` and
    ``attempts``: of all its starts. ``error``: the line that says what was wrong.
    """

    run: str
    data: str
    config: str
    variant: dict[str, Any]
    seed: int | None
    fingerprint: str
    state: str = "waiting"
    step: str = ""
    exit_code: int | None = None
    seconds: float = 0.0
    attempts: int = 0
    last_lines: list[str] = field(default_factory=list)
    error: str = ""


@dataclass
class Sweep:
    name: str
    plan: str
    started: str
    entries: dict[str, Entry]

    @property
    def folder(self) -> Path:
        return folder_of(self.name)

    def save(self) -> None:
        value = {"name": self.name, "plan": self.plan, "started": self.started}
        runs = [{**asdict(entry), "seconds": round(entry.seconds, 1)} for entry in self.entries.values()]
        files.write_json(path_of(self.name), stamp.without_secrets({**value, "runs": runs}))

    def count(self, state: str) -> int:
        return sum(entry.state == state for entry in self.entries.values())

    def begun(self) -> int:
        return sum(entry.attempts > 0 for entry in self.entries.values())

    def hours(self) -> float:
        """Of all runs together: on two cards at once an hour counts as two."""
        return sum(entry.seconds for entry in self.entries.values()) / 3600


def folder_of(name: str) -> Path:
    return FOLDER / files.check_name(name, "sweep name")


def path_of(name: str) -> Path:
    return folder_of(name) / "sweep.json"


def load(name: str, plan: str, runs: Sequence[Run]) -> Sweep:
    """The runs of the plan with what earlier starts left of them; those that are no longer in the plan are dropped.

    A run with other settings than then is a new one. Writes nothing. Raises ``RefusedError`` for a damaged file.
    """
    path = path_of(name)
    known: dict[str, Any] = files.read_json(path) if path.is_file() else {}
    earlier = {(entry.get("run"), entry.get("fingerprint")): entry for entry in known.get("runs", [])}
    names = {item.name for item in fields(Entry)}
    entries = {}
    for run in runs:
        old = earlier.get((run.name, run.fingerprint), {})
        facts = {
            "run": run.name,
            "data": run.data,
            "config": run.config,
            "variant": run.variant,
            "seed": run.seed,
            "fingerprint": run.fingerprint,
        }
        entry = Entry(**{**{key: value for key, value in old.items() if key in names}, **facts})
        entry.state = _state_now(run, entry)
        entries[run.name] = entry
    return Sweep(name, plan, known.get("started", stamp.now()), entries)


def _state_now(run: Run, entry: Entry) -> str:
    """The state of a run before the sweep starts: what the files say goes before what the sweep noted."""
    if entry.state == "running":
        return "stopped"  # this sweep's lock is ours, so the sweep that wrote it was killed
    if entry.state == "pruned" and (stamp.read(run.name) or {}).get("status") == "finished":
        return "waiting"  # somebody went on with it by hand: the steps after train are missing
    if entry.state == "not started" or (entry.state == "done" and not is_done(run)):
        return "waiting"
    return entry.state


def is_done(run: Run) -> bool:
    """Whether what a finished run made is all there. Data steps alone are always asked again: they know best."""
    if "train" not in run.steps:
        return False
    there = all((run.folder / _PRODUCTS[step]).exists() for step in run.steps if step in _PRODUCTS)
    finished = (stamp.read(run.name) or {}).get("status") == "finished"
    return there and finished and stamp.adapter_folder(run.name).is_dir()


def error_in(lines: Sequence[str]) -> str:
    """The line that says what was wrong, among the last ones of a log."""
    errors = [line for line in lines if line.startswith("error:")] or list(lines)
    return errors[-1].removeprefix("error:").strip() if errors else "it said nothing"
