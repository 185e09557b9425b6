"""Raw data in, one form of rows out: data/raw → data/processed/<name>/{train,val,test}.jsonl.

Every row ends in exactly one place: a split, rejected.jsonl with its file, line and reason, or the counts of
duplicates and of rows left out by a source's share. A row is {"id", "messages", "tools"?, "source": {"file", "line"}}; its id is the hash of its content.

Rows are read once into a spool file; when all are known, it is decided which belong together (grouping.py), and each
line of the spool is copied to its split.
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, data_report, files, grouping, model_store, sources, splits, spool, stages
from scripts.utils.config import data_name
from scripts.utils.errors import RefusedError, UserError
from scripts.utils.tally import REJECTED, Tally, refuse_bad_data

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def build_parser() -> argparse.ArgumentParser:
    parser = command.new_parser(
        "process",
        "Read raw data (JSON, JSON lines, CSV, TSV, also packed; Parquet, Arrow) into train, val and test rows; what cannot be used is kept aside.",
        ["make process", "make process RAW=data/raw/faq.csv", "python scripts/process.py --raw data/sample --force"],
        keys=["raw", "model"],
    )
    command.add_force(parser)
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> int | None:
    data = config.data
    found, warnings = sources.find(data)
    paths = [path for source in found for path in source.paths]
    for text in warnings:
        console.warn(text)
    where = stages.folder("process", data_name(config))
    old = None
    with contextlib.suppress(RefusedError):  # a damaged manifest counts as none: the folder is made anew
        old = stages.read_manifest(where)
    inputs = stages.fingerprint(paths, old["inputs"] if old else None)
    settings = {
        "format": data.format,
        "columns": data.columns,
        "val_fraction": data.val_fraction,
        "test_fraction": data.test_fraction,
        "split_seed": data.split_seed,
        "max_rejected": data.max_rejected,
        "near_duplicates": data.near_duplicates,
        "near_threshold": data.near_threshold,
        "version": 5,  # raise it when the same raw rows come out differently
        "order": [str(path) for path in paths],
        "sources": [source.model_dump() for source in data.sources],
    }
    if old and not arguments.force and stages.up_to_date(where, stages.identity(inputs, settings)):
        console.result(f"process: up to date ({old['rows_out']:,} rows in {where}; FORCE=1 runs it again)")
        counted = data_report.counted_for(where)
        if counted not in ("", config.model.name) and model_store.present(config.model.name, config.model.revision):
            console.note(
                "process", f"the report counts tokens of {counted}; FORCE=1 counts those of {config.model.name}"
            )
        return 0
    with files.replaced_folder(where, stages.MANIFEST) as new:
        given = splits.given_splits(paths)
        tally = Tally()
        rows = spool.read_all(found, given, data, new, tally)
        placed = spool.place(rows, given, data, new)
        spool.write_splits(rows, placed, new, tally)
        tally.check()
        refuse_bad_data(tally, data.max_rejected)
        fill_train(tally, placed, given, new)
        model_folder = model_store.present(config.model.name, config.model.revision)
        model = data_report.Model(config.model.name, model_folder, config.render.max_length)
        found_out = data_report.survey(rows, placed, tally, spool.row_reader(rows, new), model)
        data_report.write(new, found_out, f"{data_name(config)}: what process made")
        spool.remove(new)
        manifest = stages.write_manifest(
            new,
            "process",
            inputs,
            settings,
            rows_in=tally.rows.total(),
            rows_out=tally.kept.total(),
            rejected=tally.rejected.total(),
            duplicates=tally.duplicates.total(),
            left_out=tally.left_out.total(),
            near_duplicates=placed.near_rows,
            splits={split: tally.splits[split] for split in stages.SPLITS},
            shapes=tally.shapes,
        )
    report(tally, placed, found_out["suspicious"]["rows"], manifest, where)
    return 0


def fill_train(tally: Tally, placed: grouping.Placement, given: dict[Path, str], new: Path) -> None:
    """With few rows the hash may leave train empty: then the largest other split becomes train."""
    if tally.splits["train"]:
        return
    movable = [split for split in ("val", "test") if split not in given.values() and tally.splits[split]]
    if not movable:
        raise UserError("no row is left to train on: every one also stands in the val or test file", "add other rows")
    largest = max(movable, key=lambda split: tally.splits[split])
    (new / f"{largest}.jsonl").replace(new / "train.jsonl")
    (new / f"{largest}.jsonl").touch()
    tally.splits["train"], tally.splits[largest] = tally.splits[largest], 0
    placed.codes = placed.codes.translate(bytes.maketrans(bytes([stages.SPLITS.index(largest)]), b"\0"))
    console.warn(f"the split by hash left no train rows; the {tally.splits['train']} rows of {largest} are train now")


def report(tally: Tally, placed: grouping.Placement, suspicious: int, manifest: dict[str, Any], where: Path) -> None:
    header: tuple[str, ...] = ("file", "shape", "rows in", "= out", "+ rejected", "+ duplicates")
    counters: tuple[Counter[str], ...] = (tally.rows, tally.kept, tally.rejected, tally.duplicates)
    if tally.left_out.total():
        header, counters = (*header, "+ left out"), (*counters, tally.left_out)
    table = [(name, shape, *(f"{c[name]:,}" for c in counters)) for name, shape in tally.shapes.items()]
    if len(table) > 1:
        table.append(("all files", "", *(f"{counter.total():,}" for counter in counters)))
    console.table("process", header, table, left=2)
    if placed.same_question:
        console.warn(
            f"{placed.same_question:,} rows share their question with another of the given splits; kept as given"
        )
    if placed.near_straddling:
        console.warn(
            f"{placed.near_straddling:,} rows are nearly the same as a row of another of the given splits; kept as given "
            "(data.near_duplicates=remove leaves them out)"
        )
    if placed.largest_near > max(20, len(placed.codes) // 5):
        console.warn(
            f"{placed.largest_near:,} of {len(placed.codes):,} rows are nearly the same as one row, so they lie in one split; "
            "if they only share a long prompt, set data.near_duplicates=off"
        )
    if not manifest["splits"]["val"]:
        console.warn("no val rows: no evaluation during training, no best checkpoint, no early stopping")
    if not manifest["splits"]["test"]:
        console.warn("no test rows: eval has nothing to measure on; SPLIT=train or SPLIT=val measures on another split")
    pairs: list[tuple[str, object]] = [
        ("splits", "  ".join(f"{split} {count:,}" for split, count in manifest["splits"].items())),
        ("rows lie in", where),
    ]
    if placed.near_rows:
        what = "kept, each in the split of the earlier one" if not placed.removed else "left out"
        pairs.append(("near duplicates", f"{placed.near_rows:,} rows ({what})"))
    if suspicious:
        pairs.append(("suspicious", f"{suspicious:,} rows to look at; the report names them"))
    pairs.append(("report", where / "report.html"))
    if tally.rejected.total():
        reason, count = tally.reasons.most_common(1)[0]
        pairs.append(("rejected", f"{where / REJECTED} (mostly: {reason}, {count:,} ×)"))
    pairs.append(("next", 'make style STYLE="…" for a system message, or make render (same CONFIG and RAW)'))
    console.facts("done", pairs)


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
