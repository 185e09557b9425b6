"""What the loader costs: rows to token ids at the first start, the same read from their store at later ones, rows packed for a step."""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.measured import run
from benchmarks.rows import ROOT, Rows, clean_environment, make_job, write
from scripts.utils import files


def loader(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from benchmarks import results

    folder, job, wanted = base / "loader", make_job(model, rows, arguments), arguments.loader
    write(folder, job, rows)
    settings = json.loads((folder / "run.yaml").read_text())
    settings["data"] |= {"near_duplicates": "off"}  # which all of them are
    settings["render"] |= {"max_length": 2 * job.max_length}
    (folder / "run.yaml").write_text(json.dumps(settings))
    files.write_jsonl(folder / "rows.jsonl", (_numbered(rows.train[n % len(rows.train)], n) for n in range(wanted)))
    for step in ("process", "render"):
        run([sys.executable, str(ROOT / "scripts" / f"{step}.py"), "--config", "run.yaml"], folder, clean_environment())
    with contextlib.chdir(folder):
        found = {name: statistics.median(times) for name, times in _measure(arguments.rounds, job.pack_length).items()}
    count = found.pop("rows")
    text = results.table(
        ["", "seconds", "rows/s"],
        [[name, f"{seconds:.2f}", f"{count / seconds:,.0f}"] for name, seconds in found.items()],
    )
    machine, today = results.machine(), date.today().isoformat()
    ended = (
        f"{count:,.0f} rows made of {len(rows.train)} of `{Path(arguments.raw).name}`; "
        f"{results.of_rounds(arguments.rounds)}. {machine}, {today}."
    )
    whole = {"machine": machine, "date": today, "rows": count, "medians": found}
    return "loader", whole, f"### The loader\n\n{text}\n\n{ended}\n"


def _numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row with a number in it, since process leaves a row out that it has seen."""
    first, *others = row["messages"]
    return {"messages": [{**first, "content": f"{first['content']} ({number})"}, *others]}


def _measure(rounds: int, budget: int) -> dict[str, list[float]]:
    from scripts.utils import chat, packing, rendered, token_store
    from scripts.utils.config import load_config

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    want, manifest = rendered.require_current(load_config("run.yaml", "", {}))
    tokenizer = chat.load_tokenizer(want.model.path)
    times: dict[str, list[float]] = {}

    def timed(name: str, what: Any, *given: Any) -> Any:
        start = time.perf_counter()
        made = what(*given)
        times.setdefault(name, []).append(time.perf_counter() - start)
        return made

    def packed(examples: Any) -> int:
        order = packing.rows_in_order(examples, range(len(examples)), budget, shared=True)
        return sum(packing.to_row([examples[i] for i in row], shared=True)["input_ids"].numel() for row in order)

    tokens = token_store.examples
    for _ in range(rounds):
        shutil.rmtree(want.folder / ".tokens", ignore_errors=True)
        timed("token ids made, at the first start", tokens, want, manifest, "train", tokenizer)
        examples = timed("found again and checked by hash, at later starts", tokens, want, manifest, "train", tokenizer)
        timed("packed into rows and made tensors, once an epoch", packed, examples)
    times["rows"] = [len(examples)]
    return times
