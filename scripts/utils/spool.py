"""The two passes of process over the rows: all are read once into a spool file, then each line goes to its split.

Rows are read and looked at on all cores (reading.py); here they are told apart, written, and counted.
"""

import contextlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, data_report, files, grouping, near, reading, records, sources, splits, stages
from scripts.utils.reading import Rows
from scripts.utils.tally import REJECTED, Tally, reject, reject_bridge

if TYPE_CHECKING:
    from scripts.utils.schema import DataSection

SPOOL, SIGNATURES = ".spool.jsonl", ".signatures"  # in the new folder, deleted before it lands


def read_all(
    found: Sequence[sources.Source], given: dict[Path, str], data: "DataSection", new: Path, tally: Tally
) -> Rows:
    """Pass 1: every usable row that is no duplicate, as a finished line in the spool; what the others are, in ``tally``."""
    rows = Rows()
    seen: dict[bytes, int] = {}  # the hash of each row's content: its number
    source_of = {path: source for source in found for path in source.paths}
    bounds = {source.paths: sources.bound(source) for source in found}
    read = reading.reader(data.split_seed, near_duplicates=data.near_duplicates != "off")
    order = splits.reading_order(list(source_of), given)
    progress = console.Progress("process", "rows", share=lambda: files.share_read(order, len(rows.names) - 1))
    with contextlib.ExitStack() as stack:
        names = (SPOOL, SIGNATURES, REJECTED)
        spool, signatures, rejected = (stack.enter_context((new / name).open("wb")) for name in names)
        for path in order:
            bound = bounds[source_of[path].paths]
            name = str(path)
            rows.names.append(name)
            own = stages.SPLITS.index(given[path]) if path in given else grouping.NOT_GIVEN
            opened = _open(path, source_of[path], tally)
            for chunk in opened.mapped(read):
                count = len(chunk.digests)
                progress.advance(count + len(chunk.refused))
                tally.rows[name] += count + len(chunk.refused)
                for row in chunk.refused:
                    reject(name, row, rejected, tally)
                kept: list[int] = []
                for at, digest in enumerate(chunk.digests):
                    if bound and digest > bound:
                        tally.left_out[name] += 1
                    elif (first := seen.setdefault(digest, number := len(rows) + len(kept))) < number:
                        tally.duplicates[name] += 1
                        if len(tally.doubles) < data_report.EXAMPLES:
                            tally.doubles.setdefault(first, f"{name}:{chunk.columns['lines'][at]}")
                    else:
                        kept.append(at)
                taken = chunk if len(kept) == count else chunk.only(kept)
                spool.write(taken.json)
                signatures.write(taken.signatures)
                rows.add(taken, own)
            progress.close()
            if opened.left_out:
                columns = ", ".join(f"{column} ({count:,} rows)" for column, count in opened.left_out.items())
                console.warn(f"{path}: columns left out: {columns}")
    return rows


def _open(path: Path, source: sources.Source, tally: Tally) -> records.FileRecords:
    """Open a file, and say what shape it was taken for."""
    opened = source.open_file(path)
    tally.shapes[str(path)] = opened.shape.kind if opened.shape else "none"
    if opened.shape:
        console.note("process", f"{path}: read as {opened.shape.kind} ({opened.shape.why})")
    return opened


def place(rows: Rows, given: dict[Path, str], data: "DataSection", new: Path) -> grouping.Placement:
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


def write_splits(rows: Rows, placed: grouping.Placement, new: Path, tally: Tally) -> None:
    """Pass 2: copy each line of the spool to its split, and count what is not written."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context((new / f"{split}.jsonl").open("wb")) for split in stages.SPLITS]
        rejected = stack.enter_context((new / REJECTED).open("ab"))
        spool = stack.enter_context((new / SPOOL).open("rb"))
        for row, (code, length) in enumerate(zip(placed.codes, rows.lengths, strict=True)):
            line = spool.read(length)
            if code < len(outputs):
                outputs[code].write(line)
            elif code == grouping.BRIDGE:
                reason, one, two = placed.bridges[row]
                detail = " and ".join(f"{stages.SPLITS[placed.codes[at]]}: {rows.place(at)}" for at in (one, two))
                reject_bridge(json.loads(line), reason, detail, rejected, tally)
    for (file, code), count in Counter(zip(rows.files, placed.codes, strict=True)).items():
        name = rows.names[file]
        if code == grouping.NEAR_DUPLICATE:
            tally.duplicates[name] += count
        elif code < len(stages.SPLITS):
            tally.kept[name] += count
            tally.splits[stages.SPLITS[code]] += count


def row_reader(rows: Rows, new: Path) -> Callable[[int], dict[str, Any]]:
    """Return what reads a row again, by its number."""
    starts = array("Q", itertools.accumulate(rows.lengths, initial=0))

    def read_row(row: int) -> dict[str, Any]:
        with (new / SPOOL).open("rb") as spool:
            spool.seek(starts[row])
            return json.loads(spool.readline())

    return read_row


def remove(new: Path) -> None:
    for name in (SPOOL, SIGNATURES):
        (new / name).unlink()
