"""Base against tuned: every metric of both sides, the interval of its difference, and the scores of each row."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from scripts.utils import intervals, metrics, overlap, scoring
from scripts.utils.evaluation import SIDES, Answers, Side, asking
from scripts.utils.intervals import Measure
from scripts.utils.metrics import Score

TAIL = 2000  # characters of a prompt kept in samples.jsonl
_TOO_HIGH = 700  # nats a token; e to the power of more is no float


@dataclass(frozen=True)
class SideScores:
    """One side's metrics: ``scores`` by name, ``measures`` for those that intervals can be drawn for, ``rows`` one each."""

    scores: dict[str, Score]
    measures: dict[str, Measure]
    rows: list[scoring.Scores]


def score_side(rows: list[dict[str, Any]], given: Answers, why_none: str = "") -> SideScores:
    """Score what one side gave; ``why_none`` is the reason for metrics of answers where there are none."""
    scores, measures = loss_scores(given.losses, given.tokens)
    asked = asking(rows)
    each: list[scoring.Scores] = [
        {"loss": _mean_loss(loss, tokens)}
        for row, loss, tokens in zip(rows, given.losses, given.tokens, strict=True)
        if row["prompt_end"]
    ]
    if not given.answers:
        names = [name for name in metrics.METRICS if name not in metrics.OF_LOSS]
        return SideScores(scores | {name: Score(None, why_none) for name in names}, measures, each)
    texts, references = [answer.text for answer in given.answers], [row["reference"] for row in asked]
    counts, finished = [answer.tokens for answer in given.answers], [answer.finished for answer in given.answers]
    for row, found in zip(each, scoring.score_rows(texts, references, counts, finished), strict=True):
        row |= found
    measures |= answer_measures(texts, references, each)
    for name, metric in metrics.METRICS.items():
        if name not in metrics.OF_LOSS:
            scores[name] = Score(measures[name].value) if name in measures else Score(None, metric.missing)
    return SideScores(scores, measures, each)


def answer_measures(
    texts: Sequence[str], references: Sequence[str], rows: Sequence[scoring.Scores]
) -> dict[str, Measure]:
    """A measure of each metric that applies to some row. Puts each row's BLEU and chrF into ``rows``."""
    with_text = [number for number, reference in enumerate(references) if reference.strip()]
    found: dict[str, Measure] = {}
    for name, scorer in overlap.scorers().items():
        for row in rows:
            row[name] = None
        if with_text:
            stats = overlap.counts(scorer, [texts[n] for n in with_text], [references[n] for n in with_text])
            found[name] = Measure(stats, partial(overlap.score, scorer))
            for number, own in zip(with_text, overlap.of_rows(name, scorer, stats), strict=True):
                rows[number][name] = own
    for name in metrics.METRICS:
        if name not in metrics.OF_LOSS and name not in found:
            values = [value for row in rows if (value := row.get(metrics.row_name(name))) is not None]
            if values:
                found[name] = intervals.mean(values)
    return found


def loss_scores(losses: Sequence[float], tokens: Sequence[int]) -> tuple[dict[str, Score], dict[str, Measure]]:
    """Mean loss a trained token (nats) and its exponential; missing where that is no finite number."""
    loss = sum(losses) / sum(tokens) if sum(tokens) else math.nan
    if not math.isfinite(loss):
        reason = "no token carries loss" if not sum(tokens) else f"the loss is {loss}"
        return {"loss": Score(None, reason), "perplexity": Score(None, reason)}, {}
    measure = intervals.mean(losses, tokens)
    if loss > _TOO_HIGH:
        return {"loss": Score(loss), "perplexity": Score(None, "the loss is too high for it")}, {"loss": measure}
    return (
        {"loss": Score(loss), "perplexity": Score(math.exp(loss))},
        {"loss": measure, "perplexity": intervals.exponential(measure)},
    )


def _mean_loss(loss: float, tokens: int) -> float | None:
    return loss / tokens if tokens and math.isfinite(loss) else None


def compare(base: SideScores, tuned: SideScores) -> dict[str, Any]:
    """Intervals and verdicts by metric, as metrics.json keeps them (see docs/evaluation.md)."""
    found: dict[str, Any] = {"intervals": {}, "verdict": {}}
    for name, metric in metrics.METRICS.items():
        both = name in base.measures and name in tuned.measures
        interval = intervals.bootstrap(base.measures[name], tuned.measures[name]) if both else None
        found["intervals"][name] = interval and {
            **asdict(interval),
            "level": intervals.LEVEL,
            "resamples": intervals.RESAMPLES,
        }
        found["verdict"][name] = intervals.verdict(interval, metric.better)
    return found


def speed(given: Answers) -> dict[str, float | None]:
    """Tokens a second over all batches, and seconds an answer; padding and waiting for the longest answer included."""
    seconds = sum(answer.seconds for answer in given.answers)
    if not seconds:
        return {"tokens_per_second": None, "seconds_per_answer": None}
    tokens = sum(answer.tokens for answer in given.answers)
    return {"tokens_per_second": tokens / seconds, "seconds_per_answer": seconds / len(given.answers)}


def key_shares(rows: list[dict[str, Any]], answers: dict[Side, Answers]) -> dict[str, dict[str, Any]]:
    """For each top-level key of references that are JSON objects: in how many rows it is, and each side's share right."""
    found: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        for row, answer in zip(asking(rows), answers[side].answers, strict=False):
            for key, right in (scoring.right_keys(answer.text, row["reference"]) or {}).items():
                entry = found.setdefault(key, {"rows": 0, "base": 0.0, "tuned": 0.0})
                entry["rows"] += side == "base"
                entry[side] += right
    return {
        key: {"rows": entry["rows"], **{side: entry[side] / entry["rows"] for side in SIDES}}
        for key, entry in found.items()
    }


def samples(
    rows: list[dict[str, Any]], answers: dict[Side, Answers], scored: dict[Side, SideScores]
) -> Iterator[dict[str, Any]]:
    """Every row that asks, with both answers and their scores, as samples.jsonl has them."""
    for number, row in enumerate(asking(rows)):
        prompt = row["text"][: row["prompt_end"]]
        sample = {
            "id": row["id"],
            "source": row["source"],
            "prompt": prompt[-TAIL:],
            "prompt_cut": len(prompt) > TAIL,
            "reference": row["reference"],
        }
        for side in SIDES:
            if answers[side].answers:
                answer, score = answers[side].answers[number], scored[side].rows[number]
                equal = score["json_exact"]
                sample |= {
                    side: answer.text,
                    f"{side}_exact": bool(score["exact_match"]),
                    f"{side}_json_exact": None if equal is None else bool(equal),
                    f"{side}_tokens": answer.tokens,
                    f"{side}_finished": answer.finished,
                }
        sample["scores"] = {side: scored[side].rows[number] for side in SIDES}
        yield sample
