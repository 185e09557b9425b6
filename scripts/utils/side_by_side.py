"""An evaluation on the terminal: a few rows, the before/after table, and what is to be known with it."""

from pathlib import Path
from typing import Any

from scripts.utils import console, files, intervals, metrics
from scripts.utils.evaluation import SIDES

_KEYS_SHOWN = 12


def show(run: str, folder: Path, found: dict[str, Any]) -> None:
    """Print ``found`` (metrics.json) and the first rows of samples.jsonl in ``folder``."""
    settings, reasons = found["settings"], found["reasons"]
    if settings["generate"]:
        show_samples(folder)
        console.result()
    console.result(
        f"{run}: base and tuned on {settings['rows']:,} of {found['data']['available']:,} {settings['split']} rows"
    )
    lines = [_line(name, found) for name in metrics.METRICS if any(found[side][name] is not None for side in SIDES)]
    console.table("", ("metric", "base", "tuned", "change", "95 % interval", "verdict"), lines)
    show_keys(found["json_keys"])
    if settings["generate"]:
        console.facts("speed of the answers", [(side, _speed(found["speed"][side])) for side in SIDES])
    missing: dict[str, list[str]] = {}
    for name, metric in metrics.METRICS.items():
        if found["tuned"][name] is None or found["base"][name] is None:
            missing.setdefault(reasons.get(name, ""), []).append(metric.label)
    for reason, labels in missing.items():
        console.note("eval", f"no {', '.join(labels)}: {reason}")
    if settings["rows"] < intervals.MIN_ROWS:
        console.note("eval", f"no intervals: they need at least {intervals.MIN_ROWS} rows")
    console.result(f"metrics: {folder / 'metrics.json'}\nsamples: {folder / 'samples.jsonl'}")


def _line(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    base, tuned = (metrics.Score(found[side][name], found["reasons"].get(name, "")) for side in SIDES)
    change = metrics.show(name, metrics.difference(base, tuned), signed=True)
    interval = found["intervals"][name]
    span = metrics.show_interval(name, interval["low"], interval["high"]) if interval else "–"
    verdict = found["verdict"][name]
    return (
        metrics.METRICS[name].label,
        metrics.show(name, base),
        metrics.show(name, tuned),
        change,
        span,
        "–" if verdict == "unknown" else verdict,
    )


def show_keys(keys: dict[str, dict[str, Any]]) -> None:
    """Each key's share of right values, the worst of the tuned model first."""
    if not keys:
        return
    worst = sorted(keys, key=lambda key: (keys[key]["tuned"], -keys[key]["rows"]))
    console.table(
        f"JSON keys with the right value{f', the worst {_KEYS_SHOWN}' if len(keys) > _KEYS_SHOWN else ''}",
        ("key", "rows", "base", "tuned"),
        [
            (short(key, width=40), f"{keys[key]['rows']:,}", *(f"{100 * keys[key][side]:.1f} %" for side in SIDES))
            for key in worst[:_KEYS_SHOWN]
        ],
    )


def _speed(speed: dict[str, float | None]) -> str:
    if speed["tokens_per_second"] is None or speed["seconds_per_answer"] is None:
        return "–"
    return f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['seconds_per_answer']:.2f} s an answer"


def show_samples(folder: Path, count: int = 3) -> None:
    for number, row in enumerate(files.read_jsonl(folder / "samples.jsonl")):
        if number == count:
            break
        console.facts(
            f"row {row['id'][:12]}",
            [
                ("prompt", short(row["prompt"], tail=True)),
                *((n, short(row[n])) for n in ("reference", "base", "tuned")),
            ],
        )


def short(text: str, *, tail: bool = False, width: int = 160) -> str:
    line = " ".join(text.split())
    if len(line) <= width:
        return line or "(empty)"
    return f"…{line[-width:]}" if tail else f"{line[:width]}…"
