"""The one table of metrics: what each is called, in which unit, which way is better, and how a value is shown.

A metric that cannot be computed is None with the reason, never 0.0: a zero would look like a measurement, and a
before/after table would be decided by it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.utils import files


@dataclass(frozen=True)
class Score:
    """One metric over all answers. ``value`` is None where it could not be computed; ``reason`` says why."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its label, its unit ("share" 0–1, "points" 0–100, "tokens", "") and which way is better.

    ``missing`` says why it has no value where it applies to no row.
    """

    label: str
    unit: str
    better: str
    missing: str = ""


_NO_JSON = "no reference is a JSON object or array"
_NO_WORD = "no reference holds a word"

# in the order of the table
METRICS: dict[str, Metric] = {
    "loss": Metric("loss", "", "lower"),
    "perplexity": Metric("perplexity", "", "lower"),
    "exact_match": Metric("exact match", "share", "higher"),
    "normalised_match": Metric("normalised match", "share", "higher", _NO_WORD),
    "f1": Metric("token F1", "share", "higher", _NO_WORD),
    "number_match": Metric("number match", "share", "higher", "no reference ends in a number"),
    "json_valid": Metric("JSON parses", "share", "higher", _NO_JSON),
    "json_exact": Metric("JSON equal", "share", "higher", _NO_JSON),
    "json_keys": Metric("JSON keys", "share", "higher", _NO_JSON),
    "rouge_l": Metric("ROUGE-L", "share", "higher", _NO_WORD),
    "bleu": Metric("BLEU", "points", "higher", "all references are empty"),
    "chrf": Metric("chrF", "points", "higher", "all references are empty"),
    "mean_tokens": Metric("tokens per answer", "tokens", ""),
    "repetition": Metric("repetition", "share", "lower"),
    "hit_limit": Metric("cut at the limit", "share", "lower"),
}
OF_LOSS = ("loss", "perplexity")  # the others are of the answers


def row_name(name: str) -> str:
    """What a metric is called in a row's scores (samples.jsonl)."""
    return "tokens" if name == "mean_tokens" else name


def headline(rows: Sequence[Mapping[str, float | None]]) -> str:
    """The metric that rows are ranked by; ``rows`` are the scores of both sides' answers.

    What the references are decides: numbers, JSON, else whether any answer is exactly right.
    """

    def values(name: str) -> list[float]:
        return [value for row in rows if (value := row.get(name)) is not None]

    for name in ("number_match", "json_keys"):
        if 2 * len(values(name)) >= len(rows) > 0:
            return name
    if any(values("exact_match")):
        return "exact_match"
    return "chrf" if values("chrf") else "loss"


def rows_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the questions and references that answers were scored on: figures are compared where it is the same."""
    return files.sha256_json(sorted([row["id"], row["reference"]] for row in rows))


def show(name: str, score: Score, *, signed: bool = False) -> str:
    """A score as the table shows it: ``85.0 %``, ``1.234``; ``–`` where there is none.

    ``signed`` is for a change: ``+0.123``, and percentage points (``+85.0 pp``) for shares.
    """
    if score.value is None:
        return "–"
    unit = f" {'pp' if signed else '%'}" if METRICS[name].unit == "share" else ""
    return _digits(name, score.value, signed) + unit


def show_interval(name: str, low: float, high: float) -> str:
    """``+1.2…+3.4``, in the unit of the change beside it."""
    return f"{_digits(name, low, True)}…{_digits(name, high, True)}"


def _digits(name: str, value: float, signed: bool) -> str:
    sign = "+" if signed else ""
    match METRICS[name].unit:
        case "share":
            return f"{100 * value:{sign}z.1f}"
        case "points" | "tokens":
            return f"{value:{sign}z.1f}"
        case _:
            return f"{value:{sign}z.3f}" if abs(value) < 1000 else f"{value:{sign}.3g}"


def difference(base: Score, tuned: Score) -> Score:
    """Tuned minus base; None where either is missing."""
    if base.value is None or tuned.value is None:
        return Score(None, base.reason or tuned.reason)
    return Score(tuned.value - base.value)
