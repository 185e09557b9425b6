"""Which rows belong together, and so into one split: the same question, the same conversation, nearly the same text.

Rows are placed in reading order: each takes the split of the earlier rows that it belongs with, or, without one, the
split that its hash says. So rows that are added at the end move no old row. A row that belongs with rows of two splits
goes into neither: on either side it would carry what is held out into what is trained on.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from scripts.utils import near
from scripts.utils.reading import Rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
NEAR_DUPLICATE, BRIDGE = 3, 4  # codes beside those of the splits, 0 to 2: left out, and why
NOT_GIVEN = -1
# different rows of one bucket that a row is compared with; bounds the time where all rows are alike
_BUCKET_ROWS = 250
EXAMPLES = 20
Mode = Literal["report", "remove", "off"]


@dataclass
class Placement:
    """``codes``: the split of each row (0 to 2, as SPLITS), NEAR_DUPLICATE or BRIDGE; and what was seen on the way."""

    codes: bytearray
    near_rows: int = 0  # rows that are nearly the same as an earlier one
    near_pairs: list[tuple[int, int, float]] = field(
        default_factory=list
    )  # row, earlier row, similarity; the first few
    bridges: dict[int, tuple[str, int, int]] = field(
        default_factory=dict
    )  # row: reason, a row of one split, of another
    same_question: int = 0  # rows of given files that share a question or conversation with another split
    removed: bool = False  # whether near duplicates were left out
    largest_near: int = 0  # rows that are nearly the same as one and the same row
    near_straddling: int = 0  # rows of given files that are nearly the same as one of another split


def place_rows(
    rows: Rows,
    signatures: "NDArray[np.uint32] | None",
    *,
    mode: Mode,
    threshold: float,
    val_fraction: float,
    test_fraction: float,
) -> Placement:
    """Place every row, in order. ``signatures`` is uint32 [rows, PERMUTATIONS], or None where near ones do not count."""
    import numpy as np

    placed = Placement(bytearray(len(rows)), removed=mode == "remove")
    near_counts: Counter[int] = Counter()
    search = NearSearch(signatures, threshold) if signatures is not None and mode != "off" else None
    known = (
        ("question", rows.questions, _repeated(rows.questions)),
        ("conversation", rows.groups, _repeated(rows.groups)),
    )
    seen: dict[str, dict[int, dict[int, int]]] = {name: {} for name, _, _ in known}  # key: split: its first row
    apart = _on_their_own(rows, search, [repeated for _, _, repeated in known])
    codes = _codes_by_hash(rows, val_fraction, test_fraction)
    placed.codes[:] = codes.tobytes()
    for row in np.flatnonzero(~apart).tolist():
        alike = search.earlier(row) if search else []
        if alike:
            placed.near_rows += 1
            near_counts[alike[0][0]] += 1
            if len(placed.near_pairs) < EXAMPLES:
                placed.near_pairs.append((row, *alike[0]))
            if mode == "remove":
                placed.codes[row] = NEAR_DUPLICATE
                continue
        exact: dict[int, int] = {}  # split: the first row in it that this one belongs with
        for name, keys, repeated in known:
            if repeated[row]:
                for code, first in seen[name].get(keys[row], {}).items():
                    exact[code] = min(first, exact.get(code, first))
        linked = dict(exact)
        for other, _ in alike:
            linked.setdefault(placed.codes[other], other)
        if (own := rows.given[row]) != NOT_GIVEN:
            code = own
            placed.same_question += bool(exact.keys() - {own})
            placed.near_straddling += bool(linked.keys() - {own}) and not exact.keys() - {own}
        elif len(linked) > 1:
            one, two = sorted(linked.values())[:2]
            reason = "nearly the same as rows of two splits"
            if len(exact) > 1:
                reason = "shares its question or conversation with rows of two splits"
            placed.codes[row], placed.bridges[row] = BRIDGE, (reason, one, two)
            continue
        elif linked:
            code = next(iter(linked))
        else:
            code = int(codes[row])
        placed.codes[row] = code
        for name, keys, repeated in known:
            if repeated[row]:
                seen[name].setdefault(keys[row], {}).setdefault(code, row)
        # of rows with one signature in one split, the first stands for all
        if search and not any(like == 1 and placed.codes[other] == code for other, like in alike):
            search.add(row)
    placed.largest_near = max(near_counts.values(), default=0)
    return placed


def _on_their_own(
    rows: Rows, search: "NearSearch | None", repeated: "Sequence[NDArray[np.bool_]]"
) -> "NDArray[np.bool_]":
    """bool [rows]: rows that share nothing with any other, which their hash alone places; most are."""
    import numpy as np

    apart: NDArray[np.bool_] = np.array(rows.given, dtype=np.int8) == NOT_GIVEN
    for some in [*(~one for one in repeated), *([search.alone()] if search else [])]:
        apart &= some
    return apart


def _codes_by_hash(rows: Rows, val_fraction: float, test_fraction: float) -> "NDArray[np.uint8]":
    """uint8 [rows]: the split that the hash of each row's conversation, or else question, says; as ``splits.split_of``."""
    import numpy as np

    if not len(rows):
        return np.zeros(0, dtype=np.uint8)
    groups, questions = (np.frombuffer(column, dtype=np.uint64) for column in (rows.groups, rows.questions))
    # a 64-bit number is rounded once on its way to a float, in Python's division as here
    place = np.where(groups != 0, groups, questions).astype(np.float64) / 2.0**64
    train, val, test = map(SPLITS.index, ("train", "val", "test"))
    others = np.where(place < test_fraction + val_fraction, val, train)
    return np.where(place < test_fraction, test, others).astype(np.uint8)


def _repeated(keys: "array[int]") -> "NDArray[np.bool_]":
    """bool [rows]: whether the key (not 0) occurs more than once; only these need a place in a dict."""
    import numpy as np

    values = np.frombuffer(keys, dtype=np.uint64) if len(keys) else np.zeros(0, dtype=np.uint64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts[inverse] > 1) & (values != 0)


class NearSearch:
    """The rows added so far, by the buckets that they share with others."""

    def __init__(self, signatures: "NDArray[np.uint32]", threshold: float) -> None:
        self._signatures, self._threshold = signatures, threshold
        self._buckets = near.find_buckets(signatures)
        self._rows: dict[int, array[int]] = {}

    def alone(self) -> "NDArray[np.bool_]":
        """bool [rows]: rows that no other is like."""
        import numpy as np

        return np.asarray((self._buckets < 0).all(axis=1))

    def earlier(self, row: int) -> list[tuple[int, float]]:
        """Added rows nearly the same as ``row``, the earliest first, each with the estimated Jaccard similarity."""
        import numpy as np

        found = [rows for bucket in self._buckets[row].tolist() if bucket >= 0 and (rows := self._rows.get(bucket))]
        if not found:
            return []
        others = np.concatenate([np.frombuffer(rows, dtype=np.uint32) for rows in found])
        equal = np.count_nonzero(self._signatures[others] == self._signatures[row], axis=1)
        alike = equal >= self._threshold * near.PERMUTATIONS
        pairs = set(zip(others[alike].tolist(), equal[alike].tolist(), strict=True))
        return [(other, count / near.PERMUTATIONS) for other, count in sorted(pairs)]

    def add(self, row: int) -> None:
        for bucket in self._buckets[row].tolist():
            if bucket >= 0:
                rows = self._rows.setdefault(bucket, array("I"))
                if len(rows) < _BUCKET_ROWS:
                    rows.append(row)


def overlaps(rows: Rows, codes: bytes) -> dict[str, int]:
    """Questions and conversations that stand in two splits, counted anew from the result, for each pair of splits."""
    import numpy as np

    place = np.frombuffer(codes, dtype=np.uint8)
    found = {}
    for one, two in ((0, 1), (0, 2), (1, 2)):
        shared = 0
        for column in (rows.questions, rows.groups):
            keys = np.frombuffer(column, dtype=np.uint64) if len(column) else np.zeros(0, dtype=np.uint64)
            both = np.intersect1d(keys[place == one], keys[place == two])
            shared += int((both != 0).sum())
        found[f"{SPLITS[one]} and {SPLITS[two]}"] = shared
    return found
