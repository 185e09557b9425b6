"""What is in the rows that were written: counts, lengths, doubles, suspicious rows; as one JSON value (report.json).

Memory stays bounded: counters, a few examples of each kind, one number a row; never all texts.
"""

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, grouping, near, report_page, suspicious
from scripts.utils.grouping import SPLITS, Placement, Rows
from scripts.utils.tally import Tally

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXAMPLES = 10
TOKEN_ROWS = 20_000  # rows whose tokens are counted at most
_TOKEN_BYTES = 8_000_000  # of rows, at most: some seconds of work
_TOKEN_BATCH = 500
_ANSWERS = 10
_SHORT = 4  # characters
_BARS = 30
_SHOWN = 200  # characters of a text that the report shows


class Collector:
    """Takes every written row once, in order, and ends as the report."""

    def __init__(self, rows: Rows, placed: Placement, duplicates: dict[str, str], model: Path | None) -> None:
        """``duplicates``: id → place of a later exact duplicate; ``model``: the model's folder, if it is on this disk."""
        self._rows, self._placed = rows, placed
        self._later = duplicates
        self._exact_pairs: list[dict[str, str]] = []
        self._characters = array("Q")
        self._turns: Counter[int] = Counter()
        self._answers = array("Q")  # hash of each last answer
        self._numbers = array("Q")  # of the written rows
        self._empty = self._short = 0
        self._suspicious: Counter[str] = Counter()
        self.suspicious_rows = 0
        self._suspicious_examples: dict[str, list[str]] = {}
        self._tokens = array("Q")
        self._tokenizer = _load(model) if model else None
        kept = sum(code < len(SPLITS) for code in placed.codes)
        self._every = max(math.ceil(kept / TOKEN_ROWS), math.ceil(sum(rows.lengths) / _TOKEN_BYTES), 1)
        self._waiting: list[str] = []

    def add(self, row: int, value: dict[str, Any]) -> None:
        """Take a row that was written, with its number in ``rows``."""
        messages, place = near.messages_of(value), self._rows.place(row)
        text = near.text_of(messages)
        self._characters.append(sum(len(message["content"]) for message in messages))
        self._turns[sum(message["role"] == "assistant" for message in messages)] += 1
        answer = messages[-1]["content"]
        self._answers.append(int.from_bytes(hashlib.sha256(answer.encode()).digest()[:8]))
        self._empty += not answer.strip()
        self._short += 0 < len(answer.strip()) < _SHORT
        if value["id"] in self._later:
            self._exact_pairs.append({"row": self._later[value["id"]], "first": place})
        faults = suspicious.find(messages)
        self.suspicious_rows += bool(faults)
        for why in faults:
            self._suspicious[why] += 1
            examples = self._suspicious_examples.setdefault(why, [])
            if len(examples) < EXAMPLES:
                examples.append(place)
        if self._tokenizer and len(self._numbers) % self._every == 0:
            system = "".join(message["content"] for message in messages if message["role"] == "system")
            self._waiting.append(f"{system}\n{text}" if system else text)
            if len(self._waiting) == _TOKEN_BATCH:
                self._count_tokens()
        self._numbers.append(row)

    def _count_tokens(self) -> None:
        if self._tokenizer and self._waiting:
            encoded = self._tokenizer.encode_batch(self._waiting, add_special_tokens=False)
            self._tokens.extend(len(item.ids) for item in encoded)
            self._waiting = []

    def _frequent_answers(self, read_row: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers that occur most, and more than once."""
        import numpy as np

        if not self._answers:
            return []
        keys = np.frombuffer(self._answers, dtype=np.uint64)
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        top = np.lexsort((first, -counts))[:_ANSWERS]
        found = [(int(counts[at]), read_row(self._numbers[int(first[at])])) for at in top if counts[at] > 1]
        return [{"count": count, "text": shorten(near.messages_of(row)[-1]["content"])} for count, row in found]

    def finish(
        self, tally: Tally, read_row: Callable[[int], dict[str, Any]], max_length: int, model: str
    ) -> dict[str, Any]:
        """The whole report; ``read_row`` gives a row by its number."""
        self._count_tokens()
        rows, placed = self._rows, self._placed
        return {
            **counted(tally),
            "turns": {str(turns): count for turns, count in sorted(self._turns.items())},
            "characters": spread(self._characters),
            "tokens": self._token_part(max_length, model),
            "answers": {
                "empty": self._empty,
                "very_short": self._short,
                "most_frequent": self._frequent_answers(read_row),
            },
            "exact_duplicates": {
                "rows": tally.duplicates.total() - placed.near_rows * placed.removed,
                "examples": self._exact_pairs,
            },
            "near_duplicates": {
                "rows": placed.near_rows,
                "removed": placed.removed,
                "examples": [
                    {"row": rows.place(row), "first": rows.place(first), "similarity": round(similarity, 2)}
                    for row, first, similarity in placed.near_pairs
                ],
            },
            "overlap": {
                "same_question_or_conversation": grouping.overlaps(rows, bytes(placed.codes)),
                "nearly_the_same": placed.near_straddling,
            },
            "suspicious": {
                "rows": self.suspicious_rows,
                "reasons": [
                    {"reason": why, "rows": count, "examples": self._suspicious_examples[why]}
                    for why, count in self._suspicious.most_common()
                ],
            },
        }

    def _token_part(self, max_length: int, model: str) -> dict[str, Any]:
        if not self._tokens:
            return {"model": model, "counted_rows": 0, "max_length": max_length}
        over = sum(count > max_length for count in self._tokens)
        return {
            "model": model,
            "counted_rows": len(self._tokens),
            "max_length": max_length,
            "over_max_length": over / len(self._tokens),
            **spread(self._tokens),
        }


def counted(tally: Tally) -> dict[str, Any]:
    """Rows by file, by split, and the reasons why rows were rejected."""
    columns = {
        "rows_in": tally.rows,
        "rows_out": tally.kept,
        "rejected": tally.rejected,
        "duplicates": tally.duplicates,
        "left_out": tally.left_out,
    }
    return {
        "files": [
            {"file": name, "shape": shape, **{column: counter[name] for column, counter in columns.items()}}
            for name, shape in tally.shapes.items()
        ],
        "all_files": {column: counter.total() for column, counter in columns.items()},
        "splits": {split: tally.splits[split] for split in SPLITS},
        "rejected_reasons": [
            {"reason": reason, "rows": count, "example": tally.examples[reason]}
            for reason, count in tally.reasons.most_common()
        ],
    }


def write(folder: Path, report: dict[str, Any], title: str) -> None:
    """report.json and report.html in ``folder``."""
    # a lone surrogate (in the name of a file, say) stays escaped
    text = json.dumps(report, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace").decode()
    files.write_text(folder / "report.json", text + "\n")
    page = report_page.build(report, title).encode("utf-8", "replace").decode()
    files.write_text(folder / "report.html", page)


def _load(model: Path) -> "Tokenizer | None":
    """The tokenizer of a model's folder without transformers, which takes seconds to import; None where it has no such file."""
    from tokenizers import Tokenizer

    path = model / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # tokenizers raises plain Exception; render will say more
        console.warn(f"{path} cannot be read ({problem}); the report counts no tokens")
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def spread(values: Sequence[int]) -> dict[str, Any]:
    """Smallest, median, mean, 95th percentile, largest, and a histogram of 30 bars at most: [from, to, rows]."""
    import numpy as np

    if not len(values):
        return {"min": 0, "median": 0, "mean": 0, "p95": 0, "max": 0, "histogram": []}
    numbers = np.asarray(values, dtype=np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    width = max(math.ceil((high - low + 1) / _BARS), 1)
    bars = np.bincount((numbers - low) // width)
    return {
        "min": low,
        "median": float(np.median(numbers)),
        "mean": round(float(numbers.mean()), 1),
        "p95": float(np.percentile(numbers, 95)),
        "max": high,
        "histogram": [[low + at * width, low + (at + 1) * width - 1, int(count)] for at, count in enumerate(bars)],
    }
