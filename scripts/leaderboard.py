"""leaderboard: all runs side by side, at any time, also while some still train.

Reads what each run in outputs/ has left so far, ranks those whose figures may be compared, says whether the best is more
than chance, and writes outputs/leaderboard.csv and leaderboard.html. Fills TensorBoard's HPARAMS page for ended runs.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, environment, files, hparams, leaderboard_page, leaderboard_ranking, metrics
from scripts.utils import leaderboard_runs as runs_of
from scripts.utils import leaderboard_table as table
from scripts.utils.errors import UserError
from scripts.utils.leaderboard_ranking import label, show, show_spread

# a length is neither good nor bad
RANKED_BY = [name for name in leaderboard_ranking.NAMES if name not in metrics.METRICS or metrics.METRICS[name].better]


def work(arguments: argparse.Namespace) -> None:
    environment.prepare(files.REPO_ROOT)
    by = arguments.by or ""
    if by and by not in RANKED_BY:
        raise UserError(f"BY={by}: not a metric to rank runs by", f"choose one of {', '.join(RANKED_BY)}")
    sweep = runs_of.read_sweep(arguments.sweep) if arguments.sweep else None
    entries = runs_of.of_sweep(sweep) if sweep else runs_of.all_runs()
    if not entries:
        raise UserError(
            f"there are no runs to compare (looked in {Path('outputs').absolute()})", "train one first: make train"
        )
    for entry in entries:
        for text in entry.warnings:
            console.warn(text)
    counts = Counter(entry.state for entry in entries)
    states = ", ".join(f"{count:,} {state}" for state, count in counts.most_common())
    title = f"{f'sweep {sweep.name}' if sweep else 'leaderboard'}: {count_of(len(entries))} ({states})"
    board = table.arrange(entries, by, title)
    verdicts = [leaderboard_ranking.verdict(group) for group in board.groups]

    table.write_csv(board, Path(arguments.csv))
    page = leaderboard_page.build(board, verdicts, Path(arguments.html))
    files.write_text(Path(arguments.html), page.encode("utf-8", "replace").decode())
    table.show(board, shutil.get_terminal_size((140, 24)).columns if sys.stdout.isatty() else 140)
    say_failures(board)
    say_groups(board, verdicts)
    filled = sum(hparams.fill(entry.run) for entry in board.entries if entry.state == "trained")
    if filled:
        console.note("leaderboard", f"TensorBoard's HPARAMS page now has the results of {count_of(filled)} more")
    console.result(f"table: {arguments.csv}\npage: {arguments.html}")


def count_of(runs: int) -> str:
    return f"{runs:,} run{'' if runs == 1 else 's'}"


def say_failures(board: table.Board) -> None:
    for entry in board.entries:
        if entry.detail:
            console.result(f"{entry.run}: {entry.detail}")


def say_groups(board: table.Board, verdicts: Sequence[Sequence[str]]) -> None:
    """The best of each group of runs that may be compared, and the means over seeds."""
    if not board.groups:
        console.result("no run has a figure to be ranked by yet: make eval RUN=…")
    if len(board.groups) > 1:
        console.result(
            "compared within each group only: other rows, other decoding or another tokenizer give other figures"
        )
    for group, lines in zip(board.groups, verdicts, strict=True):
        console.result(f"{f'{group.letter}: ' if len(board.groups) > 1 else ''}by {label(group.metric)}, {group.what}")
        for line in lines:
            console.result(f"  {line}")
        for seeds in leaderboard_ranking.seed_groups(group):
            settings = ", ".join(
                f"{key} {table.say(seeds.settings.get(key))}" for key in board.keys if key != runs_of.SEED
            )
            spread = f"{show(group.metric, seeds.mean)} mean of {len(seeds.runs)} seeds, standard deviation {show_spread(group.metric, seeds.spread)}"
            console.result(f"  {settings or seeds.data}: {spread} ({', '.join(seeds.runs)})")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-leaderboard",
        description=__doc__,
        epilog="examples:\n  make leaderboard\n  make leaderboard SWEEP=rates BY=json_exact\n  sft-leaderboard --by val_loss",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--sweep",
        default=command.from_make("SWEEP"),
        metavar="NAME",
        help="only the runs of this sweep, or of this plan",
    )
    parser.add_argument(
        "--by", default=command.from_make("BY"), metavar="METRIC", help=f"rank by this: {', '.join(RANKED_BY)}"
    )
    parser.add_argument("--csv", default="outputs/leaderboard.csv", metavar="FILE", help="where the table goes")
    parser.add_argument("--html", default="outputs/leaderboard.html", metavar="FILE", help="where the page goes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return command.guard("sft-leaderboard", lambda: work(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
