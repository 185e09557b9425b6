"""The rows of an evaluation for a run's report: which got better and worse, and all of them small for its search."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from scripts.utils import metrics
from scripts.utils.run_report_words import boundary, clean

Row = dict[str, Any]  # a line of samples.jsonl

MOST_SHOWN = 20  # rows in full of each kind
MOST_LISTED = 5_000  # rows in the list that is searched
_LISTED_CHARACTERS = 3_000_000  # of all rows' texts there, about
_FINER = (
    "json_keys",
    "f1",
    "chrf",
    "rouge_l",
    "likeness",
    "loss",
)  # what breaks ties, the first one that both sides have
_YES_NO = ("exact_match", "normalised_match", "json_valid", "json_exact", "number_match", "hit_limit")


@dataclass(frozen=True)
class Ranked:
    """A row with its place in samples.jsonl (from 1), its scores a side, and how it changed.

    ``change``: (by the headline metric, by a finer one), positive where the tuned answer is better.
    """

    number: int
    row: Row
    scores: dict[str, dict[str, float | None]]
    change: tuple[float, float]

    @property
    def direction(self) -> str:
        return "better" if self.change > (0.0, 0.0) else "worse" if self.change < (0.0, 0.0) else "same"

    @property
    def name(self) -> str:
        """Where the row comes from: file:line."""
        source = self.row.get("source") or {}
        return f"{source.get('file', '?')}:{source.get('line', '?')}"


def headline(found: dict[str, Any], rows: Sequence[Row]) -> str:
    """The metric that rows are ranked by: what the evaluation chose, or for an older one what its rows can tell."""
    chosen = found.get("headline")
    if isinstance(chosen, str) and chosen in metrics.METRICS:
        return chosen
    if not any("tuned" in row for row in rows):
        return "loss"
    if any(row.get("tuned_json_exact") is not None for row in rows):
        return "json_exact"
    return "exact_match"


def rank(rows: Sequence[Row], name: str) -> list[Ranked]:
    """All rows in their order, each with its change by metric ``name``."""
    scores = [{side: scores_of(row, side) for side in ("base", "tuned")} for row in rows]
    finer = next((n for n in _FINER if n != name and any(s["tuned"].get(n) is not None for s in scores)), name)
    return [
        Ranked(number, row, of, (_change(name, of), _change(finer, of)))
        for number, (row, of) in enumerate(zip(rows, scores, strict=True), 1)
    ]


def scores_of(row: Row, side: str) -> dict[str, float | None]:
    """A row's scores; worked out from its flags where the evaluation is older than the scores."""
    if isinstance(row.get("scores"), dict):
        return dict(row["scores"].get(side) or {})
    if side not in row:
        return {}
    json_exact, finished = row.get(f"{side}_json_exact"), row.get(f"{side}_finished", True)
    return {
        "exact_match": float(row.get(f"{side}_exact", False)),
        "json_exact": None if json_exact is None else float(json_exact),
        "likeness": SequenceMatcher(None, row["reference"], row[side], autojunk=False).quick_ratio(),
        "tokens": row.get(f"{side}_tokens"),
        "hit_limit": float(not finished),
    }


def _change(name: str, scores: dict[str, dict[str, float | None]]) -> float:
    base, tuned = scores["base"].get(name), scores["tuned"].get(name)
    if base is None or tuned is None:
        return 0.0
    change = tuned - base
    if abs(change) < 1e-9:
        return 0.0
    return -change if name in metrics.METRICS and metrics.METRICS[name].better == "lower" else change


def extremes(ranked: Sequence[Ranked]) -> tuple[list[Ranked], list[Ranked]]:
    """The rows that improved most and those that were harmed most, the greatest change first; 20 of each at most."""
    better = [row for row in ranked if row.direction == "better"]
    worse = [row for row in ranked if row.direction == "worse"]
    better.sort(key=lambda row: (-row.change[0], -row.change[1], row.number))
    worse.sort(key=lambda row: (*row.change, row.number))
    return better[:MOST_SHOWN], worse[:MOST_SHOWN]


def said_scores(name: str, scores: dict[str, dict[str, float | None]]) -> list[tuple[str, str, str]]:
    """(label, base, tuned) of the metrics that a row is shown with: the headline first."""
    lines = []
    for metric in dict.fromkeys([name, "chrf", "f1", "loss", "tokens"]):
        base, tuned = (scores[side].get(metric) for side in ("base", "tuned"))
        if (base, tuned) != (None, None):
            label = metrics.METRICS[metric].label if metric in metrics.METRICS else metric
            lines.append((label, said(metric, base), said(metric, tuned)))
    return lines[:4]


def said(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    if metric in _YES_NO:
        return "yes" if value else "no"
    return metrics.show(metric, metrics.Score(value)) if metric in metrics.METRICS else f"{value:g}"


# --- all rows, small


def listed(ranked: Sequence[Ranked], name: str) -> tuple[list[dict[str, Any]], str]:
    """Every row as the page's search reads it, and in words what is left out of it."""
    chosen, left_out = list(ranked), []
    if len(chosen) > MOST_LISTED:
        changed = sorted(chosen, key=lambda row: (-abs(row.change[0]), -abs(row.change[1]), row.number))
        chosen = sorted(changed[:MOST_LISTED], key=lambda row: row.number)
        left_out.append(f"the {len(ranked) - len(chosen):,} rows that changed least")
    most = min(max(_LISTED_CHARACTERS // (4 * max(len(chosen), 1)), 80), 2000)
    entries = [_entry(row, name, most) for row in chosen]
    if any(entry.pop("cut") for entry in entries):
        left_out.append(f"what goes beyond {most:,} characters of a text")
    return entries, " and ".join(left_out)


def _entry(ranked: Ranked, name: str, most: int) -> dict[str, Any]:
    row = ranked.row
    prompt = clean(row.get("prompt", ""))
    texts = [(key, clean(row[key])) for key in ("reference", "base", "tuned") if isinstance(row.get(key), str)]
    label, base, tuned = (said_scores(name, ranked.scores) or [("", "–", "–")])[0]
    exact = row.get("tuned_exact")
    finished = row.get("tuned_finished", True)
    return {
        "n": ranked.number,
        "at": ranked.name,
        "way": ranked.direction,
        "score": f"{label} {base} → {tuned}",
        "exact": exact if isinstance(exact, bool) else None,
        "ended": bool(finished),
        "texts": [
            ["prompt", f"…{prompt[boundary(prompt, len(prompt) - most) :]}" if len(prompt) > most else prompt],
            *([key, f"{text[: boundary(text, most)]}…" if len(text) > most else text] for key, text in texts),
        ],
        "cut": any(len(text) > most for text in (prompt, *(text for _, text in texts))),
    }
