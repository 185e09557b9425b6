"""BLEU and chrF by sacrebleu: a score a row, and a score of many rows from their summed counts.

A corpus score is no mean of its rows' scores: n-grams are counted over all rows first. Resampled rows (intervals.py)
are summed the same way.
"""

from collections.abc import Sequence
from typing import Any


def scorers() -> dict[str, Any]:
    """sacrebleu's metrics with their default settings (BLEU: 13a tokens; chrF2; Papineni 2002, Popović 2015)."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # force: no complaint about answers that end in " ."
    return {"bleu": BLEU(force=True), "chrf": CHRF()}


def counts(scorer: Any, answers: Sequence[str], references: Sequence[str]) -> Any:
    """n-gram counts of each answer against its reference: float64 [rows, counts], exact whole numbers."""
    import numpy

    # the counts that sacrebleu's own significance tests resample; a test holds them to corpus_score
    return numpy.array(scorer._extract_corpus_statistics(list(answers), [list(references)]), dtype=numpy.float64)


def score(scorer: Any, sums: Any) -> Any:
    """Score (0–100) of each line of summed counts [lines, counts]."""
    import numpy

    return numpy.array([scorer._compute_score_from_stats([int(n) for n in line]).score for line in sums])


def of_rows(name: str, scorer: Any, stats: Any) -> list[float]:
    """Each row's own score; BLEU with the orders that a short answer has, as sacrebleu's sentence scores are meant."""
    from sacrebleu.metrics.bleu import BLEU

    single = BLEU(effective_order=True, force=True) if name == "bleu" else scorer
    return [float(value) for value in score(single, stats)]
