"""What a sweep shows: before it, what its runs will take; after it, how each ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, forecast, hardware
from scripts.utils.errors import SFTError
from scripts.utils.planning import Plan
from scripts.utils.sweep_plan import Run
from scripts.utils.sweep_state import Entry, Sweep

if TYPE_CHECKING:
    from scripts.utils.sweep_schema import Budget

UNKNOWN = "?"


@dataclass(frozen=True)
class Predicted:
    """What the training of a run will take, as far as it is known; sizes in bytes."""

    plan: Plan | None
    work: forecast.Work | None
    disk: int

    def cells(self) -> list[str]:
        memory = console.size(self.plan.memory.peak) + ("" if self.plan.fits else " too much") if self.plan else UNKNOWN
        steps, time = (f"{self.work.steps:,}", console.duration(self.work.seconds)) if self.work else (UNKNOWN, UNKNOWN)
        return [steps, time, memory, console.size(self.disk) if self.plan else UNKNOWN]


def show_forecast(sweep: Sweep, runs: Sequence[Run], places: int, gpu_gb: str | None, budget: "Budget | None") -> None:
    """A line a run: predicted steps, time, memory and disk of its training, and the sums of what is still to do."""
    machine = forecast.imagined(gpu_gb) if gpu_gb else hardware.detect()
    reasons: dict[str, str] = {}  # model → why there is no plan: looked for once
    found = {run.name: _predict(run, machine, reasons) for run in runs}
    states = {run.name: sweep.entries[run.name].state for run in runs}
    title = f"sweep {sweep.name}: {len(runs)} runs, steps {', '.join(runs[0].steps)}; nothing was run"
    header = ["run", "data", "config", "state", "steps", "time", "peak memory", "disk"]
    rows = [[run.name, run.data, run.config, states[run.name], *found[run.name].cells()] for run in runs]
    console.table(title, header, rows, left=4)

    open_ones = [found[name] for name, state in states.items() if state not in ("done", "pruned")]
    plans = [one.plan for one in open_ones if one.plan]
    works = [one.work for one in open_ones if one.work]
    largest = max((plan.memory.peak for plan in plans), default=0)
    at_once = f", {places} at a time" if places > 1 else ""
    seconds = _sum(console.duration(sum(work.seconds for work in works)), len(works), len(open_ones))
    disk = _sum(console.size(sum(one.disk for one in open_ones)), len(plans), len(open_ones))
    lines: list[tuple[str, object]] = [
        ("runs", f"{len(open_ones)} to do, {len(runs) - len(open_ones)} finished earlier{at_once}"),
        ("time", f"{seconds}; training alone, at a speed that is assumed (make plan)"),
        ("memory", f"{console.size(largest)} at most, of {console.size(machine.memory)} on {machine.name}" if plans else UNKNOWN),
        ("disk", disk),
    ]  # fmt: skip
    if len(works) < len(open_ones):
        why = "; ".join(reasons.values()) or "the rows are not rendered yet: the steps before train count them"
        lines.append((UNKNOWN, why))
    if budget and (budget.runs or budget.hours):
        lines.append(("budget", _budget(budget)))
    console.facts("together", lines)


def _predict(run: Run, machine: hardware.Hardware, reasons: dict[str, str]) -> Predicted:
    plan = _plan(run, machine, reasons)
    if plan is None:
        return Predicted(None, None, 0)
    disk = forecast.disk(plan) + (forecast.merged(plan) if "merge" in run.steps else 0)
    return Predicted(plan, forecast.work_of(plan), disk)


def _plan(run: Run, machine: hardware.Hardware, reasons: dict[str, str]) -> Plan | None:
    model = run.resolved.model.name
    if model in reasons:
        return None
    try:
        precision = hardware.choose_precision(run.resolved, machine).actual
    except SFTError as problem:
        reasons[run.name] = f"{run.name}: {problem.message.splitlines()[0]}"
        return None
    try:
        return forecast.plan_of(run.resolved, machine, precision)
    except SFTError as problem:
        reasons[model] = f"{model}: {problem.message.splitlines()[0]}"
        return None


def _sum(text: str, known: int, of: int) -> str:
    if known == of:
        return f"about {text}"
    return f"at least {text}, {of - known} runs are unknown" if known else UNKNOWN


def _budget(budget: "Budget") -> str:
    parts = [f"{budget.runs} runs"] if budget.runs else []
    parts += [f"{budget.hours:g} hours of all runs together"] if budget.hours else []
    return " and ".join(parts) + "; then no new run begins"


def show(sweep: Sweep, runs: Sequence[Run], budget: "Budget | None") -> None:
    """How each run ended, and the last words of those that failed."""
    rows: list[list[object]] = []
    for run in runs:
        entry = sweep.entries[run.name]
        exact, loss = (_metric(run, entry, key, form) for key, form in (("exact_match", ".1%"), ("loss", ".4f")))
        code = "–" if entry.exit_code is None else entry.exit_code
        time = console.duration(entry.seconds) if entry.attempts else "–"
        log = run.log if entry.state != "done" and run.log.exists() else "–"  # leaves room for long names
        rows.append([run.name, ended(entry), code, exact, loss, time, entry.attempts, log])
    well = sweep.count("done")
    title = f"sweep {sweep.name}: {well} of {len(runs)} runs ended well"
    header = ["run", "ended", "exit code", "exact match", "eval loss", "time", "starts", "log"]
    console.table(title, header, rows, left=2)
    for run in runs:
        entry = sweep.entries[run.name]
        if entry.state == "failed":
            console.result(f"{run.name}: {entry.step} failed with exit code {entry.exit_code}: {entry.error}")
            for line in entry.last_lines:
                console.result(f"    {line}")
    given_up = [run.name for run in runs if sweep.entries[run.name].state == "pruned"]
    if given_up:
        name = given_up[0]
        config = sweep.folder / "runs" / f"{name}.yaml"
        console.result(
            f"given up: {', '.join(given_up)}; to go on with one by hand: make train CONFIG={config} RUN={name}"
        )
    if (left_out := sweep.count("not started")) and budget:
        spent = f"{sweep.begun()} runs begun, {sweep.hours():.2f} hours"
        console.result(f"budget spent ({spent} of {_budget(budget)}): {left_out} runs were not started")


def ended(entry: Entry) -> str:
    words = {
        "done": "ok",
        "failed": f"{entry.step} failed",
        "stopped": f"stopped in {entry.step}" if entry.step else "stopped",
        "waiting": "not run",
    }
    return words.get(entry.state, entry.state)


def _metric(run: Run, entry: Entry, key: str, form: str) -> str:
    path = run.folder / "eval" / "metrics.json"
    if entry.state != "done" or "eval" not in run.steps or not path.is_file():
        return "–"
    value: Any = (files.read_json(path).get("tuned") or {}).get(key)
    return "–" if value is None else format(value, form)
