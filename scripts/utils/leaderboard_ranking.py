"""Which run is best, and whether that is more than chance: only among runs whose figures may be compared.

Figures are compared where the same rows were answered in the same way. The best is held against the runner-up by a paired
bootstrap over the rows, at a level raised for the number of runs that it was chosen from (Bonferroni; with the best
against each other run, as in Hsu's multiple comparisons with the best).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev
from typing import Any

from scripts.utils import intervals, metrics, overlap
from scripts.utils.intervals import Measure
from scripts.utils.leaderboard_runs import SEED, Entry, samples

VAL_LOSS = "val_loss"
NAMES = (VAL_LOSS, *metrics.METRICS)
_OF_TOKENS = (VAL_LOSS, *metrics.OF_LOSS)  # sums over tokens: comparable only with the same tokenizer and template


@dataclass(frozen=True)
class Group:
    """Runs that may be compared, the best first, by ``metric``; ``what`` says on which rows and how."""

    letter: str
    metric: str
    what: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class SeedGroup:
    """Runs that are equal but for their seed, with a figure of each."""

    settings: Mapping[str, Any]
    data: str
    runs: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return stdev(self.values)


def label(name: str) -> str:
    return "val loss" if name == VAL_LOSS else metrics.METRICS[name].label


def show(name: str, value: float | None) -> str:
    if name == VAL_LOSS:
        return "–" if value is None else f"{value:.4f}"
    return metrics.show(name, metrics.Score(value))


def show_spread(name: str, spread: float) -> str:
    """A standard deviation in the unit of a change: ``1.2 pp``."""
    return f"{spread:.4f}" if name == VAL_LOSS else metrics.show(name, metrics.Score(spread), signed=True).lstrip("+")


def higher_is_better(name: str) -> bool:
    return name != VAL_LOSS and metrics.METRICS[name].better != "lower"


def differing(entries: Sequence[Entry]) -> list[str]:
    """Settings that are not the same in all runs that have any, in the config's order; model and data stand by themselves."""
    known = [entry.settings for entry in entries if entry.settings]
    keys = dict.fromkeys(key for settings in known for key in settings if key not in ("model.name", "model.revision"))
    return [key for key in keys if len({repr(settings.get(key)) for settings in known}) > 1]


def groups(entries: Sequence[Entry], by: str = "") -> list[Group]:
    """The runs with a figure, in groups that may be compared, largest first; ``by`` names the metric, else the runs' headline."""
    found: dict[tuple[Any, ...], list[Entry]] = {}
    evaluated = any(entry.evaluation for entry in entries)
    for entry in entries:
        if by == VAL_LOSS or (not by and not evaluated):
            if VAL_LOSS in entry.scores:
                found.setdefault((VAL_LOSS, *_of_tokens(entry)), []).append(entry)
        elif entry.evaluation and entry.rows and (not by or by in entry.scores):
            more = _of_tokens(entry) if by in _OF_TOKENS else ()
            found.setdefault((*_decoding(entry.evaluation), entry.rows, *more), []).append(entry)
    made: list[Group] = []
    for members in sorted(found.values(), key=len, reverse=True):
        metric = by or (_headline(members) if evaluated else VAL_LOSS)
        ranked = [entry for entry in members if metric in entry.scores]
        ranked.sort(key=lambda entry: entry.scores[metric], reverse=higher_is_better(metric))
        if ranked:
            letter = chr(ord("A") + len(made)) if len(made) < 26 else f"A{len(made)}"
            made.append(Group(letter, metric, _what(ranked[0], metric), tuple(ranked)))
    return made


def _decoding(evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(repr(evaluation["settings"].get(key)) for key in ("split", "generate", "max_new_tokens"))


def _of_tokens(entry: Entry) -> tuple[Any, ...]:
    parts = [entry.facts.get(key) for key in ("render", "data")]
    rendered, data = (part if isinstance(part, dict) else {} for part in parts)
    return tuple(
        repr(part) for part in (entry.facts.get("tokenizer_hash"), rendered.get("template_hash"), data.get("hash"))
    )


def _headline(members: Sequence[Entry]) -> str:
    """The metric that most of them rank their rows by; the first in the table among equals."""
    counts = Counter(str(e.evaluation.get("headline")) for e in members if e.evaluation)
    names = [name for name in counts if name in metrics.METRICS]
    order = list(metrics.METRICS)
    return max(names, key=lambda name: (counts[name], -order.index(name))) if names else "loss"


def _what(entry: Entry, metric: str) -> str:
    if metric == VAL_LOSS or not entry.evaluation:
        return f"the lowest loss on the val rows of {entry.data}"
    settings = entry.evaluation["settings"]
    how = f", greedy, {settings['max_new_tokens']} new tokens at most" if settings.get("generate") else ", no answers"
    return f"{settings['rows']:,} {settings['split']} rows of {entry.data}{how}"


def measure(rows: Sequence[Mapping[str, Any]], name: str) -> Measure | None:
    """A metric of a run's rows (samples.jsonl), before it is folded; None where a row has no figure."""
    if name in ("bleu", "chrf"):
        with_text = [row for row in rows if str(row.get("reference", "")).strip()]
        if not with_text or not all(isinstance(row.get("tuned"), str) for row in with_text):
            return None
        scorer = overlap.scorers()[name]
        counts = overlap.counts(scorer, [row["tuned"] for row in with_text], [row["reference"] for row in with_text])
        return Measure(counts, partial(overlap.score, scorer))
    own = "loss" if name == "perplexity" else metrics.row_name(name)
    values = [((row.get("scores") or {}).get("tuned") or {}).get(own) for row in rows]
    values = [value for value in values if value is not None]
    if not values:
        return None
    return intervals.exponential(intervals.mean(values)) if name == "perplexity" else intervals.mean(values)


def _own_interval(found: Measure) -> intervals.Interval | None:
    """Where a single score lies: its difference from nothing."""
    zero = Measure(found.stats, lambda sums: 0 * found.fold(sums))
    return intervals.bootstrap(zero, found)


def verdict(group: Group) -> list[str]:
    """Which run is best, within what, and whether the runner-up is really behind: lines of text."""
    best, name = group.entries[0], group.metric
    # another seed of the same settings is no rival
    rivals = [entry for entry in group.entries if _but_seed(entry) != _but_seed(best)] or list(group.entries[1:])
    figure = f"{label(name)} {show(name, best.scores[name])}"
    if name == VAL_LOSS:
        said = "the val loss has no interval: it is one figure over all val rows (make eval gives one a row)"
        return (
            [f"best: {best.run}, {figure}; {said}"] if rivals else [f"{best.run}: {figure}; nothing to compare it with"]
        )
    try:
        rows = sorted(samples(best.run, best.evaluation or {}), key=lambda row: row["id"])
        found = measure(rows, name)
        own = _own_interval(found) if found else None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return [f"best: {best.run}, {figure}; no interval: {problem}"]
    within = (
        f" (95 % interval {_between(name, own.low, own.high)}, {own.rows:,} rows)"
        if own
        else " (too few rows for an interval)"
    )
    if not rivals:
        return [f"{best.run}: {figure}{within}; no other run was evaluated on these rows in this way"]
    lines = [f"best: {best.run}, {figure}{within}"]
    lines.append(_against(rivals[0], rows, found, name, len(rivals)))
    if len(group.entries) > 2:
        lines.append(
            f"chosen as the best of {len(group.entries)} by these very rows, so its figure is likely a little too good: "
            "choose by val (SPLIT=val), and report test once"
        )
    return lines


def _against(second: Entry, rows: Sequence[Mapping[str, Any]], found: Measure | None, name: str, others: int) -> str:
    try:
        theirs = sorted(samples(second.run, second.evaluation or {}), key=lambda row: row["id"])
        against = measure(theirs, name)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return f"no clear winner: {second.run} cannot be compared row by row ({problem})"
    if found is None or against is None or len(found.stats) != len(against.stats):
        return f"no clear winner: {second.run} has no figure for each of these rows"
    level = 1 - (1 - intervals.LEVEL) / others
    lead = intervals.bootstrap(against, found, level)
    if lead is None:
        return f"no clear winner: {len(rows):,} rows say too little (fewer than {intervals.MIN_ROWS})"
    widened = f", widened for {others} comparisons" if others > 1 else ""
    between = f"{metrics.show_interval(name, lead.low, lead.high)}{_unit(name)}, 95 %{widened}"
    if intervals.verdict(lead, "higher" if higher_is_better(name) else "lower") == "better":
        return f"clear winner: ahead of {second.run} by {between}"
    if lead.changed < intervals.MIN_CHANGED:
        return f"no clear winner: {second.run} differs from it in {lead.changed} of {lead.rows:,} rows"
    return f"no clear winner: the lead over {second.run} lies within {between}, which holds 0"


def _unit(name: str) -> str:
    return " pp" if metrics.METRICS[name].unit == "share" else ""


def _between(name: str, low: float, high: float) -> str:
    shown = [metrics.show(name, metrics.Score(end)) for end in (low, high)]
    return f"{shown[0].split(' ')[0]}…{shown[1]}"


def _but_seed(entry: Entry) -> str:
    """What is the same in all seeds of a run."""
    return repr(
        [entry.base, entry.data, sorted((key, repr(value)) for key, value in entry.settings.items() if key != SEED)]
    )


def seed_groups(group: Group) -> list[SeedGroup]:
    """Runs of a group that are equal but for train.seed, two or more of each; the best mean first."""
    found: dict[str, list[Entry]] = {}
    for entry in group.entries:
        if SEED in entry.settings:
            found.setdefault(_but_seed(entry), []).append(entry)
    made = [
        SeedGroup(
            {key: value for key, value in members[0].settings.items() if key != SEED},
            members[0].data,
            tuple(entry.run for entry in members),
            tuple(entry.scores[group.metric] for entry in members),
        )
        for members in found.values()
        if len(members) > 1
    ]
    return sorted(made, key=lambda seeds: seeds.mean, reverse=higher_is_better(group.metric))
