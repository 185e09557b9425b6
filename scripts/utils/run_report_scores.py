"""The before/after table of a run's report: each metric with its interval, its verdict, and what it measures."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from scripts.utils import metrics
from scripts.utils.report_page import table
from scripts.utils.run_report_words import clean

MEANINGS = {
    "loss": "how much the reference answer surprises the model, in nats a token; 0 would be: it would have written just that",
    "perplexity": "the same as a number of choices: between how many tokens, about, the model wavers at each step",
    "exact_match": "share of answers that equal the reference letter by letter",
    "normalised_match": "the same without regard to case, punctuation, spaces and the words a, an, the",
    "f1": "words that answer and reference share, weighed over both",
    "json_valid": "share of answers that are JSON, where the reference is",
    "json_exact": "share of answers that are the same JSON as the reference, whatever its layout",
    "json_keys": "share of JSON keys with the right value; a key too many counts as a wrong one",
    "number_match": "share of answers whose last number is the reference's, or the one after ####",
    "rouge_l": "longest run of words in common with the reference, gaps allowed",
    "bleu": "short runs of words in common with the reference, 0 to 100",
    "chrf": "short runs of letters in common with the reference, 0 to 100",
    "mean_tokens": "how long the answers are",
    "repetition": "share of an answer's pieces of four words that stood in it before",
    "hit_limit": "share of answers that did not end by themselves and were cut at eval.max_new_tokens",
}
VERDICTS = {
    "better": "▲ better",
    "worse": "▼ worse",
    "no clear change": "≈ no clear change",
    "changed": "◆ changed",
    "unknown": "? unknown",
}


def known_metrics(found: Mapping[str, Any]) -> list[str]:
    """The metrics of an evaluation, in the order of the table."""
    return [name for name in metrics.METRICS if name in found["base"] or name in found["tuned"]]


def has_intervals(found: Mapping[str, Any]) -> bool:
    return any((found.get("intervals") or {}).values())


def verdict(found: Mapping[str, Any], name: str) -> str:
    """better, worse, changed, no clear change, unknown; or nothing where an older version evaluated."""
    return str(found.get("verdict", {}).get(name) or "")


def label(name: str) -> str:
    return metrics.METRICS[name].label


def score(found: Mapping[str, Any], side: str, name: str) -> metrics.Score:
    return metrics.Score(found[side].get(name), found.get("reasons", {}).get(name, ""))


def change(found: Mapping[str, Any], name: str) -> str:
    return metrics.show(name, metrics.difference(score(found, "base", name), score(found, "tuned", name)), signed=True)


def interval(found: Mapping[str, Any], name: str) -> str:
    """Where the true change lies, by the rows' own spread: ``+91.7 to +100.0 pp``; nothing where there is none."""
    known = (found.get("intervals") or {}).get(name)
    if not known:
        return ""
    low, high = (metrics.show(name, metrics.Score(known[end]), signed=True) for end in ("low", "high"))
    return f"{low.split(' ')[0]} to {high}"


def level(found: Mapping[str, Any]) -> str:
    """``95 %`` in an evaluation with intervals."""
    known = next((item for item in (found.get("intervals") or {}).values() if item), None)
    return f"{known['level']:.0%}".replace("%", " %") if known else ""


def result(found: Mapping[str, Any], name: str) -> list[str]:
    """The headline figure, the verdicts in words, the table, and what its metrics measure."""
    settings, names = found["settings"], known_metrics(found)
    rows = f"{settings['rows']:,} of {found['data']['available']:,} {settings['split']} rows"
    parts: list[str] = [_lead(found, name, rows)]
    with_intervals = has_intervals(found)
    header = ["metric", "base", "tuned", "change", *(["verdict"] if with_intervals else [])]
    body = []
    for each in names:
        if found["base"].get(each) is None and found["tuned"].get(each) is None:
            continue
        shown = [metrics.show(each, score(found, side, each)) for side in ("base", "tuned")]
        changed = Markup("{}<br><small>{}</small>").format(change(found, each), interval(found, each))
        sign = Markup('<span class="verdict {}">{}</span>').format(
            verdict(found, each).split(" ")[0], VERDICTS.get(verdict(found, each), "–")
        )
        body.append(
            [label(each), *shown, changed if with_intervals else change(found, each)]
            + ([sign] if with_intervals else [])
        )
    said = f"Base and tuned model on the same {rows}"
    if with_intervals:
        said += f". In small figures: the {level(found)} interval of the change; one that includes zero may be chance"
    made = table(header, body, numbers={1, 2, 3}, caption=said)
    parts.append(Markup('<div class="result">{}</div>').format(Markup(made)))
    parts += _json_keys(found.get("json_keys"))
    if missing := _missing(found, names):
        parts.append(Markup('<p class="soft">{}</p>').format(missing))
    terms = Markup("").join(
        Markup("<dt>{}{}</dt><dd>{}</dd>").format(
            label(each), _which_way(metrics.METRICS[each]), MEANINGS.get(each, "")
        )
        for each in names
    )
    parts.append(Markup("<details><summary>What the metrics measure</summary>\n<dl>{}</dl>\n</details>").format(terms))
    return [str(part) for part in parts]


def _lead(found: Mapping[str, Any], name: str, rows: str) -> Markup:
    base, tuned = (metrics.show(name, score(found, side, name)) for side in ("base", "tuned"))
    inner = [f"{change(found, name)}"]
    if interval(found, name):
        inner.append(f"{level(found)} interval {interval(found, name)}")
    word = VERDICTS.get(verdict(found, name), "") if has_intervals(found) else ""
    return Markup(
        '<p class="lead"><span>{label} on {rows}</span><strong>{base} → {tuned}</strong>'
        '<span>{inner} <span class="verdict {way}">{word}</span></span></p>'
    ).format(
        label=label(name),
        rows=rows,
        base=base,
        tuned=tuned,
        inner=", ".join(inner),
        way=verdict(found, name).split(" ")[0],
        word=word,
    )


def _json_keys(keys: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """Each JSON key's share of right values, the worst of the tuned model first."""
    if not keys:
        return []
    worst = sorted(keys, key=lambda key: (keys[key]["tuned"], -keys[key]["rows"]))
    body = [
        [
            clean(key),
            keys[key]["rows"],
            *(metrics.show("exact_match", metrics.Score(keys[key][side])) for side in ("base", "tuned")),
        ]
        for key in worst
    ]
    made = table(
        ["JSON key", "rows", "base", "tuned"], body, numbers={2, 3}, caption="How often a key has the right value"
    )
    return [f"<details><summary>Key by key</summary>\n{made}\n</details>"]


def _which_way(metric: metrics.Metric) -> str:
    return f" ({metric.better} is better)" if metric.better else ""


def _missing(found: Mapping[str, Any], names: list[str]) -> str:
    """Why metrics have no figure, a reason once."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        if found["base"].get(name) is None or found["tuned"].get(name) is None:
            reason = found.get("reasons", {}).get(name, "not computed")
            by_reason.setdefault(reason, []).append(label(name))
    return "; ".join(f"no {', '.join(labels)}: {reason}" for reason, labels in by_reason.items())
