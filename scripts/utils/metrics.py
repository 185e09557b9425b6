"""How good the answers are: exact match, JSON, ROUGE-L, chrF and length.

A metric that cannot be computed is None with the reason, never 0.0: a zero would look like a measurement, and a
before/after table would be decided by it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One metric over all answers. ``value`` is None where it could not be computed; ``reason`` says why."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its label, its unit ("share" 0–1, "points" 0–100, "tokens", "") and which way is better."""

    label: str
    unit: str
    better: str


# in the order of the table; "loss" and "perplexity" are filled in by eval.py
METRICS: dict[str, Metric] = {
    "loss": Metric("loss", "", "lower"),
    "perplexity": Metric("perplexity", "", "lower"),
    "exact_match": Metric("exact match", "share", "higher"),
    "json_valid": Metric("JSON parses", "share", "higher"),
    "json_exact": Metric("JSON equal", "share", "higher"),
    "rouge_l": Metric("ROUGE-L", "share", "higher"),
    "chrf": Metric("chrF", "points", "higher"),
    "mean_tokens": Metric("tokens per answer", "tokens", ""),
    "hit_limit": Metric("cut at the limit", "share", "lower"),
}


def exact_match(answer: str, reference: str) -> bool:
    """Equal letter by letter, whitespace at both ends aside."""
    return answer.strip() == reference.strip()


def parse_json(text: str) -> Any:
    """The JSON object or array that ``text`` is, as a whole; None when it is anything else.

    A bare number, string or null is valid JSON too, but no answer that a person would call JSON. NaN and Infinity,
    which Python accepts, are not JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def same_json(one: Any, other: Any) -> bool:
    """Equal as JSON: the order of keys and 1 against 1.0 do not matter, but true is not 1 (in Python it is)."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def json_flags(answer: str, reference: str) -> tuple[bool, bool] | None:
    """(the answer parses, it is the same object as the reference); None when the reference is no JSON."""
    wanted = parse_json(reference)
    if wanted is None:
        return None
    given = parse_json(answer)
    return given is not None, given is not None and same_json(given, wanted)


class _Words:
    """Words for ROUGE-L in any script: rouge-score's own tokenizer keeps only a–z and 0–9, which makes every
    Cyrillic or Chinese answer score 0. Scripts written without spaces count letter by letter."""

    _pattern = re.compile(
        r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]"  # kana, CJK, Thai
        r"|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]+"
    )

    def tokenize(self, text: str) -> list[str]:
        return self._pattern.findall(text.lower())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Mean ROUGE-L F1 (0–1; Lin 2004) over the rows whose reference holds a word."""
    from rouge_score.rouge_scorer import RougeScorer

    words = _Words()
    scorer = RougeScorer(["rougeL"], tokenizer=words)
    pairs = [pair for pair in zip(answers, references, strict=True) if words.tokenize(pair[1])]
    if not pairs:
        return Score(None, "no reference holds a word")
    return Score(_mean([scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]))


def chrf(answers: Sequence[str], references: Sequence[str]) -> Score:
    """chrF2 over all answers (0–100; Popović 2015), as sacrebleu computes it with its default settings."""
    from sacrebleu.metrics.chrf import CHRF

    if not any(reference.strip() for reference in references):
        return Score(None, "all references are empty")
    return Score(float(CHRF().corpus_score(list(answers), [list(references)]).score))


def score_answers(
    answers: Sequence[str], references: Sequence[str], tokens: Sequence[int], finished: Sequence[bool]
) -> dict[str, Score]:
    """All metrics of generated answers; the four sequences run in parallel, one entry a row.

    ``tokens`` counts each answer's tokens without the stop token; ``finished`` is False where an answer was cut at
    the token limit.
    """
    names = [name for name in METRICS if name not in ("loss", "perplexity")]
    if not references:
        return {name: Score(None, "no rows") for name in names}
    flags = [json_flags(*pair) for pair in zip(answers, references, strict=True)]
    of_json = [flag for flag in flags if flag is not None]
    no_json = Score(None, "no reference is a JSON object or array")
    return {
        "exact_match": Score(_mean([exact_match(*pair) for pair in zip(answers, references, strict=True)])),
        "json_valid": Score(_mean([valid for valid, _ in of_json])) if of_json else no_json,
        "json_exact": Score(_mean([equal for _, equal in of_json])) if of_json else no_json,
        "rouge_l": rouge_l(answers, references),
        "chrf": chrf(answers, references),
        "mean_tokens": Score(_mean(tokens)),
        "hit_limit": Score(_mean([not done for done in finished])),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(name: str, score: Score, *, signed: bool = False) -> str:
    """A score as the table shows it: ``85.0 %``, ``1.234``; ``–`` where there is none.

    ``signed`` is for a change: ``+0.123``, and percentage points (``+85.0 pp``) for shares.
    """
    if score.value is None:
        return "–"
    sign = "+" if signed else ""
    value = score.value
    match METRICS[name].unit:
        case "share":
            return f"{100 * value:{sign}z.1f} {'pp' if signed else '%'}"
        case "points" | "tokens":
            return f"{value:{sign}z.1f}"
        case _:
            return f"{value:{sign}z.3f}" if abs(value) < 1000 else f"{value:{sign}.3g}"


def difference(base: Score, tuned: Score) -> Score:
    """Tuned minus base; None where either is missing."""
    if base.value is None or tuned.value is None:
        return Score(None, base.reason or tuned.reason)
    return Score(tuned.value - base.value)
