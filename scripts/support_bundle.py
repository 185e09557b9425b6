"""One zip for a bug report: what check finds, the run's stamp and config, ends of logs, packages, driver; no secrets.

No data row, no weight, no system message goes in. Each file is listed before it is written; nothing is sent anywhere.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import bundle, command, console, environment, files
from scripts.utils.errors import SFTError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def build_parser() -> argparse.ArgumentParser:
    examples = ["make support-bundle RUN=quickstart-sample", "make support-bundle CONFIG=configs/run_bnb.yaml"]
    return command.new_parser("support-bundle", str(__doc__), examples, keys=["run", "raw", "model"])


def work(arguments: argparse.Namespace) -> None:
    environment.prepare(files.REPO_ROOT)
    run = arguments.run or command.from_make("RUN") or run_of(arguments)
    if run:
        files.check_name(run, "run name")
    if run and not (Path("outputs") / run).is_dir():
        there = ", ".join(sorted(path.parent.name for path in Path("outputs").glob("*/backend.json"))) or "none"
        raise UserError(
            f"there is no run {run!r} in {Path('outputs').absolute()}", f"runs here: {there}; RUN= may be left out"
        )
    console.note("support-bundle", "running make check (half a minute at most)")
    parts = bundle.collect(run, flags(arguments, run), lambda: resolved(arguments))
    console.note("support-bundle", "these files, as plain text:")
    for name, text in parts.items():
        console.result(f"  {name.ljust(16)} {text.count(chr(10)):>6,} lines  {console.size(len(text.encode()))}")
    path = Path("outputs") / f"support-{run or time.strftime('%Y%m%d-%H%M%S')}.zip"
    packed = bundle.write(path, parts, files.atomic_writer)
    console.result(f"{path}: {len(packed)} files, {console.size(path.stat().st_size)} packed")
    console.result(f"nothing was sent; read it before you do: unzip -p {path} | less")


def flags(arguments: argparse.Namespace, run: str) -> list[str]:
    """The arguments for check; what make handed over reaches it by itself. A run is checked with the config that it had."""
    saved, config = Path("outputs") / run / "config.yaml", arguments.config
    if run and saved.is_file() and not command.from_make("CONFIG") and config == build_parser().get_default("config"):
        config = str(saved)
    given = {
        "--config": config,
        "--set": arguments.set,
        "--raw": arguments.raw,
        "--model": arguments.model,
        "--run": run,
    }
    return [f"{name}={value}" for name, value in given.items() if value]


def run_of(arguments: argparse.Namespace) -> str:
    """The run of this config where it has begun, else the newest run, else none."""
    try:
        from scripts.utils.config import run_name

        named = run_name(load(arguments), arguments.config)
        if (Path("outputs") / named).is_dir():
            return named
    except (SFTError, ImportError):  # a broken config or a missing package is what a bundle may be about
        pass
    stamps = sorted(Path("outputs").glob("*/backend.json"), key=lambda path: path.stat().st_mtime)
    return stamps[-1].parent.name if stamps else ""


def load(arguments: argparse.Namespace) -> "Config":
    from scripts.utils.config import load_config

    raw, model = arguments.raw or command.from_make("RAW"), arguments.model or command.from_make("MODEL")
    return load_config(arguments.config, arguments.set, {"data.raw": raw, "model.name": model})


def resolved(arguments: argparse.Namespace) -> str:
    from scripts.utils.config import to_yaml

    return to_yaml(load(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return command.guard("sft-support-bundle", lambda: work(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
