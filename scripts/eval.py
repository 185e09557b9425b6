"""eval: the base model and the tuned one side by side, on held-out rows that the run itself rendered.

Reads data/rendered/<name of the run's data>, loads the model once (adapter off: base, adapter on: tuned; two loads
for full tuning), and writes outputs/<run>/eval/metrics.json and samples.jsonl.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, files, metrics, rendered, run_report, stages, stamp
from scripts.utils.config import run_name
from scripts.utils.errors import UserError
from scripts.utils.evaluation import SIDES, Answers, Side, answering_as, evaluate, samples
from scripts.utils.trained import load_trained

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make eval RUN=try1",
        "make eval RUN=try1 SPLIT=val LIMIT=50",
        "make eval-quick RUN=try1",
        "sft-eval --run try1 --full",
    ]
    parser = command.new_parser(
        "eval", "Base against tuned on held-out rows.", examples, keys=["run", "raw", "split", "limit"]
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="only eval.quick_limit rows")
    size.add_argument("--full", action="store_true", help="all rows of the split, whatever eval.limit says")
    command.add_force(parser)
    return parser


@dataclass(frozen=True)
class Rows:
    """The rows to evaluate: which split they came from, how many it has, and the rows chosen."""

    folder: Path
    split: str
    available: int
    chosen: list[dict[str, Any]]


def work(arguments: argparse.Namespace, config: "Config") -> None:
    run = run_name(config, arguments.config)
    facts = stamp.require(run)
    rows = choose_rows(facts, config, quick=arguments.quick, full=arguments.full)
    folder = stamp.run_folder(run) / "eval"
    settings = {
        "split": rows.split,
        "rows": len(rows.chosen),
        "generate": config.eval.generate,
        "max_new_tokens": config.eval.max_new_tokens,
        "batch_size": config.eval.batch_size,
    }
    identity = files.sha256_json({"model": weights_hash(run, facts), "rows": rows.chosen, "settings": settings})
    if not arguments.force and (known := up_to_date(folder, identity)):
        console.note("eval", f"up to date ({folder}; FORCE=1 runs it again)")
        report(run, folder, known)
        return
    console.note("eval", f"run {run}: {len(rows.chosen):,} of {rows.available:,} {rows.split} rows in {rows.folder}")
    if facts["status"] != "finished":
        console.warn(
            f"run {run} did not finish: this evaluates what its last start left in {stamp.adapter_folder(run)}"
        )

    started = time.monotonic()
    trained = load_trained(run)
    answers: dict[Side, Answers] = {}
    for side in SIDES if trained.kind == "adapter" else reversed(SIDES):
        if trained.kind == "full" and side == "base":
            del trained  # memory for one model at a time
            trained = load_trained(run, which="base")
        with answering_as(trained, side):
            answers[side] = evaluate(trained, side, rows.chosen, config)
    found: dict[str, Any] = {
        "identity": identity,
        "run": run,
        "data": {"folder": str(rows.folder), "available": rows.available},
        "settings": settings,
        "model": {
            "name": facts["model"]["name"],
            "tuning": facts["tuning"]["mode"],
            "precision": trained.precision,
            "device": trained.device,
        },
        **{side: {name: score.value for name, score in answers[side].scores.items()} for side in SIDES},
        "reasons": {
            name: score.reason for side in SIDES for name, score in answers[side].scores.items() if score.reason
        },
        "seconds": round(time.monotonic() - started, 1),
        "at": stamp.now(),
    }
    files.write_jsonl(folder / "samples.jsonl", samples(rows.chosen, answers))
    # last, and with the hash of the samples: the two files are of one evaluation, or eval runs again
    found["samples_sha256"] = files.sha256_file(folder / "samples.jsonl")
    files.write_json(folder / "metrics.json", found)
    report(run, folder, found)


def choose_rows(facts: dict[str, Any], config: "Config", *, quick: bool, full: bool) -> Rows:
    """The rows of eval.split that this run rendered; spread evenly over the split where not all are taken.

    Falls back from an empty test split to val, and says so. Raises ``UserError`` when there is nothing to evaluate.
    """
    folder = stages.folder("render", facts["data"]["name"])
    manifest = stages.read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"the run's rendered rows are gone (looked in {folder.absolute()})",
            "run: make render with the run's CONFIG and RAW",
        )
    now = stages.data_hash(manifest)
    if now != facts["data"]["hash"]:
        console.warn(
            f"{folder} does not hold the rows that this run was trained on: hash {now[:12]} now, {facts['data']['hash'][:12]} then. "
            "Rows of today's split may have been trained on, so the figures may be too good."
        )
    split = config.eval.split
    rows = list(rendered.read_rows(folder, split))
    if not rows and split == "test":
        split = "val"
        rows = list(rendered.read_rows(folder, split))
        if rows:
            console.warn(f"{folder} has no test rows: evaluating the val rows, by which the best checkpoint was chosen")
    if not rows:
        tried = "neither test nor val rows" if config.eval.split == "test" else f"no {split} rows"
        raise UserError(
            f"{folder.absolute()} has {tried}", "raise data.test_fraction or data.val_fraction, or choose SPLIT=train"
        )
    limit = len(rows) if full else config.eval.quick_limit if quick else config.eval.limit or len(rows)
    count = min(limit, len(rows))
    return Rows(folder, split, len(rows), [rows[number * len(rows) // count] for number in range(count)])


def weights_hash(run: str, facts: dict[str, Any]) -> str:
    """Hash of the tuned weights and of the base's: the models that the figures belong to."""
    weights = sorted(stamp.adapter_folder(run).glob("*.safetensors"))
    return files.sha256_json([facts["model"].get("path_hash"), *(files.sha256_file(path) for path in weights)])


def up_to_date(folder: Path, identity: str) -> dict[str, Any] | None:
    """The finished evaluation in ``folder`` if it is of the same rows, weights and settings."""
    if not (folder / "metrics.json").is_file() or not (folder / "samples.jsonl").is_file():
        return None
    known = files.read_json(folder / "metrics.json")
    same = known.get("identity") == identity and known.get("samples_sha256") == files.sha256_file(
        folder / "samples.jsonl"
    )
    return known if same else None


def report(run: str, folder: Path, found: dict[str, Any]) -> None:
    """A few rows, the before/after table, and where the files lie."""
    settings, reasons = found["settings"], found["reasons"]
    if settings["generate"]:
        show_samples(folder)
        console.result()
    lines = []
    for name, metric in metrics.METRICS.items():
        base, tuned = (metrics.Score(found[side][name], reasons.get(name, "")) for side in SIDES)
        change = metrics.show(name, metrics.difference(base, tuned), signed=True)
        lines.append((metric.label, metrics.show(name, base), metrics.show(name, tuned), change))
    console.result(
        f"{run}: base and tuned on {settings['rows']:,} of {found['data']['available']:,} {settings['split']} rows"
    )
    console.table("", ("metric", "base", "tuned", "change"), lines)
    missing: dict[str, list[str]] = {}
    for name, metric in metrics.METRICS.items():
        if found["tuned"][name] is None or found["base"][name] is None:
            missing.setdefault(reasons.get(name, ""), []).append(metric.label)
    for reason, labels in missing.items():
        console.note("eval", f"no {', '.join(labels)}: {reason}")
    console.result(f"metrics: {folder / 'metrics.json'}\nsamples: {folder / 'samples.jsonl'}")
    console.result(f"report: {run_report.ensure(run)}")


def show_samples(folder: Path, count: int = 3) -> None:
    for number, row in enumerate(files.read_jsonl(folder / "samples.jsonl")):
        if number == count:
            break
        console.facts(
            f"row {row['id'][:12]}",
            [
                ("prompt", short(row["prompt"], tail=True)),
                *((n, short(row[n])) for n in ("reference", "base", "tuned")),
            ],
        )


def short(text: str, *, tail: bool = False, width: int = 160) -> str:
    line = " ".join(text.split())
    if len(line) <= width:
        return line or "(empty)"
    return f"…{line[-width:]}" if tail else f"{line[:width]}…"


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
