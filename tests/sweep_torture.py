"""Kill a sweep of 2 data sets × 3 configs again and again at random moments, and prove that each run was trained exactly once.

    make torture-sweep KILLS=10
    make torture-sweep KILLS=10 MODEL=embedded/smollm2-135m-instruct

One of the six runs is made to fail: its rows are longer than its config allows. The sweep is killed (mostly SIGKILL, at
times SIGTERM or SIGINT) and started again at once, while its children may still be saving. At the end every step of
every finished run must have been made once, no adapter may have changed since its run was finished, and the table and
sweep.json must say how each run ended. A last start must find nothing to do.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.commands import ROOT, environment

NAME = "torture"
CONFIGS = {"rank4": {"r": 4, "alpha": 8}, "rank8": {"r": 8, "alpha": 8}, "short": {"r": 4, "alpha": 8}}
SHORT = 64  # tokens that a row may have in the config that fails on the longer rows
FAILS = "short-long"
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]


@dataclass
class Outcome:
    kills: int = 0
    starts: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def prepare(folder: Path, model: str, steps: int) -> None:
    """Two data sets, of short and of longer rows, three configs, and the plan."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    for name, more in (("sums", ""), ("long", " Then say in words how you came to it, one step after the other." * 3)):
        rows = [
            {"question": f"How much is {n} plus {n + 1}?{more}", "answer": f"It is {2 * n + 1}."} for n in range(24)
        ]
        (raw / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {
        "max_steps": steps,
        "gradient_accumulation": 1,
        "learning_rate": 0.003,
        "logging_steps": 1,
        "precision": "fp32",
        "self_test": False,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
    }
    for name, lora in CONFIGS.items():
        length = SHORT if name == "short" else 128
        config = {
            "model": {"name": model},
            "data": {"near_duplicates": "off"},
            "render": {"max_length": length},
            "tuning": {"mode": "lora"},
            "lora": lora,
            "train": {**train, "pack_length": length},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    plan = {
        "data": ["data/raw/sums.jsonl", "data/raw/long.jsonl"],
        "configs": [f"{name}.yaml" for name in CONFIGS],
        "steps": ["process", "style", "render", "train"],
    }
    (folder / f"{NAME}.yaml").write_text(json.dumps(plan))


def start(folder: Path, number: int, jobs: int) -> "subprocess.Popen[bytes]":
    with (folder / f"start-{number}.log").open("wb") as log:
        words = [sys.executable, str(ROOT / "scripts" / "batch.py"), f"{NAME}.yaml", "--jobs", str(jobs)]
        return subprocess.Popen(words, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def adapters(folder: Path) -> dict[str, str]:
    """Hash of the adapter of each run whose stamp says finished."""
    from scripts.utils import files

    found = {}
    for path in (folder / "outputs").glob("*/backend.json"):
        if json.loads(path.read_text())["status"] == "finished":
            weights = folder / "adapters" / path.parent.name / "adapter_model.safetensors"
            found[path.parent.name] = files.sha256_file(weights) if weights.is_file() else "gone"
    return found


def state(folder: Path) -> dict[str, Any]:
    path = folder / "outputs" / "sweeps" / NAME / "sweep.json"
    return {entry["run"]: entry for entry in json.loads(path.read_text())["runs"]} if path.is_file() else {}


def trained_once(folder: Path, run: str, steps: int) -> list[str]:
    """What is wrong with the steps that a finished run says it made."""
    lines = [json.loads(line) for line in (folder / "outputs" / run / "metrics.jsonl").read_text().splitlines()]
    made = [line["step"] for line in lines if "loss" in line]
    wrong = [] if made == list(range(1, steps + 1)) else [f"{run}: metrics.jsonl has the steps {made}"]
    starts = json.loads((folder / "outputs" / run / "backend.json").read_text())["starts"]
    ends = [entry["ended"] for entry in starts]
    if ends.count("finished") != 1 or ends[-1] != "finished":
        wrong.append(f"{run}: its starts ended {ends}")
    done = sum(entry["step"] - entry["from_step"] for entry in starts)
    if done != steps:
        wrong.append(
            f"{run}: {done} steps were made for {steps}: {[(e['from_step'], e['step'], e['ended']) for e in starts]}"
        )
    return wrong


def torture(
    folder: Path,
    model: str,
    *,
    kills: int,
    steps: int,
    jobs: int,
    seed: int,
    longest: float,
    say: Callable[[str], None],
) -> Outcome:
    """Everything above in ``folder``; ``longest``: seconds that a start may live before it is killed."""
    prepare(folder, model, steps)
    dice = random.Random(seed)
    outcome = Outcome()
    began = time.monotonic()
    finished: dict[str, str] = {}
    while outcome.kills < kills:
        outcome.starts += 1
        process = start(folder, outcome.starts, jobs)
        asked = dice.choice(SIGNALS)
        if (
            outcome.kills % 3 == 2
        ):  # not before one more run is finished, so that the kills fall on the whole of the sweep
            while process.poll() is None and len(adapters(folder)) <= len(finished):
                time.sleep(0.2)
        try:
            process.wait(dice.uniform(0.2, longest))
            say(
                "it was faster than its killer"
            )  # all is done: what is left of the kills falls on starts that find nothing to do
        except subprocess.TimeoutExpired:
            process.send_signal(asked)
            process.wait()
        outcome.kills += 1
        now = adapters(folder)
        outcome.failures += [
            f"{run}: its adapter changed after it was finished" for run, was in finished.items() if now.get(run) != was
        ]
        finished = now
        say(
            f"{outcome.kills}/{kills} kills ({asked.name}), {len(finished)} runs finished, {time.monotonic() - began:.0f} s"
        )
    outcome.starts += 1
    process = start(folder, outcome.starts, jobs)
    code = process.wait()
    judge(folder, outcome, code, steps)
    before, entries = adapters(folder), state(folder)
    outcome.failures += [
        f"{run}: its adapter changed after it was finished" for run, was in finished.items() if before.get(run) != was
    ]
    outcome.starts += 1
    start(folder, outcome.starts, jobs).wait()
    again = state(folder)
    trained_again = [run for run, entry in entries.items() if entry["state"] == "done" and again[run] != entry]
    if trained_again or adapters(folder) != before:
        outcome.failures.append(f"a start with nothing to do touched {trained_again or 'an adapter'}")
    outcome.seconds = time.monotonic() - began
    return outcome


def judge(folder: Path, outcome: Outcome, code: int, steps: int) -> None:
    """Compare what the last start said, and what lies on the disk, with what must have come of it."""
    log = (folder / f"start-{outcome.starts}.log").read_text()
    entries = state(folder)
    names = {f"{config}-{data}" for config in CONFIGS for data in ("sums", "long")}
    if set(entries) != names:
        outcome.failures.append(f"the runs are {sorted(entries)}")
        return
    if code != 2:
        outcome.failures.append(f"the last start ended with {code} instead of the failed run's 2")
    table = {words[0]: words[1:] for line in log.splitlines() if len(words := line.split()) > 6}
    for run, entry in entries.items():
        if run == FAILS:
            said = (entry["state"], entry["step"], entry["exit_code"])
            if said != ("failed", "render", 2) or table.get(run, [])[:3] != ["render", "failed", "2"]:
                outcome.failures.append(f"{run}: sweep.json says {said}, the table {table.get(run)}")
            if not any("no train row is left" in line for line in entry["last_lines"]):
                outcome.failures.append(f"{run}: its last lines are {entry['last_lines']}")
            continue
        if entry["state"] != "done" or table.get(run, [])[:2] != ["ok", "0"]:
            outcome.failures.append(f"{run}: sweep.json says {entry['state']}, the table {table.get(run)}")
            continue
        outcome.failures += trained_once(folder, run, steps)
        starts = json.loads((folder / "outputs" / run / "backend.json").read_text())["starts"]
        if not len(starts) <= entry["attempts"] <= outcome.starts:
            outcome.failures.append(
                f"{run}: {len(starts)} starts in the stamp, {entry['attempts']} attempts in sweep.json"
            )
    if "5 of 6 runs ended well" not in log:
        outcome.failures.append("the table's title does not say 5 of 6")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=int(os.environ.get("SFT_KILLS") or 10))
    parser.add_argument("--model", default=os.environ.get("SFT_MODEL") or "", help="default: a tiny random Llama")
    parser.add_argument("--steps", type=int, default=6, help="training steps of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=9.0, help="seconds that a start may live")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sft-sweep-torture-"))
    model = arguments.model
    if not model:
        from tests.tiny_models import smollm2_tokenizer, tiny_llama

        model = str(folder / "model")
        tiny_llama().save_pretrained(model)
        smollm2_tokenizer().save_pretrained(model)

    def say(text: str) -> None:
        print(f"torture-sweep: {text}", flush=True)

    outcome = torture(
        folder,
        model,
        kills=arguments.kills,
        steps=arguments.steps,
        jobs=arguments.jobs,
        seed=arguments.seed,
        longest=arguments.longest,
        say=say,
    )
    say(f"{outcome.kills} kills, {outcome.starts} starts, {outcome.seconds:.0f} s, {len(outcome.failures)} failures")
    for failure in outcome.failures:
        print(f"  {failure}")
    if not outcome.failures:
        shutil.rmtree(folder)
    else:
        print(f"  (see {folder})")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
