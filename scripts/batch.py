"""Every data set with every config: each run in its own processes and its own folder, one failure never stops the rest.

Ends with a table. Exit code: 0 when every run ended well, else that of the first run that did not.
"""

import argparse
import difflib
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, environment, files, unpacked, yaml_text
from scripts.utils.config import data_name, load_config, run_name
from scripts.utils.errors import UserError
from scripts.utils.raw_files import READABLE

STEPS = ("process", "style", "render", "train", "eval", "merge")
DEFAULT_STEPS = ("process", "style", "render", "train", "eval")
DEFAULT_CONFIG = "configs/run_bnb.yaml"


@dataclass(frozen=True)
class Plan:
    """What is to be run: the data sets and configs to combine, overrides for all, and the steps of each run."""

    data: tuple[str, ...]
    configs: tuple[str, ...]
    overrides: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    name: str
    data: str
    config: str
    overrides: str

    @property
    def log(self) -> Path:
        return Path("outputs") / self.name / "batch.log"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``step`` is the one that failed, or empty; ``metrics`` are those of this very run."""

    code: int
    step: str
    seconds: float
    metrics: dict[str, Any] | None


def read_plan(arguments: argparse.Namespace) -> Plan:
    """The YAML file with the command line over it. Raises ``UserError`` for whatever does not exist."""
    listed: dict[str, list[str]] = {}
    if arguments.file:
        values, lines = yaml_text.load(Path(arguments.file))
        known = ("data", "configs", "set", "steps")
        for key, value in values.items():
            where = f"{arguments.file}:{lines.get((key,), 0)}"
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                raise UserError(
                    f"{where}: unknown key {key!r}",
                    f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}",
                )
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, str) for item in items):
                raise UserError(f"{where}: {key} is a list of texts", "see workflows/batch_example.yaml")
            listed[key] = items
    data = tuple(arguments.data or listed.get("data") or raw_data_sets())
    configs = tuple(arguments.config or listed.get("configs") or [DEFAULT_CONFIG])
    steps = tuple(arguments.steps or listed.get("steps") or DEFAULT_STEPS)
    problems = [f"data {path}: there is no {Path(path).absolute()}" for path in data if not Path(path).exists()]
    problems += [f"config {path}: there is no {Path(path).absolute()}" for path in configs if not Path(path).is_file()]
    problems += [f"step {step!r} is unknown; known are {', '.join(STEPS)}" for step in steps if step not in STEPS]
    if problems:
        raise UserError("\n       ".join(problems), "paths are relative to the current folder; nothing was run")
    words = " ".join([shlex.join(listed.get("set", [])), arguments.set]).strip()
    return Plan(data, configs, words, tuple(step for step in STEPS if step in steps))


def raw_data_sets() -> list[str]:
    """Each data file and each folder in data/raw is a data set."""
    raw = Path("data/raw")
    entries = sorted(raw.iterdir()) if raw.is_dir() else []
    found = [str(e) for e in entries if not e.name.startswith(".") and (e.is_dir() or unpacked.suffix(e) in READABLE)]
    if not found:
        raise UserError(f"no data sets in {raw.absolute()}", "put files there, or name them: --data data/sample")
    return found


def combine(plan: Plan) -> list[Run]:
    """Every data set with every config; names that would meet in one folder get a number. Loads each config once."""
    runs = []
    names = {path: data_name(load_config(plan.configs[0], "", {"data.raw": path})) for path in plan.data}
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    for number, path in enumerate(plan.data, 1):
        overrides = (
            f"{plan.overrides} data.name={names[path]}-{number}".strip() if names[path] in twice else plan.overrides
        )
        for config in plan.configs:
            name = run_name(load_config(config, overrides, {"data.raw": path}), config)
            runs.append(Run(name, path, config, overrides))
    met: Counter[str] = Counter()
    for index, run in enumerate(runs):
        met[run.name] += 1
        if met[run.name] > 1:
            runs[index] = replace(run, name=f"{run.name}-{met[run.name]}")
    return runs


def carry_out(run: Run, steps: Sequence[str], number: str) -> Outcome:
    """Run the steps of one run, each in a process of its own, until one fails; their output goes to the run's log."""
    began = time.monotonic()
    given = {"SFT_CONFIG": run.config, "SFT_RAW": run.data, "SFT_RUN": run.name, "SFT_SET": run.overrides}
    with files.disk_errors(run.log):
        run.log.parent.mkdir(parents=True, exist_ok=True)
        run.log.write_bytes(b"")
    for step in steps:
        console.note("batch", f"[{number}] {run.name}: {step}")
        script = files.REPO_ROOT / "scripts" / f"{step}.py"
        with run.log.open("ab") as log:
            # no stdin: a step that asked would wait for ever
            child = subprocess.Popen(
                [sys.executable, str(script)],
                env={**os.environ, **given},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            code = _wait(child)
        if code:
            console.warn(f"{run.name}: {step} ended with exit code {code}: {_last_error(run.log)}")
            return Outcome(code, step, time.monotonic() - began, None)
    metrics = files.read_json(run.log.parent / "eval" / "metrics.json") if "eval" in steps else None
    return Outcome(0, "", time.monotonic() - began, metrics)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Exit code as a shell gives it. When this process is told to stop, the child saves its state first."""
    try:
        code = child.wait()
    except BaseException as stopped:
        if not isinstance(stopped, KeyboardInterrupt):  # a Ctrl-C has reached the child already
            child.terminate()
        child.wait()
        raise
    return 128 - code if code < 0 else code


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error:")] or [line for line in lines if line.strip()]
    return errors[-1].removeprefix("error:").strip() if errors else "it said nothing"


def work(arguments: argparse.Namespace) -> int:
    environment.prepare(files.REPO_ROOT)
    plan = read_plan(arguments)
    runs = combine(plan)
    if arguments.dry_run:
        console.table(
            f"{len(runs)} runs, steps {', '.join(plan.steps)}; nothing was run",
            ["run", "data", "config", "overrides"],
            [[run.name, run.data, run.config, run.overrides] for run in runs],
            left=4,
        )
        return 0
    outcomes: dict[str, Outcome] = {}
    try:
        for number, run in enumerate(runs, 1):
            outcomes[run.name] = carry_out(run, plan.steps, f"{number}/{len(runs)}")
    finally:
        report(runs, outcomes)
    return next((outcome.code for outcome in outcomes.values() if outcome.code), 0)


def report(runs: Sequence[Run], outcomes: dict[str, Outcome]) -> None:
    def number(outcome: Outcome, key: str, form: str) -> str:
        value = ((outcome.metrics or {}).get("tuned") or {}).get(key)
        return "–" if value is None else format(value, form)

    rows: list[list[object]] = []
    for run in runs:
        done = outcomes.get(run.name)
        if done is None:
            rows.append([run.name, "not run", "–", "–", "–", "–", run.log if run.log.exists() else "–"])
            continue
        ended = "ok" if done.code == 0 else f"{done.step} failed"
        exact, loss = number(done, "exact_match", ".1%"), number(done, "loss", ".4f")
        rows.append([run.name, ended, done.code, exact, loss, console.duration(done.seconds), run.log])
    well = sum(outcome.code == 0 for outcome in outcomes.values())
    title = f"batch: {well} of {len(runs)} runs ended well"
    console.table(title, ["run", "ended", "exit code", "exact match", "eval loss", "time", "log"], rows, left=2)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-batch",
        description=__doc__,
        epilog="examples:\n"
        "  workflows/batch_process.sh                     every data set in data/raw, configs/run_bnb.yaml\n"
        "  workflows/batch_process.sh workflows/batch_example.yaml --dry-run\n"
        "  workflows/batch_process.sh --data data/sample --config configs/quickstart.yaml --set train.epochs=1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", help="YAML with the lists data, configs, set and steps")
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="data sets (default: each file and folder in data/raw)"
    )
    parser.add_argument("--config", nargs="+", metavar="FILE", help=f"run configs (default: {DEFAULT_CONFIG})")
    parser.add_argument(
        "--set", default=command.from_make("SET") or "", metavar="WORDS", help="overrides for every run"
    )
    parser.add_argument("--steps", nargs="+", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all but merge)")
    parser.add_argument("--dry-run", action="store_true", help="show the runs and end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return command.guard("sft-batch", lambda: work(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
