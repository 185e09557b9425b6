"""What a sweep shows: before it, what its runs will take; after it, how each ended."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, forecast, hardware
from scripts.utils.errors import SFTError
from scripts.utils.planning import Plan
from scripts.utils.sweep_plan import Run
from scripts.utils.sweep_state import Entry, Sweep

if TYPE_CHECKING:
    from scripts.utils.sweep_schema import Budget

UNKNOWN = "?"


def show_forecast(sweep: Sweep, runs: Sequence[Run], places: int, gpu_gb: str | None, budget: "Budget | None") -> None:
    """A line a run: predicted steps, time, memory and disk of its training, and the sums of what is still to do."""
    machine = forecast.imagined(gpu_gb) if gpu_gb else hardware.detect()
    rows: list[list[object]] = []
    seconds = disk = 0.0
    largest, unknown = 0, 0
    reasons: dict[str, str] = {}  # model → why there is no plan: looked for once
    for run in runs:
        state = sweep.entries[run.name].state
        plan = _plan(run, machine, reasons)
        work = forecast.work_of(plan) if plan else None
        need = forecast.disk(plan) + ("merge" in run.steps) * forecast.merged(plan) if plan else 0
        rows.append(
            [
                run.name,
                run.data,
                run.config,
                state,
                f"{work.steps:,}" if work else UNKNOWN,
                console.duration(work.seconds) if work else UNKNOWN,
                console.size(plan.memory.peak) + ("" if plan.fits else " too much") if plan else UNKNOWN,
                console.size(need) if plan else UNKNOWN,
            ]
        )
        if state not in ("done", "pruned"):
            unknown += work is None
            seconds += work.seconds if work else 0
            disk += need
            largest = max(largest, plan.memory.peak if plan else 0)
    steps = ", ".join(runs[0].steps) if runs else ""
    title = f"sweep {sweep.name}: {len(runs)} runs, steps {steps}; nothing was run"
    header = ["run", "data", "config", "state", "steps", "time", "peak memory", "disk"]
    console.table(title, header, rows, left=4)
    left = len(runs) - sweep.count("done") - sweep.count("pruned")
    at_once = f", {places} at a time" if places > 1 else ""
    lines: list[tuple[str, object]] = [
        ("runs", f"{left} to do, {len(runs) - left} finished earlier{at_once}"),
        ("time", _sum(console.duration(seconds), unknown, left) + "; training alone, at a speed that is assumed (make plan)"),
        ("memory", f"{console.size(largest)} at most, of {console.size(machine.memory)} on {machine.name}" if largest else UNKNOWN),
        ("disk", _sum(console.size(disk), 0 if disk else left, left)),
    ]  # fmt: skip
    if unknown:
        lines.append(
            (UNKNOWN, "; ".join(reasons.values()) or "the rows are not rendered yet: the steps before train count them")
        )
    if budget and (budget.runs or budget.hours):
        lines.append(("budget", _budget(budget)))
    console.facts("together", lines)


def _plan(run: Run, machine: hardware.Hardware, reasons: dict[str, str]) -> Plan | None:
    model = run.resolved.model.name
    if model in reasons:
        return None
    try:
        precision = hardware.choose_precision(run.resolved.train, machine).actual
    except SFTError as problem:
        reasons[run.name] = f"{run.name}: {problem.message.splitlines()[0]}"
        return None
    try:
        return forecast.plan_of(run.resolved, machine, precision)
    except SFTError as problem:
        reasons[model] = f"{model}: {problem.message.splitlines()[0]}"
        return None


def _sum(text: str, unknown: int, left: int) -> str:
    if unknown == left and left:
        return UNKNOWN
    return f"at least {text}, {unknown} runs are unknown" if unknown else f"about {text}"


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
        rows.append(
            [run.name, ended(entry), code, exact, loss, time, entry.attempts, run.log if run.log.exists() else "–"]
        )
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
