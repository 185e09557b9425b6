"""Add a system message to every row: data/processed/<name> → data/processed_with_style/<name>.

The processed rows are only read. The text comes from STYLE, or from an earlier STYLE that is still in force, or from
the config's ``style.text``; without any, render reads the processed rows themselves.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, files, stages, workers
from scripts.utils.config import data_name
from scripts.utils.errors import RefusedError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config


CHUNK = 256  # rows that a worker takes at a time


@dataclass(frozen=True)
class Style:
    """The system text, how it meets one that is there already, and who asked for it: "STYLE" or "config"."""

    text: str
    mode: str
    origin: str


def build_parser() -> argparse.ArgumentParser:
    parser = command.new_parser(
        "style",
        "Add a system message to the processed rows, in a folder of their own. STYLE stays in force until CLEAR=1.",
        [
            'make style STYLE="Answer in one short sentence."',
            'make style STYLE="Be brief." STYLE_MODE=append',
            "make style CLEAR=1",
            "python scripts/style.py --raw data/sample --style 'Be kind.' --style-mode only-if-missing",
        ],
        keys=["raw", "style", "style_mode"],
    )
    parser.add_argument(
        "--clear",
        action="store_true",
        default=command.truthy(command.from_make("CLEAR")),
        help="remove the styled rows",
    )
    command.add_force(parser)
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> int | None:
    name = data_name(config)
    processed, styled = stages.folder("process", name), stages.folder("style", name)
    if arguments.clear:
        clear(arguments, config, styled)
        return 0
    base = read_processed(processed)
    old = read_old(styled)
    style = choose_style(arguments, config, old)
    if style is None:
        if old is not None:
            remove(styled)
            console.result(f"style: {styled} removed: it held the config's style.text, which is no longer set")
        console.result(f"style: none asked for; render reads {processed}")
        return 0
    inputs = stages.fingerprint(
        [processed / f"{split}.jsonl" for split in stages.SPLITS], old["inputs"] if old else None
    )
    settings = {"text": style.text, "mode": style.mode, "origin": style.origin, "processed": base["identity"]}
    if old and not arguments.force and stages.up_to_date(styled, stages.identity(inputs, settings)):
        console.result(f"style: up to date ({styled}; FORCE=1 runs it again)")
        return 0
    changes: Counter[str] = Counter()
    with files.replaced_folder(styled, stages.MANIFEST) as new:
        progress = console.Progress("style", "rows", sum(base["splits"].values()))
        counts = {}
        for split in stages.SPLITS:
            name = f"{split}.jsonl"
            with (new / name).open("wb") as output:
                counts[split] = restyle(processed / name, output, style, changes, progress)
        progress.close()
        if counts != base["splits"]:
            raise RefusedError(f"{processed}: holds other rows than its manifest says", "run: make process FORCE=1")
        rows = sum(counts.values())
        stages.write_manifest(new, "style", inputs, settings, rows_in=rows, rows_out=rows, rejected=0, splits=counts)
    report(style, changes, counts, processed, styled)
    return 0


def clear(arguments: argparse.Namespace, config: "Config", styled: Path) -> None:
    if asked(arguments, "style", "STYLE") is not None:
        raise UserError("CLEAR and STYLE were given together", "give one of them")
    there = styled.is_dir()
    if there:
        remove(styled)
    console.result(f"style: {styled} {'removed' if there else 'is not there, nothing to remove'}")
    if config.style.text:
        console.warn("the config sets style.text, so the next make style (and make train) adds that one")


def remove(styled: Path) -> None:
    """Manifest first: a folder without one counts as none, should the removal be cut short."""
    if not (styled / stages.MANIFEST).is_file() and any(styled.iterdir()):
        raise RefusedError(
            f"{styled.absolute()} holds no {stages.MANIFEST}, so no step wrote it", "remove it yourself if it can go"
        )
    with files.disk_errors(styled):
        (styled / stages.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(styled)


def read_processed(processed: Path) -> dict[str, Any]:
    base = stages.read_manifest(processed)
    if base is None:
        raise UserError(f"no processed rows in {processed.absolute()}", "run: make process (same CONFIG and RAW)")
    if not stages.outputs_whole(processed, base):
        raise RefusedError(f"{processed.absolute()}: a file is missing or cut short", "run: make process FORCE=1")
    return base


def read_old(styled: Path) -> dict[str, Any] | None:
    """The manifest of the styled rows that lie here; a damaged one would lose a STYLE in silence, so it is refused."""
    try:
        return stages.read_manifest(styled)
    except RefusedError as problem:
        raise RefusedError(
            problem.message, "run: make style CLEAR=1, then make style with the wanted STYLE"
        ) from problem


def asked(arguments: argparse.Namespace, flag: str, variable: str) -> str | None:
    """What the command line or make gave for this key, None when nothing: a value out of the config is not given."""
    given: str | None = getattr(arguments, flag)
    return given if given is not None else os.environ.get(f"SFT_{variable}") or None


def choose_style(arguments: argparse.Namespace, config: "Config", old: dict[str, Any] | None) -> Style | None:
    """STYLE of this call, else the STYLE given earlier, else the config's text, else None."""
    given = asked(arguments, "style", "STYLE")
    if given is not None:
        return Style(checked(given, "STYLE"), config.style.mode, "STYLE")
    if old and old["settings"]["origin"] == "STYLE":
        settings = old["settings"]
        mode = config.style.mode if asked(arguments, "style_mode", "STYLE_MODE") else settings["mode"]
        beside = "; it goes before the config's style.text" if config.style.text else ""
        console.note("style", f"the STYLE given earlier is still in force{beside} (CLEAR=1 ends it)")
        return Style(settings["text"], mode, "STYLE")
    if config.style.text is None:
        return None
    return Style(checked(config.style.text, "style.text"), config.style.mode, "config")


def checked(text: str, what: str) -> str:
    if not text.strip():
        raise UserError(f"{what} is empty", "give a text, or remove the style with: make style CLEAR=1")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not UTF-8: {text[:60]!a}", "check the terminal's encoding") from error
    return text


def with_style(messages: list[dict[str, Any]], style: Style) -> tuple[list[dict[str, Any]], str]:
    """The messages with the style's text in their system message, and what was done: added, changed or left."""
    first = messages[0]
    if first["role"] != "system" or not first["content"].strip():
        rest = messages[1:] if first["role"] == "system" else messages
        return [{"role": "system", "content": style.text}, *rest], "added"
    if style.mode == "only-if-missing":
        return messages, "left"
    there = first["content"]
    text = {"prepend": f"{style.text}\n\n{there}", "append": f"{there}\n\n{style.text}", "replace": style.text}[
        style.mode
    ]
    return [{**first, "content": text}, *messages[1:]], "changed"


def restyle(source: Path, output: IO[bytes], style: Style, changes: Counter[str], progress: console.Progress) -> int:
    """Write the rows of one file with the style; ids, sources and tools stay as they are. Returns the number of rows."""

    def styled(chunk: tuple[int, list[bytes]]) -> tuple[int, bytes, Counter[str]]:
        done, found = [], Counter[str]()
        for number, line in enumerate(chunk[1], chunk[0]):
            row = files.parse_line(source, number, line, "run: make process FORCE=1")
            if "messages" in row:
                row["messages"], change = with_style(row["messages"], style)
            else:  # a text to continue has no system message
                change = "left"
            found[change] += 1
            done.append(files.json_line(row))
        return len(done), b"".join(done), found

    rows = 0
    with source.open("rb") as lines:
        for count, text, found in workers.in_order(styled, workers.numbered(lines, CHUNK)):
            output.write(text)
            changes += found
            rows += count
            progress.advance(count)
    return rows


def report(style: Style, changes: Counter[str], counts: dict[str, int], processed: Path, styled: Path) -> None:
    shown = style.text if len(style.text) <= 100 else style.text[:97] + "…"
    pairs: list[tuple[str, object]] = [
        ("system text", f"{shown!r} (from {style.origin})"),
        ("mode", style.mode),
        (
            "system message",
            f"added to {changes['added']:,} rows, changed in {changes['changed']:,}, left in {changes['left']:,}",
        ),
        ("splits", "  ".join(f"{split} {count:,}" for split, count in counts.items())),
        ("rows lie in", f"{styled} ({processed} is as it was)"),
        ("next", "make render (same CONFIG and RAW)"),
    ]
    console.facts("style", pairs)


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
