"""Start-up time of each script (``--help``), and the time and memory of each step of one run, from its command to its end."""

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.measured import run
from benchmarks.rows import ROOT, Rows, clean_environment, make_job, write
from scripts.utils import files

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")
STEPS = ("process", "style", "render", "train", "eval", "merge")


def starts(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from benchmarks import results

    folder = base / "starts"
    write(folder, make_job(model, rows, arguments), rows)
    settings = json.loads((folder / "run.yaml").read_text())
    settings["data"] |= {"raw": ["train.jsonl", "test.jsonl"]}  # by their names, the splits
    settings["eval"] = {"max_new_tokens": 48}
    (folder / "run.yaml").write_text(json.dumps(settings))
    (folder / "rows.jsonl").rename(folder / "train.jsonl")
    files.write_jsonl(folder / "test.jsonl", rows.held)

    def seconds(script: str, *words: str) -> Any:
        return run([sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words], folder, clean_environment())

    for script in SCRIPTS:  # what Python compiles once and the disk reads once counts for nobody
        seconds(script, "--help")
    helps = {s: statistics.median(seconds(s, "--help").seconds for _ in range(arguments.rounds)) for s in SCRIPTS}
    steps = {}
    for step in STEPS:
        done = seconds(step, "--config", "run.yaml")
        steps[step] = {"seconds": done.seconds, "peak_bytes": done.peak_bytes}
        print(f"bench: {step}: {done.seconds:.1f} s", file=sys.stderr, flush=True)
    header = ["script", "seconds to --help", "seconds as a step", "peak memory"]
    lines = [
        [
            script,
            f"{helps[script]:.3f}",
            f"{steps[script]['seconds']:.1f}" if script in steps else "",
            f"{steps[script]['peak_bytes'] / 2**30:.2f} GiB" if script in steps else "",
        ]
        for script in sorted(SCRIPTS, key=lambda s: (STEPS.index(s) if s in STEPS else len(STEPS), s))
    ]
    found = {"machine": results.machine(), "date": date.today().isoformat(), "help": helps, "steps": steps}
    ended = (
        f"`--help`: medians of {arguments.rounds}. The steps once, one after another: {len(rows.train)} rows trained on in "
        f"{arguments.precision}, {len(rows.held)} evaluated (loss and answers, base and tuned). {found['machine']}, {found['date']}."
    )
    return "starts", found, f"### Starts and steps\n\n{results.table(header, lines)}\n\n{ended}\n"
