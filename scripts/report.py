"""report: what a run did and what it can do now, as one page to open or to send: outputs/<run>/report.html.

Reads the run's stamp, TensorBoard files and evaluation, whatever there is of them so far; changes nothing else. eval
writes the same page at its end.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, run_report
from scripts.utils.config import run_name

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def build_parser() -> argparse.ArgumentParser:
    examples = ["make report RUN=try1", "sft-report --run try1"]
    return command.new_parser(
        "report",
        "Write a run's report as one HTML file, also of one that still runs.",
        examples,
        keys=["run", "raw"],
        of_run=True,
    )


def work(arguments: argparse.Namespace, config: "Config") -> None:
    console.result(f"report: {run_report.write(run_name(config, arguments.config))}")


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
