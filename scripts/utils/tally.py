"""What became of the rows: every row in is out, rejected with a reason, a duplicate, or left out by its source's share;
never simply gone.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any

from scripts.utils.errors import UserError
from scripts.utils.reading import Refused, refused

REJECTED = "rejected.jsonl"


@dataclass
class Tally:
    """Counts by file; ``splits`` by split, ``reasons`` by reason with one example (file:line) each."""

    rows: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    duplicates: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)  # by the weight or limit of their source
    splits: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    doubles: dict[int, str] = field(
        default_factory=dict
    )  # a few exact duplicates: number of a row → place of a later one
    shapes: dict[str, str] = field(default_factory=dict)
    bridging: int = 0  # of the rejected: those that belong with rows of two splits, a fault of no row
    bridge_reasons: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Rows in = out + rejected + duplicates + left out, for each file; anything else is a bug."""
        for name, count in self.rows.items():
            if count != sum(counter[name] for counter in (self.kept, self.rejected, self.duplicates, self.left_out)):
                raise RuntimeError(f"{name}: {count} rows in are not the sum of out, rejected, duplicates and left out")
        if self.kept.total() != self.splits.total():
            raise RuntimeError("the splits do not hold the rows that were kept")


def reject(file: str, row: Refused, output: IO[bytes], tally: Tally) -> None:
    """Write a refused row of ``file``, and count it."""
    tally.rejected[file] += 1
    tally.reasons[row.reason] += 1
    place = f"{file}:{row.line}"
    tally.examples.setdefault(row.reason, f"{place} ({row.detail})" if row.detail else place)
    output.write(row.json)


def reject_bridge(row: dict[str, Any], reason: str, detail: str, output: IO[bytes], tally: Tally) -> None:
    """Reject a finished row that belongs with rows of two splits."""
    source = row.pop("source")
    reject(source["file"], refused(source["file"], source["line"], reason, detail, row), output, tally)
    tally.bridging += 1
    tally.bridge_reasons.add(reason)


def refuse_bad_data(tally: Tally, max_rejected: float) -> None:
    """Raise ``UserError`` when more rows were rejected than allowed, or when none is left."""
    rows, kept = tally.rows.total(), tally.kept.total()
    rejected = tally.rejected.total() - tally.bridging
    share = rejected / rows
    if kept and share <= max_rejected:
        return
    if not kept and tally.left_out.total():
        raise UserError("no row is left: data.sources takes none of those that can be used", "take larger shares")
    reasons = [item for item in tally.reasons.most_common() if item[0] not in tally.bridge_reasons][:3]
    top = [f"{count:,} × {reason}, first at {tally.examples[reason]}" for reason, count in reasons]
    limit = f"more than data.max_rejected allows ({max_rejected:.0%})" if kept else "so none is left"
    enough = math.ceil(share * 100) / 100
    way_on = f'mend these rows, or go on without them: SET="data.max_rejected={enough}" lists each in {REJECTED}'
    raise UserError(
        "\n       ".join([f"{rejected:,} of {rows:,} rows cannot be used, {limit}:", *top]),
        way_on if kept else "mend these rows; nothing was changed",
    )
