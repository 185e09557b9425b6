"""eval-harness: a run's model through EleutherAI's lm-evaluation-harness (extra `harness`), on its tasks or on local rows.

TASKS=own_rows takes the run's own held-out rows, TASKS=gsm8k_jsonl a local file (INPUT=); any other name is one of the
harness's tasks, whose data lies on the hub. Writes outputs/<run>/eval/harness.json.
"""

import argparse
import difflib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, files, harness_tasks, prompts, stamp
from scripts.utils.config import run_name
from scripts.utils.errors import MachineError, UserError
from scripts.utils.held_out import choose_rows
from scripts.utils.trained import Trained, load_trained

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make eval-harness RUN=try1 TASKS=own_rows",
        "make eval-harness RUN=try1 TASKS=gsm8k_jsonl INPUT=gsm8k_test.jsonl LIMIT=100",
        "make eval-harness RUN=try1 TASKS=arc_easy,hellaswag WHICH=base",
    ]
    parser = command.new_parser(
        "harness", "A run's model on tasks of lm-evaluation-harness.", examples, keys=["run", "raw", "split", "limit"]
    )
    from_make = command.from_make
    parser.add_argument("--tasks", default=from_make("TASKS") or "", metavar="NAMES", help="tasks, commas between")
    parser.add_argument("--input", default=from_make("INPUT"), metavar="FILE", help="JSON lines for a local task")
    parser.add_argument("--which", default=from_make("WHICH") or "tuned", help="tuned, base or merged")
    parser.add_argument("--plain", action="store_true", help="ask without the chat template")
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    if arguments.which not in ("tuned", "base", "merged"):
        raise UserError(f"--which is {arguments.which!r}", "choose tuned, base or merged")
    names = harness_tasks.names(arguments.tasks)
    run = run_name(config, arguments.config)
    facts = stamp.require(run)
    if importlib.util.find_spec("lm_eval") is None:
        raise MachineError("lm-evaluation-harness is not installed", "run: make install EXTRAS=harness")
    specs = {name: harness_tasks.read(name) for name in names if name in harness_tasks.local()}
    check_input(arguments, specs)
    rows = {
        name: rows_of(name, spec, arguments, config, facts)
        for name, spec in specs.items()
        if harness_tasks.wants_rows(spec)
    }

    from scripts.utils import harness_model

    tasks = harness_model.manager(harness_tasks.FOLDER, all_tasks=len(specs) < len(names))
    check_known(names, tasks.all_tasks)
    trained = load_trained(run, which=arguments.which)
    console.note("harness", f"run {run}, {trained.kind}; {trained.precision} on {trained.device}")
    system = stamp.system_of(facts)
    model = harness_model.wrap(trained, config.eval.batch_size)
    for name in names:
        spec, chat = specs.get(name) or {}, not arguments.plain and name != harness_tasks.OWN_ROWS
        how = "" if name == harness_tasks.OWN_ROWS else ", as a chat" if chat else ", without the chat template"
        console.note("harness", f"task {name}{how}")
        own = {"gen_kwargs": {"max_gen_toks": room(trained, config)}} if name in rows else {}
        with tempfile.TemporaryDirectory(prefix="sft-harness-") as folder:
            task: str | dict[str, Any] = name
            if name in rows:
                task = {**spec, "dataset_kwargs": rows_file(Path(folder), name, rows[name], trained, system)}
            found = harness_model.run_task(
                model, task, tasks, chat=chat, system=system, limit=None if own else config.eval.limit, **own
            )
        save(run, arguments.which, name, found, chat)
        report(name, found)
    console.result(f"results: {results_file(run)}")


def check_input(arguments: argparse.Namespace, specs: dict[str, dict[str, Any]]) -> None:
    wanting = [name for name, spec in specs.items() if harness_tasks.wants_rows(spec)]
    if arguments.input and not wanting:
        raise UserError("INPUT is given, but none of the tasks reads it", "TASKS=own_rows and TASKS=gsm8k_jsonl do")
    if arguments.input and len(wanting) > 1:
        raise UserError(f"INPUT is one file, and {' and '.join(wanting)} both read one", "run them one after the other")
    for name in wanting:
        if not arguments.input and name != harness_tasks.OWN_ROWS:
            raise UserError(f"task {name} needs its rows", f"make eval-harness TASKS={name} INPUT=rows.jsonl")


def rows_of(
    name: str, spec: dict[str, Any], arguments: argparse.Namespace, config: "Config", facts: dict[str, Any]
) -> list[Any]:
    """What a local task is to be run on, read and checked before a model is loaded."""
    limit = config.eval.limit
    if name != harness_tasks.OWN_ROWS:
        return harness_tasks.input_rows(Path(arguments.input), spec)[:limit]
    if arguments.input:
        return prompts.read(Path(arguments.input), limit=limit)
    rows = choose_rows(facts, config, quick=False, full=False)
    console.note("harness", f"{len(rows.chosen):,} of {rows.available:,} {rows.split} rows in {rows.folder}")
    return harness_tasks.own_rows(rows.chosen)


def rows_file(folder: Path, name: str, rows: list[Any], trained: Trained, system: str | None) -> dict[str, Any]:
    """Write the rows into ``folder`` and return how the harness is to load them: from there, and cached nowhere else."""
    if rows and isinstance(rows[0], prompts.Request):
        rows = harness_tasks.requested(rows, trained, system)
    path = folder / f"{name}.jsonl"
    files.write_jsonl(path, rows)
    return {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3)
            raise UserError(
                f"unknown task {name!r}",
                f"did you mean {', '.join(close)}?" if close else "the harness's tasks: lm-eval ls tasks",
            )


def room(trained: Trained, config: "Config") -> int:
    """Tokens of an answer: eval.max_new_tokens, and at most half of what the model holds."""
    return min(config.eval.max_new_tokens, max(trained.max_length // 2, 1))


def results_file(run: str) -> Path:
    return stamp.run_folder(run) / "eval" / "harness.json"


def save(run: str, which: str, name: str, found: dict[str, Any], chat: bool) -> None:
    """Put a task's results into the run's file, beside those of other tasks and of the base model."""
    import lm_eval

    path = results_file(run)
    known = files.read_json(path) if path.is_file() else {}
    keep = ("results", "groups", "configs", "versions", "n-shot", "n-samples", "higher_is_better")
    entry = {key: found[key] for key in keep if key in found}
    known.setdefault(which, {})[name] = {
        **stamp.without_secrets(entry),
        "chat_template": chat,
        "lm_eval": lm_eval.__version__,
        "at": stamp.now(),
    }
    files.write_json(path, known)


def report(name: str, found: dict[str, Any]) -> None:
    lines = []
    for task, values in found["results"].items():
        rows = found.get("n-samples", {}).get(task, {}).get("effective", "–")
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            spread = f"± {error:.4f}" if isinstance(error, int | float) else "–"
            lines.append((task, metric, filtered, rows, f"{value:.4f}", spread))
    console.table(name, ("task", "metric", "filter", "rows", "value", "standard error"), lines, left=3)


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
