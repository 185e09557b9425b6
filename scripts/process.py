"""Raw data in, one form of rows out: data/raw → data/processed/<name>/{train,val,test}.jsonl.

Every row ends in exactly one place: a split, rejected.jsonl with its file, line and reason, or the counts of
duplicates and of rows left out by a source's share. A row is {"id", "messages", "tools"?, "source": {"file", "line"}}; its id is the hash of its content.

Rows are read once into a spool file; when all are known, it is decided which belong together (grouping.py), and each
line of the spool is copied to its split.
"""

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import (
    command,
    console,
    data_report,
    files,
    grouping,
    model_store,
    near,
    records,
    sources,
    splits,
    stages,
)
from scripts.utils.config import data_name
from scripts.utils.errors import RefusedError, UserError
from scripts.utils.tally import REJECTED, Tally, refuse_bad_data, reject, reject_bridge

SPOOL, SIGNATURES = ".spool.jsonl", ".signatures"  # in the new folder, deleted before it lands

if TYPE_CHECKING:
    from scripts.utils.schema import Config, DataSection


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
        return 0
    with files.replaced_folder(where, stages.MANIFEST) as new:
        given = splits.given_splits(paths)
        tally = Tally()
        rows = read_all(found, given, data, new, tally)
        placed = place(rows, given, data, new)
        tokenizer = model_store.present(config.model.name, config.model.revision)
        survey = data_report.Collector(rows, placed, tally.doubles, tokenizer)
        write_splits(rows, placed, new, tally, survey)
        tally.check()
        refuse_bad_data(tally, data.max_rejected)
        fill_train(tally, placed, given, new)
        finished = survey.finish(tally, spool_reader(rows, new), config.render.max_length, config.model.name)
        data_report.write(new, finished, f"{data_name(config)}: what process made")
        (new / SPOOL).unlink()
        (new / SIGNATURES).unlink()
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
    report(tally, placed, survey.suspicious_rows, manifest, where)
    return 0


def read_all(
    found: Sequence[sources.Source], given: dict[Path, str], data: "DataSection", new: Path, tally: Tally
) -> grouping.Rows:
    """Pass 1: every usable row that is no duplicate, as a finished line in the spool; what the others are, in ``tally``."""
    rows = grouping.Rows()
    seen: set[bytes] = set()
    source_of = {path: source for source in found for path in source.paths}
    bounds = {source.paths: sources.bound(source) for source in found}
    with (new / SPOOL).open("wb") as spool, (new / SIGNATURES).open("wb") as signatures:
        with (new / REJECTED).open("wb") as rejected:
            for path in splits.reading_order(list(source_of), given):
                bound = bounds[source_of[path].paths]
                name = str(path)
                rows.names.append(name)
                own = stages.SPLITS.index(given[path]) if path in given else grouping.NOT_GIVEN
                for record in records_of(path, source_of[path], tally):
                    tally.rows[name] += 1
                    if record.content is None:
                        reject(record, rejected, tally)
                        continue
                    digest = record.digest
                    if bound and digest > bound:
                        tally.left_out[name] += 1
                        continue
                    if digest in seen:
                        tally.duplicates[name] += 1
                        if len(tally.doubles) < data_report.EXAMPLES:
                            tally.doubles.setdefault(digest.hex(), f"{name}:{record.raw.line}")
                        continue
                    seen.add(digest)
                    source = {"file": name, "line": record.raw.line}
                    line = files.json_line({"id": digest.hex(), **record.content, "source": source})
                    spool.write(line)
                    if data.near_duplicates != "off":
                        signatures.write(near.signature(near.messages_of(record.content)))
                    question = splits.question_hash(record.content, data.split_seed)
                    group = splits.group_hash(record.group, data.split_seed)
                    rows.add(question, group, len(line), record.raw.line, own)
    return rows


def place(rows: grouping.Rows, given: dict[Path, str], data: "DataSection", new: Path) -> grouping.Placement:
    """Decide the split of every row that was read."""
    free = [split for split in stages.SPLITS if split not in given.values()]
    signatures = near.load(new / SIGNATURES) if data.near_duplicates != "off" and len(rows) else None
    return grouping.place_rows(
        rows,
        signatures,
        mode=data.near_duplicates,
        threshold=data.near_threshold,
        val_fraction=data.val_fraction * ("val" in free),
        test_fraction=data.test_fraction * ("test" in free),
    )


def write_splits(
    rows: grouping.Rows, placed: grouping.Placement, new: Path, tally: Tally, survey: data_report.Collector
) -> None:
    """Pass 2: copy each line of the spool to its split, and count what is not written."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context((new / f"{split}.jsonl").open("wb")) for split in stages.SPLITS]
        rejected = stack.enter_context((new / REJECTED).open("ab"))
        spool = stack.enter_context((new / SPOOL).open("rb"))
        for row, code in enumerate(placed.codes):
            line, name = spool.read(rows.lengths[row]), rows.names[rows.files[row]]
            if code == grouping.NEAR_DUPLICATE:
                tally.duplicates[name] += 1
            elif code == grouping.BRIDGE:
                reason, one, two = placed.bridges[row]
                detail = " and ".join(f"{stages.SPLITS[placed.codes[at]]}: {rows.place(at)}" for at in (one, two))
                reject_bridge(json.loads(line), reason, detail, rejected, tally)
            else:
                outputs[code].write(line)
                survey.add(row, json.loads(line))
                tally.kept[name] += 1
                tally.splits[stages.SPLITS[code]] += 1


def spool_reader(rows: grouping.Rows, new: Path) -> Callable[[int], dict[str, Any]]:
    """Return what reads a row again, by its number."""

    def read_row(row: int) -> dict[str, Any]:
        with (new / SPOOL).open("rb") as spool:
            spool.seek(sum(rows.lengths[:row]))
            return json.loads(spool.readline())

    return read_row


def records_of(path: Path, source: sources.Source, tally: Tally) -> Iterator[records.Record]:
    """The records of one file, with progress; says what shape the file was taken for, and what was left out."""
    found = source.open_file(path)
    tally.shapes[str(path)] = found.shape.kind if found.shape else "none"
    if found.shape:
        console.note("process", f"{path}: read as {found.shape.kind} ({found.shape.why})")
    progress = console.Progress("process", "rows")
    for record in found.records:
        progress.advance()
        yield record
    progress.close()
    if found.left_out:
        names = ", ".join(f"{name} ({count:,} rows)" for name, count in found.left_out.items())
        console.warn(f"{path}: columns left out: {names}")


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
