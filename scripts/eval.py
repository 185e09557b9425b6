"""eval: the base model and the tuned one side by side, on held-out rows that the run itself rendered.

Reads data/rendered/<name of the run's data>, loads the model once (adapter off: base, adapter on: tuned; two loads
for full tuning), and writes outputs/<run>/eval/metrics.json and samples.jsonl. What was computed lies in answers.jsonl
there: an evaluation that was stopped goes on.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import (
    command,
    comparison,
    console,
    files,
    hparams,
    metrics,
    run_report,
    side_by_side,
    stamp,
    trackers,
)
from scripts.utils.answer_cache import AnswerCache
from scripts.utils.config import run_name
from scripts.utils.evaluation import SIDES, Answers, Side, answering_as, asking, evaluate
from scripts.utils.held_out import Rows, choose_rows
from scripts.utils.trained import load_trained

if TYPE_CHECKING:
    from scripts.utils.schema import Config

VERSION = 2  # raise it when the same answers come to other figures


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make eval RUN=try1",
        "make eval RUN=try1 SPLIT=val LIMIT=50",
        "make eval-quick RUN=try1",
        "sft-eval --run try1 --full",
    ]
    parser = command.new_parser(
        "eval", "Base against tuned on held-out rows.", examples, keys=["run", "raw", "split", "limit"], of_run=True
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="only eval.quick_limit rows")
    size.add_argument("--full", action="store_true", help="all rows of the split, whatever eval.limit says")
    command.add_force(parser)
    return parser


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
        "headline": config.eval.headline,
    }
    identity = files.sha256_json(
        {"model": weights_hash(run, facts), "rows": rows.chosen, "settings": settings, "version": VERSION}
    )
    if not arguments.force and (known := up_to_date(folder, identity)):
        console.note("eval", f"up to date ({folder}; FORCE=1 runs it again)")
        for text in known["warnings"]:
            if text not in rows.warnings:
                console.warn(text)
        show(run, folder, known)
        return
    console.note("eval", f"run {run}: {len(rows.chosen):,} of {rows.available:,} {rows.split} rows in {rows.folder}")
    if facts["status"] != "finished":
        rows.warn(f"run {run} did not finish: this evaluates what its last start left in {stamp.adapter_folder(run)}")
    started = time.monotonic()
    trained = load_trained(run)
    about = {"precision": trained.precision, "device": trained.device}
    if trained.precision != "fp32" and config.eval.generate:
        rows.warn(
            f"in {trained.precision} an answer may depend on the rows that share its batch: the same texts come again "
            "with the same rows and eval.batch_size, not with others"
        )
    with files.file_lock(folder / ".lock", wait_seconds=0, what=f"the evaluation of run {run}"):
        with AnswerCache(folder / "answers.jsonl", fresh=arguments.force) as cache:
            answers: dict[Side, Answers] = {}
            for side in SIDES if trained.kind == "adapter" else reversed(SIDES):
                if trained.kind == "full" and side == "base":
                    del trained  # memory for one model at a time
                    trained = load_trained(run, which="base")
                with answering_as(trained, side):
                    answers[side] = evaluate(trained, side, rows.chosen, config.eval, cache)
        found, samples = figures(rows, answers, config)
        found = {
            "identity": identity,
            "run": run,
            "data": {
                "folder": str(rows.folder),
                "available": rows.available,
                "rows_sha256": metrics.rows_hash(asking(rows.chosen)),
            },
            "settings": settings,
            "model": {"name": facts["model"]["name"], "tuning": facts["tuning"]["mode"], **about},
            **found,
            "warnings": rows.warnings,
            "seconds": round(time.monotonic() - started, 1),
            "at": stamp.now(),
        }
        files.write_jsonl(folder / "samples.jsonl", samples)
        # last, and with the hash of the samples: the two files are of one evaluation, or eval runs again
        found["samples_sha256"] = files.sha256_file(folder / "samples.jsonl")
        files.write_json(folder / "metrics.json", found)
    track(run, facts, found)
    show(run, folder, found)


def track(run: str, facts: dict[str, Any], found: dict[str, Any]) -> None:
    """The tuned model's figures for the trackers that the run was trained with."""
    hparams.fill(run)
    try:
        config = hparams.read_config(stamp.run_folder(run))
    except (OSError, ValueError) as problem:
        console.warn(f"no tracker is told of these figures: {problem}")
        return
    trackers.add_later(facts, config, hparams.scores_of(found), (facts.get("result") or {}).get("steps") or 0)


def show(run: str, folder: Path, found: dict[str, Any]) -> None:
    side_by_side.show(run, folder, found)
    console.result(f"report: {run_report.ensure(run)}")


def figures(
    rows: Rows, answers: dict[Side, Answers], config: "Config"
) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """What metrics.json says of the two sides, and the lines of samples.jsonl."""
    console.note("eval", "scores, and intervals of their differences")
    why = "the rows are texts, which ask nothing" if config.eval.generate else "eval.generate is false"
    scored = {side: comparison.score_side(rows.chosen, answers[side], why) for side in SIDES}
    each = [row for side in SIDES for row in scored[side].rows]
    headline = metrics.headline(each) if config.eval.headline == "auto" else config.eval.headline
    if config.eval.headline != "auto" and all(row.get(headline) is None for row in each):
        headline = metrics.headline(each)
        rows.warn(f"eval.headline {config.eval.headline} has no value on these rows: they are ranked by {headline}")
    scores = {side: scored[side].scores for side in SIDES}
    found: dict[str, Any] = {
        **{side: {name: score.value for name, score in scores[side].items()} for side in SIDES},
        "reasons": {name: score.reason for side in SIDES for name, score in scores[side].items() if score.reason},
        **comparison.compare(scored["base"], scored["tuned"]),
        "headline": headline,
        "json_keys": comparison.key_shares(rows.chosen, answers),
        "speed": {side: comparison.speed(answers[side]) for side in SIDES},
    }
    return found, comparison.samples(rows.chosen, answers, scored)


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


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
