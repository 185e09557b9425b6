"""What is in the rows that were written: counts, lengths, doubles, suspicious rows; as one JSON value (report.json).

Worked out from the columns that reading left (reading.py); only a few rows are looked at again.
"""

import itertools
import json
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, grouping, near, report_page, suspicious
from scripts.utils.grouping import SPLITS, Placement
from scripts.utils.reading import Rows, mark_of
from scripts.utils.tally import Tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    Numbers = NDArray[np.integer[Any]]

EXAMPLES = 10
TOKEN_ROWS = 5_000  # rows whose tokens are counted at most
_TOKEN_BYTES = 2_000_000  # of rows, at most: some seconds of work
_TOKEN_BATCH = 500
_ANSWERS = 10
_BARS = 30
_SHOWN = 200  # characters of a text that the report shows


@dataclass(frozen=True)
class Model:
    """Whose tokens are counted: the model's name, its folder if it is on this disk, and the config's limit."""

    name: str
    path: Path | None
    max_length: int


def survey(
    rows: Rows, placed: Placement, tally: Tally, read_row: Callable[[int], dict[str, Any]], model: Model
) -> dict[str, Any]:
    """The whole report of the rows that were written; ``read_row`` gives a row by its number."""
    import numpy as np

    kept = np.flatnonzero(np.frombuffer(placed.codes, dtype=np.uint8) < len(SPLITS))
    turns, counts = np.unique(_values(rows.turns, kept), return_counts=True)
    marks = _values(rows.marks, kept)
    return {
        **counted(tally),
        "turns": {str(number): int(count) for number, count in zip(turns, counts, strict=True)},
        "characters": spread(_values(rows.characters, kept)),
        "tokens": _token_part(rows, kept, read_row, model),
        "answers": {
            "empty": int(((marks & mark_of("empty")) != 0).sum()),
            "very_short": int(((marks & mark_of("short")) != 0).sum()),
            "most_frequent": _frequent_answers(_values(rows.answers, kept), kept, read_row),
        },
        "exact_duplicates": {
            "rows": tally.duplicates.total() - placed.near_rows * placed.removed,
            "examples": [{"row": later, "first": rows.place(first)} for first, later in tally.doubles.items()],
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
        "suspicious": _suspicious_part(rows, kept, marks),
    }


def _values(column: "array[int]", kept: "Numbers") -> "Numbers":
    import numpy as np

    return np.frombuffer(column, dtype=f"u{column.itemsize}")[kept]


def _suspicious_part(rows: Rows, kept: "Numbers", marks: "Numbers") -> dict[str, Any]:
    import numpy as np

    found = {reason: kept[(marks & mark_of(reason)) != 0] for reason in suspicious.REASONS}
    return {
        "rows": len(np.unique(np.concatenate(list(found.values())))),
        "reasons": [
            {"reason": reason, "rows": len(which), "examples": [rows.place(int(row)) for row in which[:EXAMPLES]]}
            for reason, which in sorted(found.items(), key=lambda item: -len(item[1]))
            if len(which)
        ],
    }


def _frequent_answers(
    answers: "Numbers", kept: "Numbers", read_row: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The answers that occur most, and more than once."""
    import numpy as np

    _, first, counts = np.unique(answers, return_index=True, return_counts=True)
    top = np.lexsort((first, -counts))[:_ANSWERS]
    found = [(int(counts[at]), read_row(int(kept[first[at]]))) for at in top if counts[at] > 1]
    return [{"count": count, "text": shorten(near.messages_of(row)[-1]["content"])} for count, row in found]


def _token_part(rows: Rows, kept: "Numbers", read_row: Callable[[int], dict[str, Any]], model: Model) -> dict[str, Any]:
    """Tokens by the model's own tokenizer, of evenly chosen rows where there are many."""
    tokenizer = _load(model.path) if model.path else None
    if tokenizer is None or not len(kept):
        return {"model": model.name, "counted_rows": 0, "max_length": model.max_length}
    every = max(math.ceil(len(kept) / TOKEN_ROWS), math.ceil(sum(rows.lengths) / _TOKEN_BYTES), 1)
    texts = (_text_of(read_row(int(row))) for row in kept[::every])
    counts: list[int] = []
    while batch := list(itertools.islice(texts, _TOKEN_BATCH)):
        counts += [len(item.ids) for item in tokenizer.encode_batch(batch, add_special_tokens=False)]
    over = sum(count > model.max_length for count in counts)
    return {
        "model": model.name,
        "counted_rows": len(counts),
        "max_length": model.max_length,
        "over_max_length": over / len(counts),
        **spread(counts),
    }


def _text_of(row: dict[str, Any]) -> str:
    messages = near.messages_of(row)
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    text = near.text_of(messages)
    return f"{system}\n{text}" if system else text


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


def counted_for(folder: Path) -> str:
    """The model whose tokens the report in ``folder`` counts, or nothing where there is no report."""
    path = folder / "report.json"
    return str(files.read_json(path)["tokens"]["model"]) if path.is_file() else ""


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


def spread(values: "Sequence[int] | Numbers") -> dict[str, Any]:
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
