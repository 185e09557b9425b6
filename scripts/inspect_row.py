"""inspect: one rendered row as the model will see it, its trained tokens in colour, on the terminal and as HTML.

Reads data/rendered/<name>, the exact text that training reads, and encodes it by the same function. Changes nothing
but the page inspect.html there.
"""

import argparse
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import chat, command, console, environment, files, shown, stages
from scripts.utils.errors import UserError
from scripts.utils.rendered import encode_row, require_current

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make inspect ROW=3",
        "make inspect ROW=1d0c4e",
        "make inspect ROW=random SPLIT=val IDS=1",
        "python scripts/inspect_row.py --row 3 --ids",
    ]
    parser = command.new_parser(
        "inspect-row",
        "Show a rendered row as the model sees it, trained tokens in colour.",
        examples,
        keys=["raw", "model"],
    )
    row = command.from_make("ROW") or "1"
    parser.add_argument("--row", default=row, help=f"its number from 1, the start of its id, or random (now {row})")
    split = command.from_make("SPLIT") or "train"
    parser.add_argument("--split", default=split, metavar="SPLIT", help=f"train, val or test (now {split})")
    ids = command.truthy(command.from_make("IDS"))
    parser.add_argument("--ids", action="store_true", default=ids, help="list every token with its id")
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    if arguments.split not in stages.SPLITS:
        raise UserError(f"SPLIT is {arguments.split!r}", f"give one of {', '.join(stages.SPLITS)}")
    want, manifest = require_current(config)
    number, row = find(want.folder, arguments.split, arguments.row, manifest["splits"])
    environment.leave_out("torch")
    tokenizer = chat.load_tokenizer(want.model.path)
    encoded = encode_row(tokenizer, row)
    pieces = shown.to_pieces(tokenizer, encoded)
    differs = shown.difference(tokenizer, encoded, row["text"])
    facts: list[tuple[str, object]] = [
        ("row", f"{number:,} of {manifest['splits'][arguments.split]:,} in {arguments.split}"),
        ("id", row["id"]),
        ("comes from", f"{row['source']['file']}:{row['source']['line']}"),
        ("template", manifest["template"]["source"]),
        ("tokens", f"{len(encoded.ids):,}, of which {encoded.trained_tokens:,} carry loss ({config.render.train_on})"),
        ("round trip", differs or "text → tokens → text gives the same text"),
    ]
    if row.get("literals"):
        spelt = Counter(row["text"][start:end] for start, end in row["literals"])
        facts.append(("look-alikes", f"kept as letters: {', '.join(f'{name} ({n} ×)' for name, n in spelt.items())}"))
    page = want.folder / "inspect.html"
    files.write_text(page, shown.to_html(f"{arguments.split} {number}", facts, pieces))
    if arguments.ids:
        console.table("", ("at", "id", "text", ""), shown.for_listing(pieces), left=4)
    else:
        console.result(shown.for_terminal(pieces, sys.stdout))
    console.result()
    how = "green" if console.use_colour(sys.stdout) else "between ⟦ and ⟧"
    ways = [("trained", "marked in the last column" if arguments.ids else how), ("as a page", page)]
    console.facts("inspect", [*facts, *ways])


def find(folder: Path, split: str, wanted: str, splits: dict[str, int]) -> tuple[int, dict[str, Any]]:
    """Number (from 1) and row. Raises ``UserError`` where there is none; for an id that render left out, with its reason."""
    count, path = splits[split], folder / f"{split}.jsonl"
    if not count:
        filled = [name for name, rows in splits.items() if rows]
        raise UserError(f"{path.absolute()} holds no rows", f"SPLIT={' or SPLIT='.join(filled)}")
    number = None
    if wanted == "random":
        number = secrets.randbelow(count) + 1
    elif (
        wanted.isascii() and wanted.isdigit() and len(wanted) < 10
    ):  # the start of an id may be digits too: give more of it
        number = int(wanted)
    for at, row in enumerate(files.read_jsonl(path), 1):
        if at == number or (number is None and row["id"].startswith(wanted)):
            return at, row
    for row in files.read_jsonl(folder / "rejected.jsonl"):
        if number is None and row["id"].startswith(wanted):
            where = f"{row['source']['file']}:{row['source']['line']}"
            raise UserError(
                f"render left this row out: {where}: {row['reason']}", "see render.max_length and render.template"
            )
    raise UserError(f"no row {wanted!r} in {path.absolute()}", f"give 1 to {count:,}, the start of an id, or random")


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
