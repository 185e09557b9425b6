"""A sweep: every data set with every config and whatever keys a plan varies, each run in its own processes and folder.

One failure never stops the rest. Killed at any moment and started again, it skips what is finished and goes on with what
is not. Ends with a table. Exit code: 0 when every run ended well, else that of the first run that did not.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import (
    command,
    console,
    environment,
    files,
    sweep_file,
    sweep_jobs,
    sweep_places,
    sweep_plan,
    sweep_state,
    sweep_table,
    unpacked,
)
from scripts.utils.errors import Interrupted, UserError
from scripts.utils.raw_files import READABLE
from scripts.utils.sweep_plan import DEFAULT_STEPS, STEPS, Run, Wanted
from scripts.utils.sweep_prune import Watch
from scripts.utils.sweep_state import Sweep

DEFAULT_CONFIG = "configs/run_bnb.yaml"
# a variable of make that stands for a config key of every run
_KEYS = {
    "MODEL": "model.name",
    "BACKEND": "tuning.backend",
    "STYLE": "style.text",
    "STYLE_MODE": "style.mode",
    "SPLIT": "eval.split",
    "LIMIT": "eval.limit",
}


def wanted_by(arguments: argparse.Namespace) -> Wanted:
    """The plan with the command line over it. Raises ``UserError`` for whatever does not exist."""
    plan, places = sweep_file.read(Path(arguments.file)) if arguments.file else (None, {})
    data = tuple(arguments.data or (plan.data if plan else ()) or raw_data_sets())
    configs = tuple(arguments.config or (plan.configs if plan else ()) or [DEFAULT_CONFIG])
    steps = tuple(arguments.steps or (plan.steps if plan else ()) or DEFAULT_STEPS)
    problems = [f"data {path}: there is no {Path(path).absolute()}" for path in data if not is_there(path)]
    problems += [f"config {path}: there is no {Path(path).absolute()}" for path in configs if not Path(path).is_file()]
    problems += [f"step {step!r} is unknown; known are {', '.join(STEPS)}" for step in steps if step not in STEPS]
    if problems:
        raise UserError("\n       ".join(problems), "paths are relative to the current folder; nothing was run")
    variables = {name: (key, value) for name, key in _KEYS.items() if (value := command.from_make(name))}
    given = sweep_plan.given_by(plan, places, arguments.set, variables)
    in_order = tuple(step for step in STEPS if step in steps)
    return Wanted(data, configs, in_order, tuple(given), plan, places)


def is_there(path: str) -> bool:
    """Whether a data set is there, as far as that can be seen before it is read: a pattern and the hub are not asked."""
    return path.startswith("hub:") or bool(set("*?[") & set(path)) or Path(path).exists()


def raw_data_sets() -> list[str]:
    """Each data file and each folder in data/raw is a data set."""
    raw = Path("data/raw")
    entries = sorted(raw.iterdir()) if raw.is_dir() else []
    found = [str(e) for e in entries if not e.name.startswith(".") and (e.is_dir() or unpacked.suffix(e) in READABLE)]
    if not found:
        raise UserError(f"no data sets in {raw.absolute()}", "put files there, or name them: --data data/sample")
    return found


def jobs_of(text: str | None) -> int | None:
    if text and not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 256):
        raise UserError(f"JOBS is {text!r}, expected a number from 1 to 256", "for example: make sweep JOBS=2")
    return int(text) if text else None


def work(arguments: argparse.Namespace) -> int:
    environment.prepare(files.REPO_ROOT)
    wanted = wanted_by(arguments)
    name = files.check_name(arguments.name or (Path(arguments.file).stem if arguments.file else "batch"), "sweep name")
    runs = sweep_plan.expand(wanted)
    places = sweep_places.devices(jobs_of(arguments.jobs))
    if arguments.dry_run:
        sweep = sweep_state.load(name, arguments.file or "", runs)
        sweep_table.show_forecast(sweep, runs, len(places), arguments.gpu_gb, wanted.budget)
        return 0
    with sweep_places.only_one(name) as lock:
        sweep = sweep_state.load(name, arguments.file or "", runs)
        stopped = carry_out(sweep, runs, wanted, places, lock)
    if stopped:
        raise Interrupted("the sweep was stopped", "the same command goes on with it", exit_code=128 + stopped)
    rank(sweep)
    states = [sweep.entries[run.name] for run in runs]
    return next((entry.exit_code or 1 for entry in states if entry.state in ("failed", "stopped")), 0)


def carry_out(sweep: Sweep, runs: Sequence[Run], wanted: Wanted, places: Sequence[str | None], lock: int) -> int:
    """Run what is open and show the table, whatever happens; returns the signal that stopped it, or 0."""
    finished = [run for run in runs if sweep.entries[run.name].state == "done"]
    watch = Watch(wanted.prune, finished) if wanted.prune else None
    sweep.save()
    if done := sweep.count("done") + sweep.count("pruned"):
        console.note("sweep", f"{done} of {len(runs)} runs were finished by an earlier start")
    try:
        return sweep_jobs.Crew(sweep, runs, places, lock, wanted.budget, watch).work()
    finally:
        sweep_table.show(sweep, runs, wanted.budget)


def rank(sweep: Sweep) -> None:
    """The leaderboard over the sweep, as a step of its own."""
    script = files.REPO_ROOT / "scripts" / "leaderboard.py"
    if not script.is_file() or not any((Path("outputs") / run / "eval").is_dir() for run in sweep.entries):
        return
    kept = {name: text for name, text in os.environ.items() if not name.startswith("SFT_")}
    done = subprocess.run([sys.executable, str(script), "--sweep", sweep.name], env=kept, stdin=subprocess.DEVNULL)
    if done.returncode:
        console.warn(
            f"the leaderboard ended with exit code {done.returncode}; again: make leaderboard SWEEP={sweep.name}"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-batch",
        description=__doc__,
        epilog="examples:\n"
        "  make sweep SWEEP=configs/sweep_example.yaml DRY_RUN=1\n"
        "  workflows/batch_process.sh                     every data set in data/raw, configs/run_bnb.yaml\n"
        "  workflows/batch_process.sh workflows/batch_example.yaml --dry-run\n"
        "  workflows/batch_process.sh --data data/sample --config configs/quickstart.yaml --set train.epochs=1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    make = command.from_make
    one = {name: [make(name)] if make(name) else None for name in ("RAW", "CONFIG")}
    parser.add_argument("file", nargs="?", default=make("SWEEP"), help="YAML plan (docs/sweeps.md explains its keys)")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        default=one["RAW"],
        help="data sets (default: each file and folder in data/raw)",
    )
    parser.add_argument(
        "--config", nargs="+", metavar="FILE", default=one["CONFIG"], help=f"run configs (default: {DEFAULT_CONFIG})"
    )
    parser.add_argument("--set", default=make("SET") or "", metavar="WORDS", help="overrides for every run")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all but merge)")
    parser.add_argument(
        "--name", help="name of the sweep, whose state is kept (default: the plan's file name, or batch)"
    )
    parser.add_argument("--jobs", default=make("JOBS"), help="runs at a time (default: one a GPU, one without)")
    parser.add_argument(
        "--gpu-gb", default=make("GPU_GB"), help="with --dry-run: plan for a CUDA card of this many GiB"
    )
    dry_run = command.truthy(make("DRY_RUN"))
    parser.add_argument(
        "--dry-run", action="store_true", default=dry_run, help="show the runs, time, memory; run nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return command.guard("sft-batch", lambda: work(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
