"""Training beside its peers: real tokens/s, peak memory and time from the command to the saved adapter, alternating, medians.

    make bench RAW=data/sample ROWS=64 ROUNDS=3 PRECISION=bf16

Each run of each contestant is a process of its own, in a new folder. docs/benchmarks.md says what is compared and how it is
kept fair. Parts that can be had alone: --levers, --prefix, --context, --inference, --profile, --loader, --starts; --docs writes the page.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.contestants import NAMES, TRL, compete, judge, trl_folder
from benchmarks.rows import ROOT, Rows, make_job, read
from scripts.utils import command, environment, files
from scripts.utils.errors import UserError

PAGE = ROOT / "docs" / "benchmarks.md"
Part = Callable[[argparse.Namespace, Path, Rows, Path], tuple[str, dict[str, Any], str]]


def build_parser() -> argparse.ArgumentParser:
    def made(name: str, otherwise: str) -> str:
        return command.from_make(name) or otherwise

    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--raw", default=made("RAW", str(ROOT / "data" / "sample")), help="a file or folder of rows")
    add("--rows", type=_number(16), default=made("ROWS", "64"), help="rows that are trained on, once")
    add("--rounds", type=_number(1), default=made("ROUNDS", "3"), help="runs of each contestant")
    add("--precision", choices=["fp32", "bf16"], default=made("PRECISION", "fp32"))
    add("--mode", choices=["lora", "qlora"], default="lora", help="qlora: of all but the padded Trainer")
    add("--model", default=made("MODEL", "embedded/smollm2-135m-instruct"))
    add("--max-length", type=_number(32), default="1024", help="longer rows are left out; TRL cuts at 1024")
    shown = [name for name in NAMES if name != "sft-play-unsloth"]
    add("--contestants", type=_names, default=",".join(shown), help=f"of {', '.join(NAMES)}")
    add("--out", type=Path, default=Path("outputs/bench"), help="folder for JSON and Markdown")
    add("--levers", action="store_true", help="SFT-Play's own levers, each alone")
    add("--prefix", type=_numbers, metavar="TOKENS", help="a shared system prompt of so many tokens: 20,200,800")
    add("--context", type=_numbers, metavar="TOKENS", help="cost of a token in rows so long: 512,1024,2048,4096,8192")
    add("--inference", action="store_true", help="32 prompts batched, one by one, and by transformers alone")
    add("--profile", action="store_true", help="where the time of a step goes, by kind of work")
    add("--loader", type=_number(16), metavar="ROWS", help="so many rows to token ids, read again, and packed: 10000")
    add("--starts", action="store_true", help="--help of each script, and each step of a run")
    add("--docs", action="store_true", help="put the figures of --out into docs/benchmarks.md")
    return parser


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least}")
        return int(text)

    return number


def _numbers(text: str) -> list[int]:
    return [_number(1)(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(NAMES)}")
    return names


def contest(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from benchmarks import flops, results
    from benchmarks.measured import run
    from benchmarks.rows import clean_environment

    job = make_job(model, rows, arguments)
    names: list[str] = arguments.contestants
    if any(name.startswith("trl") for name in names):
        trl_folder()
    shape = flops.shape_of(model, job.rank)

    def limits() -> dict[str, float]:
        found = {}
        for precision in sorted({job.precision, *(["fp32"] if "padded" in names else [])}):
            measured = run(
                [sys.executable, "-m", "benchmarks.flops", precision], base, clean_environment(PYTHONPATH=str(ROOT))
            )
            found[precision] = files.parse_line("limit", 1, measured.lines[-1][1])["limit"]
        return found

    before = limits()
    runs, adapters = compete(names, arguments.rounds, base, job, rows, shape)
    after = limits()
    middle = results.medians(runs)
    found = {
        "machine": results.machine(),
        "date": date.today().isoformat(),
        "trl": TRL,
        "job": {**asdict(job), "model": arguments.model},
        "rows": {
            "raw": Path(arguments.raw).name,
            "count": len(rows.train),
            "held": len(rows.held),
            "tokens": sum(len(e.ids) for e in rows.encoded),
            "trained": sum(e.trained_tokens for e in rows.encoded),
        },
        "rounds": arguments.rounds,
        "limit": {name: max(before[name], after[name]) for name in before},
        "medians": {name: middle[name] for name in names},
        "ratios": results.ratios({name: middle[name] for name in names}),
        "held_out": judge(adapters, job, rows, base / "judge"),
        "runs": [asdict(result) for result in runs],
    }
    return f"train-{job.precision}", found, results.contest_text(found)


def parts(arguments: argparse.Namespace) -> list[Part]:
    """What was asked for; nothing: the contest."""
    from benchmarks import inference, levers, loader, profiled, starts

    wanted: list[Part] = []
    wanted += [levers.levers] if arguments.levers else []
    wanted += [levers.prefix] if arguments.prefix else []
    wanted += [levers.context] if arguments.context else []
    wanted += [inference.inference] if arguments.inference else []
    wanted += [profiled.profile] if arguments.profile else []
    wanted += [loader.loader] if arguments.loader else []
    wanted += [starts.starts] if arguments.starts else []
    return wanted or ([] if arguments.docs else [contest])


def work(arguments: argparse.Namespace) -> None:
    environment.prepare(ROOT)
    from benchmarks import results
    from scripts.utils import model_store

    if wanted := parts(arguments):
        if not Path(arguments.raw).exists():
            raise UserError(f"no rows: {Path(arguments.raw).absolute()} is not there", "RAW names a file or a folder")
        model = model_store.resolve(arguments.model).path
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            base = Path(name)
            rows = read(Path(arguments.raw), model, arguments.rows, arguments.max_length, base / "rows")
            for part in wanted:
                title, found, text = part(arguments, base, rows, model)
                results.save(arguments.out, title, found, text)
                print(f"{text}\nsaved in {arguments.out / title}.json and .md", flush=True)
    if arguments.docs:
        print(f"{PAGE}: {', '.join(results.update_docs(arguments.out, PAGE))}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("SFT_MODEL_CACHE", str(ROOT / ".cache" / "models"))
    return command.guard("bench", lambda: work(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
