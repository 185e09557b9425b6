"""What a reader of a run's report must know before believing its figures."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from scripts.utils import metrics
from scripts.utils.run_report_facts import when
from scripts.utils.run_report_scores import has_intervals, known_metrics, verdict

_SMALL = 100  # rows: below it chance moves shares by ten points and more


def warnings(
    stamp: Mapping[str, Any], found: Mapping[str, Any] | None, manifest: Mapping[str, Any] | None
) -> list[str]:
    """What a reader must know first; ``manifest`` is that of the rendered rows, where they still lie here."""
    said = [*_of_training(stamp), *_of_data(stamp, manifest)]
    if found is None:
        said.append(f"not evaluated yet: whether the model got better is not known. make eval RUN={stamp['run']}")
    else:
        said += [str(text) for text in found.get("warnings", [])]
        said += _of_evaluation(stamp, found)
    return list(dict.fromkeys(said))


def _of_training(stamp: Mapping[str, Any]) -> Iterator[str]:
    last = (stamp.get("starts") or [{}])[-1]
    if stamp["status"] == "running":
        yield f"the run is not finished: it is training, or was killed (last saved step: {last.get('step', 0):,})"
    elif stamp["status"] != "finished":
        yield (
            f"the run is not finished: it stopped at step {last.get('step', 0):,} ({last.get('ended', 'unknown')}). "
            "The same make train command goes on from there"
        )
    backend, precision, result = (stamp.get(key) or {} for key in ("backend", "precision", "result"))
    if backend.get("fallback_reason"):
        yield f"{backend['requested']} was asked for, {backend['actual']} ran: {backend['fallback_reason']}"
    if precision.get("changed"):
        yield f"precision {precision['requested']} was asked for, {precision['actual']} ran: {precision['why']}"
    if result.get("skipped_steps"):
        yield f"{result['skipped_steps']:,} steps were passed over, for a loss or gradient that was no number"
    if result.get("micro_batch_parts", 1) > 1:
        yield f"memory ran out: micro batches were cut into {result['micro_batch_parts']} parts (same result, slower)"
    splits = (stamp.get("data") or {}).get("splits") or {}
    if splits and not splits.get("val"):
        yield "no validation rows: nothing tells whether more training helped or the rows were learnt by heart"


def _of_data(stamp: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> Iterator[str]:
    if manifest is None:
        return
    long, rows = manifest.get("too_long") or {}, manifest.get("rows_in", 0)
    if long.get("left_out"):
        yield f"{long['left_out']:,} of {rows:,} rows were too long and left out (render.max_length {_max_length(stamp)})"
    if long.get("cut"):
        yield f"{long['cut']:,} of {rows:,} rows were too long and had their prompt cut (render.max_length {_max_length(stamp)})"
    if long.get("split"):
        yield f"{long['split']:,} of {rows:,} rows were too long and split into {long.get('parts', 0):,}"


def _max_length(stamp: Mapping[str, Any]) -> str:
    return f"{stamp['render']['max_length']:,}"


def _of_evaluation(stamp: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    settings, rows = found["settings"], found["settings"]["rows"]
    until = (stamp.get("starts") or [{}])[-1].get("until", "")
    if found.get("at", "") and found["at"] < until:
        yield f"evaluated {when(found['at'])}, before the training ended ({when(until)}): the figures are of earlier weights"
    if settings["split"] == "val" and "best checkpoint" not in " ".join(map(str, found.get("warnings", []))):
        yield "evaluated on the validation rows, by which the best checkpoint was chosen: the figures may be too good"
    elif settings["split"] == "train":
        yield "evaluated on rows that it was trained on: the figures say what it learnt by heart, not what it can do"
    if rows < _SMALL:
        yield f"only {rows:,} rows: chance alone can move a share of one half by {196 * math.sqrt(0.25 / max(rows, 1)):.0f} points either way"
    names = known_metrics(found)
    unclear = [metrics.METRICS[name].label for name in names if verdict(found, name) == "no clear change"]
    if unclear:
        yield f"no clear change in {', '.join(unclear)}: the interval includes zero, or too few rows changed; that may be chance"
    if "intervals" not in found:
        yield f"no intervals (an older evaluation): a small change may be chance. make eval RUN={stamp['run']} FORCE=1"
    elif not has_intervals(found):
        yield "no intervals: too few rows to tell a change from chance"
    for side in ("base", "tuned"):
        cut = found[side].get("hit_limit")
        if cut:
            yield f"{side}: {cut:.0%} of the answers were cut at {settings['max_new_tokens']:,} tokens (eval.max_new_tokens)"
