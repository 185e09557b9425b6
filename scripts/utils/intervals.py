"""Is a difference more than chance: paired bootstrap intervals of tuned minus base over the rows.

Every metric here is a function of sums over rows: a mean of a sum and a count, BLEU of its n-gram counts. Rows are drawn
with replacement, the same for both sides, their sums folded to the metric, and the difference taken (Efron 1979;
Koehn 2004 for corpus metrics). The percentiles are widened for few rows as a t interval is (Hesterberg 2015, "expanded").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MIN_ROWS = 10  # fewer say nothing about their spread
MIN_CHANGED = 6  # of five rows that change, all go one way by chance in one case of sixteen: more often than 5 %
_AT_ONCE = 2**21  # drawn rows in memory at a time


@dataclass(frozen=True)
class Measure:
    """A metric before it is folded: ``stats`` float64 [rows, parts]; ``fold`` makes [lines] values of summed [lines, parts]."""

    stats: Any
    fold: Callable[[Any], Any]

    @property
    def value(self) -> float:
        return float(self.fold(self.stats.sum(0)[None])[0])


@dataclass(frozen=True)
class Interval:
    """Where the difference lies with ``level``; ``changed``: rows in which the two sides differ at all."""

    low: float
    high: float
    rows: int
    changed: int


def mean(values: Any, weights: Any = None) -> Measure:
    """The mean of a value a row; with ``weights`` sums of values over sums of weights, as a loss a token is."""
    import numpy

    values = numpy.asarray(values, dtype=numpy.float64)
    weights = numpy.ones_like(values) if weights is None else numpy.asarray(weights, dtype=numpy.float64)
    return Measure(numpy.stack([values, weights], 1), _ratio)


def _ratio(sums: Any) -> Any:
    import numpy

    return numpy.divide(sums[:, 0], sums[:, 1], out=numpy.full(len(sums), numpy.nan), where=sums[:, 1] != 0)


def exponential(measure: Measure) -> Measure:
    """e to the power of another measure: perplexity of a loss."""
    import numpy

    def fold(sums: Any) -> Any:
        with numpy.errstate(over="ignore"):
            return numpy.exp(measure.fold(sums))

    return Measure(measure.stats, fold)


def bootstrap(base: Measure, tuned: Measure, level: float = LEVEL) -> Interval | None:
    """The interval of tuned minus base over the same rows; None for fewer than MIN_ROWS. The same each time."""
    import numpy

    rows = len(base.stats)
    if rows < MIN_ROWS:
        return None
    random = numpy.random.default_rng(SEED)
    differences = []
    lines = max(_AT_ONCE // rows, 1)
    for start in range(0, RESAMPLES, lines):
        count = min(lines, RESAMPLES - start)
        drawn = random.integers(0, rows, (count, rows)) + numpy.arange(count)[:, None] * rows
        times = numpy.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(numpy.float64)
        with numpy.errstate(invalid="ignore"):
            differences.append(tuned.fold(times @ tuned.stats) - base.fold(times @ base.stats))
    found = numpy.concatenate(differences)
    found = found[numpy.isfinite(found)]
    if len(found) < RESAMPLES // 2:
        return None
    tail = _tail(rows, level)
    low, high = numpy.quantile(found, [tail, 1 - tail])
    return Interval(float(low), float(high), rows, int((base.stats != tuned.stats).any(1).sum()))


def _tail(rows: int, level: float) -> float:
    """Share of the resamples outside on each side: 2.5 % for many rows and a level of 95 %, less for few."""
    normal = NormalDist()
    z, free = normal.inv_cdf((1 + level) / 2), rows - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)  # Cornish and Fisher
    return normal.cdf(-t * math.sqrt(rows / free))


def verdict(interval: Interval | None, better: str) -> str:
    """What may be said of a change; ``better`` is "higher", "lower" or "" (neither: a change is only a change)."""
    if interval is None:
        return "unknown"
    if interval.low <= 0 <= interval.high or interval.changed < MIN_CHANGED:
        return "no clear change"
    if not better:
        return "changed"
    return "better" if (interval.low > 0) == (better == "higher") else "worse"
